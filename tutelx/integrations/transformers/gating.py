"""What an experts module says of itself, and whether a compiled activation does what it has between its products."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F
from transformers import activations
from transformers.integrations import moe

from tutelx.ops.activation import Activation

_DEFAULT_GATE = getattr(moe, "_default_apply_gate", None)


def says(experts: nn.Module, flag: str) -> bool:
    """What the module says of itself: has_gate, has_bias, is_transposed or has_post_expert_norm.

    Experts that do not ask the library's registry say nothing; they are gated, and nothing else.
    """
    return bool(getattr(experts, flag, flag == "has_gate"))


def fused_activation(experts: nn.Module) -> Activation | None:
    """The kind, if the module computes act(gate) * up, or act(up) without a gate; None: its own code has to run."""
    if says(experts, "has_gate") and not _has_default_gate(experts):
        return None
    return _kind(experts.act_fn)


def _has_default_gate(experts: nn.Module) -> bool:
    if "_apply_gate" in experts.__dict__:
        return False
    return getattr(type(experts), "_apply_gate", _DEFAULT_GATE) is _DEFAULT_GATE


def _kind(act: object) -> Activation | None:
    # Exact classes: a subclass may compute anything.
    if type(act) in (nn.SiLU, activations.SiLUActivation) or act is F.silu:
        return "silu"
    if type(act) is activations.GELUActivation and act.act is F.gelu:
        return "gelu"
    if type(act) is nn.ReLU:
        return "relu"
    return None
