"""Collectives and groups under Tutel's names, over torch.distributed.

Where ranks call on different terms (another collective, dtype or shape), every rank raises `RankMismatchError` before
anything travels; a rank that does not come or dies is named by a `RankFailedError`. Gradients are right in every group.
With `group=None` all ranks take part; a process without others is a world of one, in which nothing travels.
"""

from tutelx.integrations.tutel.net.differentiable import (
    all_gather,
    all_to_all,
    all_to_all_single,
    allreduce_backward,
    allreduce_forward,
    reduce_scatter,
    spatial_split,
    zero_gather,
    zero_scatter,
)
from tutelx.integrations.tutel.net.groups import (
    barrier,
    create_groups_from_world,
    create_standalone_group,
    get_world_rank,
    get_world_size,
)
from tutelx.integrations.tutel.net.optimizer import TutelDistributedOptimizer
from tutelx.integrations.tutel.net.simple import (
    simple_all_gather,
    simple_all_reduce,
    simple_all_to_all,
    simple_broadcast,
    simple_reduce_scatter,
    simple_split,
)
from tutelx.integrations.tutel.net.unequal import batch_all_gather_v, batch_all_to_all_v

__all__ = [
    "TutelDistributedOptimizer",
    "all_gather",
    "all_to_all",
    "all_to_all_single",
    "allreduce_backward",
    "allreduce_forward",
    "barrier",
    "batch_all_gather_v",
    "batch_all_to_all_v",
    "create_groups_from_world",
    "create_standalone_group",
    "get_world_rank",
    "get_world_size",
    "reduce_scatter",
    "simple_all_gather",
    "simple_all_reduce",
    "simple_all_to_all",
    "simple_broadcast",
    "simple_reduce_scatter",
    "simple_split",
    "spatial_split",
    "zero_gather",
    "zero_scatter",
]
