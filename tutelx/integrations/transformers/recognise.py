"""Which modules of a model tutelx can run in the place of transformers, and why not the others."""

from __future__ import annotations

import torch
from torch import nn

from tutelx.integrations.spec import Declined, ExpertsSpec
from tutelx.integrations.transformers import outside
from tutelx.integrations.transformers.gating import fused_activation, says
from tutelx.integrations.transformers.parity import mismatch
from tutelx.integrations.transformers.registry import check_reachable, is_alike, is_registered
from tutelx.integrations.transformers.setting import setting_of

_TOKENS = 4
_VERIFY_TOKENS = 64
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_candidate(module: nn.Module) -> bool:
    """Does it look enough like experts of transformers that leaving it alone deserves a word?"""
    return is_registered(module) or is_alike(module) or outside.is_moe(module)


def recognise(module: nn.Module) -> ExpertsSpec:
    """What the experts compute. They are run on a few tokens and left as they were.

    Raises:
        Declined: it is not certain that the numbers stay equal; the message names what has no place.
    """
    if not is_registered(module) and not is_alike(module):
        raise outside.why_not(module)
    setting = setting_of(module)
    if setting is not None and setting.ranks is not None:
        assert setting.spec is not None
        return setting.spec  # this rank's part alone would not show it
    spec = _from_flags(module)
    check_reachable(module)
    if spec.compared:
        _compare(module, spec, tokens=_TOKENS, weights=False)
    return spec


def verify(module: nn.Module, spec: ExpertsSpec) -> None:
    """Compares outputs and all gradients on more tokens. Raises Declined where they differ."""
    if spec.compared:
        _compare(module, spec, tokens=_VERIFY_TOKENS, weights=True)


def _compare(module: nn.Module, spec: ExpertsSpec, *, tokens: int, weights: bool) -> None:
    try:
        reason = mismatch(module, model_dim=spec.model_dim, tokens=tokens, weights=weights)
    except Exception as error:
        raise Declined("forward", f"raises {type(error).__name__}: {error}") from error
    if reason is not None:
        raise Declined("forward", reason)


def _from_flags(experts: nn.Module) -> ExpertsSpec:
    first = "gate_up_proj" if says(experts, "has_gate") else "up_proj"
    names = [first, "down_proj"]
    if says(experts, "has_bias"):
        names += [f"{name}_bias" for name in names]
    held = [_parameter(experts, name) for name in names]
    for name, parameter in zip(names, held):
        if parameter.dtype != held[0].dtype:
            raise Declined(name, f"is of {parameter.dtype}, `{first}` is of {held[0].dtype}")
    model_dim, hidden_dim = held[1].shape[1:]
    if says(experts, "is_transposed"):
        model_dim, hidden_dim = hidden_dim, model_dim
    return ExpertsSpec(
        num_experts=held[0].shape[0],
        model_dim=model_dim,
        hidden_dim=hidden_dim,
        gated=says(experts, "has_gate"),
        activation=fused_activation(experts) or ("_apply_gate" if says(experts, "has_gate") else "act_fn"),
        bias=says(experts, "has_bias"),
        transposed=says(experts, "is_transposed"),
        norm=says(experts, "has_post_expert_norm"),
        compared=held[0].device.type != "meta",
    )


def _parameter(experts: nn.Module, name: str) -> nn.Parameter:
    parameter = getattr(experts, name, None)
    if not isinstance(parameter, nn.Parameter):
        raise Declined(name, f"is {type(parameter).__name__}, expected a parameter")
    if type(parameter.data) is not torch.Tensor:
        raise Declined(name, f"is {type(parameter.data).__name__}, expected a plain tensor: wrap before sharding")
    if parameter.dtype not in _DTYPES:
        raise Declined(name, f"is of {parameter.dtype}, which no kernel computes in")
    dim = 2 if name.endswith("_bias") else 3
    if parameter.dim() != dim or parameter.shape[0] != experts.num_experts:
        raise Declined(
            name, f"has shape {tuple(parameter.shape)}, expected {dim} dimensions, {experts.num_experts} first"
        )
    return parameter
