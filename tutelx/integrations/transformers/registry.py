"""transformers' registry of experts implementations, and the switch of one module in it.

The library asks the registry for the name in the module's own configuration, on every call. Models that were built
from one configuration object share that switch. So a wrapped module's name is not "tutelx" but one that says what ran
before, and a module under that name that was not wrapped itself goes on as before.
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.integrations import moe

from tutelx.integrations.spec import Declined, ExpertsSpec
from tutelx.integrations.transformers.across import gather, share
from tutelx.integrations.transformers.experts import experts_forward
from tutelx.integrations.transformers.setting import Setting, forget, keep, setting_of
from tutelx.types import Capacity, Planner

if TYPE_CHECKING:
    from tutelx.comm.mesh import MeshLike

NAME = "tutelx"
_PREFIX = f"{NAME} over "
_PROBE = object()
_ARGUMENTS = ["hidden_states", "top_k_index", "top_k_weights"]
# What a module of transformers can say of itself; more than this would go unheard.
KNOWN_FLAGS = {"is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm"}

_log = logging.getLogger("tutelx")
_wrapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def register() -> None:
    """Adds the implementation "tutelx" to the library's registry; a second time changes nothing."""
    moe.ExpertsInterface.register(NAME, _forward)
    if unknown := unknown_flags():
        _log.warning(
            "transformers lets experts say %s of themselves, which this tutelx does not know: use tutelx.wrap, which"
            " compares the numbers first",
            ", ".join(sorted(unknown)),
        )


def unknown_flags() -> set[str]:
    """What experts modules of the installed transformers can say of themselves and this tutelx does not know."""
    parameters = inspect.signature(moe.use_experts_implementation).parameters
    return set(parameters) - KNOWN_FLAGS - {"experts_class", "experts_interface"}


def wrapped_name(previous: str | None) -> str:
    """The registered name of "tutelx where a module is wrapped, else `previous`"."""
    name = f"{_PREFIX}{previous or 'eager'}"
    if name not in moe.ALL_EXPERTS_FUNCTIONS:
        moe.ExpertsInterface.register(name, _forward_over(previous or "eager"))
    return name


def eager_forward(experts: nn.Module) -> Callable[..., Any]:
    """The forward that the module's class was written with; the registry, if any, stands in front of it."""
    forward = type(experts).forward
    return getattr(forward, "__wrapped__", forward)


def is_registered(module: nn.Module) -> bool:
    """Does its class ask the registry?"""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "has_gate") and hasattr(module, "config")


def is_alike(module: nn.Module) -> bool:
    """Does it have the parameters and the forward of those that ask the registry, without asking it?"""
    if is_registered(module) or not isinstance(getattr(module, "num_experts", None), int):
        return False
    if not {"gate_up_proj", "down_proj"} <= module._parameters.keys() or not hasattr(module, "act_fn"):
        return False
    return list(inspect.signature(type(module).forward).parameters)[1:] == _ARGUMENTS


def is_on(experts: nn.Module) -> bool:
    """Does tutelx run this module now?"""
    if not is_registered(experts):
        return setting_of(experts) is not None
    name = _implementation(experts)
    return name == NAME or (setting_of(experts) is not None and str(name).startswith(_PREFIX))


def check_reachable(experts: nn.Module) -> None:
    """Raises Declined unless a call of the module would come to tutelx."""
    if "forward" in vars(experts) and not _is_ours(experts):
        raise Declined(
            "forward", f"is replaced on this very object: set_experts_implementation({NAME!r}) works underneath"
        )
    if not is_registered(experts):
        return
    before = _implementation(experts)
    try:
        _set_implementation(experts, NAME)
        answer = type(experts).forward(experts, _PROBE, None, None)
    except Exception as error:
        raise Declined("forward", f"does not ask the registry: {type(error).__name__}: {error}") from error
    finally:
        _set_implementation(experts, before)
    if answer is not _PROBE:
        raise Declined("forward", "does not ask the registry")


def switch_on(
    experts: nn.Module,
    spec: ExpertsSpec,
    *,
    capacity: Capacity,
    planner: Planner | None,
    mesh: MeshLike | None = None,
) -> None:
    """Runs the module by tutelx until :func:`switch_off`; with a mesh, its experts are shared among the ranks."""
    now = _implementation(experts) if is_registered(experts) else None
    # Modules share the switch: the second one finds it set already.
    shared = now is not None and now.startswith(_PREFIX)
    previous = now.removeprefix(_PREFIX) if shared else now  # type: ignore[union-attr]
    setting = Setting(previous=previous, capacity=capacity, planner=planner)
    setting.spec = spec
    if mesh is not None:
        share(experts, setting, mesh)
    keep(experts, setting)
    if not is_registered(experts):
        vars(experts)["forward"] = functools.partial(_forward, experts)
        return
    _wrapped.add(experts)
    if not shared:
        _set_implementation(experts, wrapped_name(previous))


def switch_off(experts: nn.Module) -> None:
    """Gives the module back what it ran before; nothing if it is not wrapped."""
    setting = setting_of(experts)
    if setting is None:
        return
    if setting.ranks is not None:
        gather(experts, setting)
    forget(experts)
    if not is_registered(experts):
        if _is_ours(experts):
            del vars(experts)["forward"]
        return
    _wrapped.discard(experts)
    shared = any(other.config is experts.config for other in _wrapped)
    if not shared and _implementation(experts) == wrapped_name(setting.previous):
        _set_implementation(experts, setting.previous)


def _implementation(experts: nn.Module) -> str | None:
    return experts.config._experts_implementation  # type: ignore[union-attr, return-value]


def _set_implementation(experts: nn.Module, name: str | None) -> None:
    # Not through the property: that would set it on all parts of a composed configuration.
    experts.config._experts_implementation_internal = name  # type: ignore[union-attr]


def _forward(self: nn.Module, hidden_states, top_k_index, top_k_weights):
    if hidden_states is _PROBE:
        return _PROBE
    setting = setting_of(self)
    if setting is None:
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)
    return experts_forward(self, hidden_states, top_k_index, top_k_weights, setting=setting)


def _is_ours(experts: nn.Module) -> bool:
    forward = vars(experts).get("forward")
    return isinstance(forward, functools.partial) and forward.func is _forward


def _forward_over(previous: str) -> Callable[..., Any]:
    def forward(self: nn.Module, *args, **kwargs):
        if setting_of(self) is not None:
            return _forward(self, *args, **kwargs)
        return moe.ALL_EXPERTS_FUNCTIONS.get_interface(previous, eager_forward(self))(self, *args, **kwargs)

    return forward
