"""Is what an experts module puts between its two products one of the compiled activations?"""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F
from transformers import activations
from transformers.integrations import moe

from tutelx.ops.activation import Activation

_DEFAULT_GATE = getattr(moe, "_default_apply_gate", None)


def fused_activation(experts: nn.Module) -> Activation | None:
    """The kind, if the module computes act(gate) * up, or act(up) without a gate; None: its own code has to run."""
    if experts.has_gate and not _has_default_gate(experts):
        return None
    return _kind(experts.act_fn)


def _has_default_gate(experts: nn.Module) -> bool:
    if _DEFAULT_GATE is None or "_apply_gate" in experts.__dict__:
        return False
    return getattr(type(experts), "_apply_gate", None) is _DEFAULT_GATE


def _kind(act: object) -> Activation | None:
    # Exact classes: a subclass may compute anything.
    if type(act) in (nn.SiLU, activations.SiLUActivation) or act is F.silu:
        return "silu"
    if type(act) is activations.GELUActivation and act.act is F.gelu:
        return "gelu"
    if type(act) is nn.ReLU:
        return "relu"
    return None
