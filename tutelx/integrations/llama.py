"""The hand-written Llama-style layer: a Linear router and an `nn.ModuleList` of feed-forward experts.

Structure only; what the layer computes is for `formula` and `probe` to find out.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import nn

from tutelx.integrations.spec import Declined

# Children that hold nothing: their effect shows in the numbers.
STATELESS = (
    nn.Identity,
    nn.Softmax,
    nn.Sigmoid,
    nn.SiLU,
    nn.GELU,
    nn.ReLU,
)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_ROUTER_NAMES = ("gate", "router", "wg", "route")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The pieces of a layer that has the right structure. input_name: of forward's argument."""

    router: str
    experts: str
    model_dim: int
    num_experts: int
    dtype: torch.dtype
    device: torch.device
    input_name: str


def is_candidate(layer: nn.Module) -> bool:
    """Does it look enough like an MoE layer that leaving it alone deserves a word?"""
    return _expert_list(layer) is not None


def find_parts(layer: nn.Module) -> Parts:
    """The layer's parts, if there is nothing in it that has no place in them.

    Raises:
        Declined: naming what has no place.
    """
    experts_name = _expert_list(layer)
    assert experts_name is not None, "ask is_candidate first"
    experts = layer._modules[experts_name]
    assert isinstance(experts, nn.ModuleList)
    router_name = _router(layer, experts_name, len(experts))
    router = layer._modules[router_name]
    assert isinstance(router, nn.Linear)
    _check_own_state(layer, "")
    for name, child in layer._modules.items():
        if name not in (router_name, experts_name) and child is not None:
            check_stateless(child, name)
    for name, module in ((router_name, router), (experts_name, experts)):
        _check_own_state(module, name)
    _check_experts(experts, experts_name)
    dtype, device = dtype_and_device(layer)
    return Parts(
        router=router_name,
        experts=experts_name,
        model_dim=router.in_features,
        num_experts=len(experts),
        dtype=dtype,
        device=device,
        input_name=_input_name(layer),
    )


def check_stateless(module: nn.Module, path: str) -> None:
    """Raises Declined unless the module is one of those that hold no numbers and no randomness."""
    if isinstance(module, nn.Dropout):
        if module.p > 0:
            raise Declined(path, f"drops values at random (p={module.p})")
    elif type(module) not in STATELESS:
        raise Declined(path, f"is {type(module).__name__}, which has no place in a plain MoE layer")
    _check_own_state(module, path)


def _expert_list(layer: nn.Module) -> str | None:
    for name, child in layer._modules.items():
        if not isinstance(child, nn.ModuleList) or not len(child):
            continue
        if "expert" in name.lower():
            return name
        if all(type(item) is type(child[0]) and _feeds_forward(item) for item in child) and any(
            isinstance(other, nn.Linear) and other.out_features == len(child) for other in layer._modules.values()
        ):
            return name
    return None


def _feeds_forward(item: nn.Module) -> bool:
    """Two or three Linear hold all its parameters."""
    linears = [module for module in item.modules() if isinstance(module, nn.Linear)]
    held = sum(len(linear._parameters) for linear in linears)
    return len(linears) in (2, 3) and held == sum(len(module._parameters) for module in item.modules())


def _router(layer: nn.Module, experts_name: str, num_experts: int) -> str:
    """The name of the router; any further Linear is then found to have no place."""
    fitting = [
        name for name, child in layer._modules.items() if type(child) is nn.Linear and child.out_features == num_experts
    ]
    if fitting:
        return min(fitting, key=lambda name: not any(word in name.lower() for word in _ROUTER_NAMES))
    expected = f"expected an nn.Linear with {num_experts} outputs, one for each of `{experts_name}`"
    for name, child in layer._modules.items():
        if name != experts_name and any(word in name.lower() for word in _ROUTER_NAMES):
            outputs = f" with {child.out_features} outputs" if isinstance(child, nn.Linear) else ""
            raise Declined(name, f"is {type(child).__name__}{outputs}, {expected}")
    raise Declined(experts_name, f"has no router beside it, {expected}")


