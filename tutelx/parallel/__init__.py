"""What data parallelism, clipping and checkpoints must know of experts that are spread over ranks.

Two kinds of parameters: those of experts that a layer with a mesh holds on this rank alone, and all others, of which
every rank has a copy. Gradients of the former are already those of all ranks' losses, added up.
"""

from tutelx.parallel.averaging import average_expert_gradients, data_parallel, sync_gradients
from tutelx.parallel.clipping import clip_grad_norm_
from tutelx.parallel.optimizer import load_optimizer_state_dict, optimizer_state_dict
from tutelx.parallel.parameters import expert_parameters, replicated_parameters

__all__ = [
    "average_expert_gradients",
    "clip_grad_norm_",
    "data_parallel",
    "expert_parameters",
    "load_optimizer_state_dict",
    "optimizer_state_dict",
    "replicated_parameters",
    "sync_gradients",
]
