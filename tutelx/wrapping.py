"""`wrap` and `unwrap`: MoE layers that somebody already has, run by tutelx.

The file is not called `wrap`, so that importing it never hides the function `tutelx.wrap`.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import nn

from tutelx.base import MoEBase
from tutelx.errors import InvalidTypeError, InvalidValueError, ParityError
from tutelx.integrations import libraries
from tutelx.integrations.parity import GRADIENT_TOLERANCE, TOLERANCE, gradients, largest_error, relative_error
from tutelx.integrations.recognise import is_candidate, recognise
from tutelx.integrations.replacement import Replacement, WrappedMoE
from tutelx.integrations.sandbox import Sandbox
from tutelx.integrations.spec import Declined, ExpertsSpec, LayerSpec, LibrarySpec
from tutelx.types import Capacity, Planner

if TYPE_CHECKING:
    from tutelx.comm.mesh import MeshLike

__all__ = ["WrapReport", "WrappedMoE", "explain", "pack", "unwrap", "wrap"]

_log = logging.getLogger("tutelx")
_VERIFY_TOKENS = 64

AnySpec = LayerSpec | LibrarySpec | ExpertsSpec


@dataclass(frozen=True, kw_only=True)
class WrapReport:
    """What became of one layer that looks like an MoE layer.

    name: its path in the module, "" for the module itself.
    spec: what it computes; None if it is left alone.
    attribute, reason: what could not be placed (a path from the layer), and why; None and "" if there is nothing.
    already: it is wrapped already.
    """

    name: str
    kind: str
    spec: AnySpec | None = None
    attribute: str | None = None
    reason: str = ""
    already: bool = False

    @property
    def recognised(self) -> bool:
        return self.spec is not None

    def __str__(self) -> str:
        layer = f"{self.name or 'the module itself'} ({self.kind})"
        if self.spec is None:
            return f"{layer} is left alone: `{self.attribute}` {self.reason}"
        return f"{layer} is {'wrapped already' if self.already else 'recognised'}: {self.spec}"


def explain(module: nn.Module) -> list[WrapReport]:
    """What :func:`wrap` would do with each layer that looks like an MoE layer, without doing it.

    Each such layer is run on a few tokens and left as it was, random state included.

    Raises:
        InvalidTypeError: `module` is no `nn.Module`.
    """
    return [report for _, report in _examine_all(module)]


def wrap(
    module: nn.Module,
    *,
    capacity: Capacity | None = None,
    planner: Planner | None = None,
    mesh: MeshLike | None = None,
    verify: bool = False,
    strict: bool = False,
) -> nn.Module:
    """Runs every MoE layer in `module` that is recognised, in place; :func:`unwrap` undoes it.

    A hand-written layer is replaced. The replacement holds the very same children: same parameters, same `state_dict`
    keys, so optimizers and checkpoints go on working and no copy is kept. The experts of a transformers model stay the
    modules that they are, switched one by one in that library's own registry (`tutelx.integrations.transformers`).
    Layers of DeepSpeed, fairseq, st-moe-pytorch, mixture-of-experts and Megablocks are replaced as hand-written ones,
    and keep the library's own gate (`tutelx.integrations.libraries`).

    A layer is recognised by its structure and by its numbers, for which it is run on a few tokens and left as it was.
    If it is not certain that the numbers stay equal, the layer is left alone and the logger "tutelx" says which
    attribute had no place; :func:`explain` gives the same as data. Layers that are wrapped already stay as they are.

    Args:
        module: a model, or an MoE layer itself.
        capacity: how many rows an expert may receive; dropless by default, which is what keeps the numbers. What a
            library's gate has dropped stays dropped.
        planner: chooses the plan of each call.
        mesh: the ranks that share the experts of a transformers model, each with its own tokens; as for `tutelx.MoE`.
            Every rank brings the same whole model and keeps its experts of it. All must call, and :func:`unwrap` too.
        verify: run both layers on random input and compare outputs and all gradients, which have to find room.
        strict: a layer that looks like an MoE layer and is not recognised is an error.

    Returns:
        `module`, or its replacement if it is an MoE layer itself.

    Raises:
        ParityError: with `verify`, a relative error exceeds the dtype's tolerance; nothing is replaced.
        InvalidValueError: with `strict`, a layer would be left alone; with `mesh`, there is a hand-written layer, or
            experts that are wrapped already or that cannot be shared; nothing is replaced.
        InvalidTypeError: `module` is no `nn.Module`, `capacity` no Capacity.
    """
    capacity = Capacity.dropless() if capacity is None else capacity
    if not isinstance(capacity, Capacity):
        raise InvalidTypeError(f"capacity is {type(capacity).__name__}, expected tutelx.Capacity")
    examined = _examine_all(module)
    if strict and (left := [str(report) for _, report in examined if not report.recognised]):
        raise InvalidValueError("; ".join(left))
    replacements: dict[nn.Module, nn.Module] = {}
    switched: list[tuple[nn.Module, ExpertsSpec]] = []
    for layer, report in examined:
        _log.log(logging.INFO if report.recognised else logging.WARNING, "wrap: %s", report)
        if mesh is not None and report.spec is not None:
            _check_shareable(layer, report)
        if report.spec is None or report.already:
            continue
        if isinstance(report.spec, ExpertsSpec):
            if verify:
                _verify_experts(layer, report.spec, report)
            switched.append((layer, report.spec))
            continue
        if isinstance(report.spec, LibrarySpec):
            library = libraries.replace(layer, report.spec, capacity=capacity, planner=planner)
            if verify and (reason := libraries.mismatch(layer, library, rows=_VERIFY_TOKENS, every=True)):
                raise ParityError(f"{report.name or 'the module itself'} ({report.kind}): it {reason}")
            replacements[layer] = library
            continue
        wrapped = WrappedMoE(layer, report.spec, capacity=capacity, planner=planner)
        if verify:
            _verify(layer, wrapped, report)
        replacements[layer] = wrapped
    if not any(report.recognised for _, report in examined):
        _log.warning("wrap: nothing in this %s was recognised as an MoE layer", type(module).__name__)
    for layer, spec in switched:
        _transformers("registry").switch_on(layer, spec, capacity=capacity, planner=planner, mesh=mesh)
    return _replace(module, replacements)


def unwrap(module: nn.Module) -> nn.Module:
    """Puts back the very layers that :func:`wrap` replaced, and what ran in those that it switched, in place.

    Returns:
        `module`, or the original layer if it is a replacement itself.

    Raises:
        InvalidTypeError: `module` is no `nn.Module`.
    """
    _check_module(module)
    originals: dict[nn.Module, nn.Module] = {}
    for wrapped in module.modules():
        if isinstance(wrapped, Replacement):
            wrapped.original.training = wrapped.training
            originals[wrapped] = wrapped.original
        elif _is_transformers_loaded():
            _transformers("registry").switch_off(wrapped)
    return _replace(module, originals)


def pack(module: nn.Module) -> bool:
    """Puts the weights of every wrapped list of experts into one storage, of which the same parameters become views.

    Products of all experts at once then take them as they lie. It happens by itself in the first such call on CUDA;
    here it happens now, on any device. Names, values, gradients and what optimizers know stay, and so does unwrapping.
    Weights move expert by expert and the old ones are freed, so that memory never holds two sets of them.

    Returns:
        Whether all lie so now; a list stays as it is where something else looks at its weights too.

    Raises:
        InvalidTypeError: `module` is no `nn.Module`.
    """
    _check_module(module)
    lists = [wrapped.linked() for wrapped in module.modules() if isinstance(wrapped, Replacement)]
    done = [experts.pack() for experts in lists if experts is not None]
    return all(done)


def _examine_all(module: nn.Module) -> list[tuple[nn.Module, WrapReport]]:
    _check_module(module)
    examined: list[tuple[nn.Module, WrapReport]] = []
    inside: set[nn.Module] = set()
    for name, layer in module.named_modules():
        kind = type(layer).__name__
        if isinstance(layer, Replacement):
            inside.update(layer.modules())
            kind = type(layer.original).__name__
            examined.append((layer, WrapReport(name=name, kind=kind, spec=layer.spec, already=True)))
        elif layer in inside or isinstance(layer, MoEBase):
            continue
        elif _is_transformers_loaded() and _transformers("recognise").is_candidate(layer):
            inside.update(layer.modules())
            already = _transformers("registry").is_on(layer)
            examined.append((layer, _report(name, layer, _transformers("recognise").recognise, already=already)))
        elif libraries.is_candidate(layer):
            inside.update(layer.modules())
            examined.append((layer, _report(name, layer, libraries.recognise)))
        elif is_candidate(layer):
            examined.append((layer, _report(name, layer, recognise)))
    return examined


def _report(
    name: str,
    layer: nn.Module,
    find: Callable[[nn.Module], AnySpec],
    *,
    already: bool = False,
) -> WrapReport:
    kind = type(layer).__name__
    try:
        return WrapReport(name=name, kind=kind, spec=find(layer), already=already)
    except Declined as declined:
        return WrapReport(name=name, kind=kind, attribute=declined.attribute, reason=declined.reason)


def _is_transformers_loaded() -> bool:
    """Without it no model can be of it; a version before 5 has no registry."""
    return "transformers" in sys.modules and importlib.util.find_spec("transformers.integrations.moe") is not None


def _transformers(name: str) -> ModuleType:
    return importlib.import_module(f"tutelx.integrations.transformers.{name}")


def _replace(module: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(module, module)


def _verify(layer: nn.Module, wrapped: WrappedMoE, report: WrapReport) -> None:
    parameter = next(layer.parameters())
    leading = (2, _VERIFY_TOKENS // 2) if wrapped.spec.rank == 3 else (_VERIFY_TOKENS,)
    x = torch.randn((*leading, wrapped.model_dim), generator=torch.Generator().manual_seed(0)).to(parameter)
    names = [name for name, _ in layer.named_parameters()]
    with Sandbox(layer), torch.enable_grad():
        expected_y, expected = gradients(layer, x, names)
        given_y, given = gradients(wrapped, x, names)
    gradient_error, where = largest_error(given, expected, wrapped.spec.vanishing(names))
    _, error, limit, what = max(
        (error / limit, error, limit, what)
        for error, limit, what in (
            (relative_error(given_y, expected_y), TOLERANCE[parameter.dtype], "the output"),
            (gradient_error, GRADIENT_TOLERANCE[parameter.dtype], f"the gradient of {where or 'the input'}"),
        )
    )
    if error > limit:
        raise ParityError(
            f"{report.name or 'the module itself'} ({report.kind}): {what} differs by a relative error of {error:.2e},"
            f" tolerance {limit:.0e} ({parameter.dtype})"
        )


def _check_shareable(layer: nn.Module, report: WrapReport) -> None:
    if not isinstance(report.spec, ExpertsSpec):
        raise InvalidValueError(f"mesh was given, but {report}: only experts of transformers are shared by wrap")
    across = _transformers("across")
    if not report.already:
        across.check_shareable(layer)
    elif not across.is_shared(layer):
        raise InvalidValueError(f"mesh was given, but {report}: unwrap it first")


def _verify_experts(layer: nn.Module, spec: ExpertsSpec, report: WrapReport) -> None:
    try:
        _transformers("recognise").verify(layer, spec)
    except Declined as declined:
        raise ParityError(f"{report.name or 'the module itself'} ({report.kind}): it {declined.reason}") from None


def _check_module(module: object) -> None:
    if not isinstance(module, nn.Module):
        raise InvalidTypeError(f"module is {type(module).__name__}, expected torch.nn.Module")