def _check_own_state(module: nn.Module, path: str) -> None:
    """The module may hold neither numbers (but for those of a Linear) nor changes to how it is called or saved."""
    placed = ("weight", "bias") if isinstance(module, nn.Linear) else ()
    for kind, held in (("parameter", module._parameters), ("buffer", module._buffers)):
        for name, tensor in held.items():
            if tensor is not None and not (kind == "parameter" and name in placed):
                what = f"is a {kind} of shape {tuple(tensor.shape)}"
                raise Declined(_join(path, name), f"{what}, which has no place in a plain MoE layer")
    check_hooks(module, path)


def check_hooks(module: nn.Module, path: str) -> None:
    """The module may hold no changes to how it is called or saved. Raises Declined."""
    check_calls(module, path)
    for name in ("get_extra_state", "state_dict", "_save_to_state_dict", "_load_from_state_dict"):
        own = getattr(type(module), name)
        if own is not getattr(nn.Linear if isinstance(module, nn.Linear) else nn.Module, name):
            raise Declined(_join(path, name), "is overridden: the checkpoint would not stay the same")


def check_calls(module: nn.Module, path: str) -> None:
    """The module may hold no changes to how it is called. Raises Declined."""
    for hooks in _HOOKS:
        if getattr(module, hooks, None):
            raise Declined(_join(path, hooks), f"holds hooks of {type(module).__name__}, which would no longer run")
    for name in ("forward", "__call__"):
        if name in vars(module):
            raise Declined(_join(path, name), "is replaced on this very object")


def _check_experts(experts: nn.ModuleList, path: str) -> None:
    """Every expert is of one class and has layers of the same names and shapes as the first."""
    first = dict(experts[0].named_parameters())
    for e, expert in enumerate(experts):
        if type(expert) is not type(experts[0]):
            raise Declined(f"{path}.{e}", f"is {type(expert).__name__}, {path}.0 is {type(experts[0]).__name__}")
        mine = dict(expert.named_parameters())
        for name in {**first, **mine}:
            shapes = [tuple(own[name].shape) if name in own else None for own in (mine, first)]
            if shapes[0] != shapes[1]:
                raise Declined(f"{path}.{e}.{name}", f"has shape {shapes[0]}, `{path}.0.{name}` has {shapes[1]}")
        for name, module in expert.named_modules():
            here = f"{path}.{e}.{name}" if name else f"{path}.{e}"
            if isinstance(module, nn.Linear):
                if type(module) is not nn.Linear:
                    raise Declined(here, f"is {type(module).__name__}, expected a plain nn.Linear")
                _check_own_state(module, here)
            elif module._modules or not name:
                _check_own_state(module, here)
            else:
                check_stateless(module, here)


def dtype_and_device(layer: nn.Module, *, mixed: bool = False) -> tuple[torch.dtype, torch.device]:
    """Those of the first parameter, which all others share, but for the dtype if `mixed`.

    Raises:
        Declined: they do not, or nothing can be computed with them.
    """
    named = list(layer.named_parameters())
    first_name, first = named[0]
    for name, parameter in named:
        if type(parameter) is not nn.Parameter:
            raise Declined(name, f"is {type(parameter).__name__}, expected a plain nn.Parameter")
        for what, own, other in (
            ("on", parameter.device, first.device),
            ("of", parameter.dtype, first.dtype),
        ):
            if own != other and not (mixed and what == "of"):
                raise Declined(name, f"is {what} {own}, `{first_name}` is {what} {other}")
    if first.device.type == "meta":
        raise Declined(first_name, "is on the meta device, so nothing can be computed with it")
    if first.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise Declined(first_name, f"is of {first.dtype}, which no kernel computes in")
    return first.dtype, first.device


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _input_name(layer: nn.Module) -> str:
    if type(layer).__call__ is not nn.Module.__call__:
        raise Declined("__call__", f"is overridden by {type(layer).__name__}")
    parameters = list(inspect.signature(type(layer).forward).parameters.values())[1:]
    if not parameters:
        raise Declined("forward", "takes no argument, expected the tokens")
    for other in parameters[1:]:
        raise Declined("forward", f"takes `{other.name}` besides the tokens")
    return parameters[0].name
