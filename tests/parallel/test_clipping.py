"""The norm over ranks against torch's in one process that holds all experts."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from tests.parallel.models import Model, grid, loss_of, reference, whole_gradients
from tests.parallel.test_averaging import compare, groups
from tests.tolerance import assert_close
from tutelx import parallel
from tutelx.errors import InvalidValueError


def clipped(group, experts, columns, norm_type, sharded):
    spread, replicas = groups(group, columns)
    model = Model(spread, experts)
    if sharded:
        parallel.average_expert_gradients(model, group=group, replicas=replicas)
        fully_shard(model, mesh=grid(4, 1)["replicas"], ignored_params=set(parallel.expert_parameters(model)))
    loss_of(model, dist.get_rank(group)).backward()
    if not sharded:
        parallel.sync_gradients(model, group=group, replicas=replicas)
    norm = parallel.clip_grad_norm_(model, 0.5, norm_type=norm_type)
    return norm, whole_gradients(model)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize(
    ("experts", "columns", "sharded", "members"),
    [(2, None, False, None), (3, None, False, None), (4, 2, True, None), (1, 2, False, None), (4, None, False, (1, 3))],
    ids=["sliced", "an idle rank", "inside two nodes, FSDP", "sliced inside two nodes", "not the world"],
)
def test_every_expert_counts_once(ranks, experts, columns, sharded, members, norm_type):
    expected = reference(experts, 4 if members is None else len(members))
    norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.5, norm_type=norm_type)
    assert norm > 1, "something is clipped"
    for given, gradients in ranks(4).run(clipped, experts, columns, norm_type, sharded, ranks=members):
        assert_close(given, norm)
        compare(gradients, expected)


def by_hand(group):
    model = Model(group, 2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    if dist.get_rank() == 1:
        model.experts.up.grad = None
    return parallel.clip_grad_norm_(model, 1e9), model.before.weight.grad.unique().item()


def test_by_hand(ranks):
    # 12 + 8 ones outside. Two experts of up 15, down 15, up_bias 5, down_bias 3, four ranks, two slices of 3 and 2 of
    # each expert. Rank 1 lacks the gradient of its slice of up: 2*3 ones. 20 + 2*38 - 6 = 90.
    for norm, gradient in ranks(4).run(by_hand):
        assert norm.item() == pytest.approx(math.sqrt(90))
        assert gradient == 1, "what is below the limit stays as it is"


def not_finite(group):
    model = Model(group, 4)
    if dist.get_rank() == 3:
        model.experts.up.grad = torch.full_like(model.experts.up, math.inf)
    with pytest.raises(RuntimeError, match=r"the norm of order 2.0 of all gradients is inf"):
        parallel.clip_grad_norm_(model, 1.0, error_if_nonfinite=True)
    return parallel.clip_grad_norm_(model, 1.0).item()


def test_all_ranks_see_an_infinite_gradient(ranks):
    assert ranks(4).run(not_finite) == [math.inf] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_norm": -1.0}, "max_norm=-1.0 must not be negative"),
        ({"max_norm": math.nan}, "max_norm=nan must not be negative"),
        ({"max_norm": 1.0, "norm_type": 0.0}, "norm_type=0.0 must be positive"),
    ],
)
def test_wrong_use(arguments, message):
    with pytest.raises(InvalidValueError, match=message):
        parallel.clip_grad_norm_(Model(None, 2), **arguments)


def test_without_ranks_it_is_torchs():
    ours, theirs = reference(2, 2), reference(2, 2)
    norm = parallel.clip_grad_norm_(ours, 0.5)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5))
    compare({name: parameter.grad for name, parameter in ours.named_parameters()}, theirs)
