"""MoE layers of other libraries, known by their structure and never imported: one file a library.

The library's own gate runs as it is, noise, capacity, drops and auxiliary losses included; what it decided is run by
tutelx. So routing is the library's bit for bit, and what is left to compare is what comes after it.
"""

from __future__ import annotations

from dataclasses import replace as changed
from typing import Protocol

from torch import nn

from tutelx.integrations.libraries import deepspeed, fairseq, megablocks, mixture_of_experts, st_moe, tutel
from tutelx.integrations.libraries.confirm import keeps_dtype, mismatch
from tutelx.integrations.libraries.replacement import LibraryMoE
from tutelx.integrations.sandbox import Sandbox
from tutelx.integrations.spec import Declined, LibrarySpec
from tutelx.planner import RulePlanner
from tutelx.types import Capacity, Planner

__all__ = ["LibraryMoE", "is_candidate", "mismatch", "recognise", "replace"]


class Library(Protocol):
    """What the file of a library offers."""

    @property
    def NAME(self) -> str: ...

    @property
    def Layer(self) -> type[LibraryMoE]: ...

    def is_candidate(self, layer: nn.Module) -> bool: ...

    def find_spec(self, layer: nn.Module) -> LibrarySpec: ...


_LIBRARIES: tuple[Library, ...] = (deepspeed, st_moe, mixture_of_experts, megablocks, fairseq, tutel)


def is_candidate(layer: nn.Module) -> bool:
    """Does it look enough like a layer of one of the libraries that leaving it alone deserves a word?"""
    return _library_of(layer) is not None


def recognise(layer: nn.Module) -> LibrarySpec:
    """What the layer computes. It is run on a few tokens in both modes and left as it was.

    Raises:
        Declined: it is not certain that the numbers stay equal; the message names what has no place.
    """
    library = _library_of(layer)
    assert library is not None, "ask is_candidate first"
    with Sandbox(layer):
        try:
            spec = library.find_spec(layer)
            wrapped = replace(layer, spec, capacity=Capacity.dropless(), planner=RulePlanner())
            wrapped.plain = True
            reason = mismatch(layer, wrapped)
            if reason is None:
                spec = changed(spec, keeps_dtype=keeps_dtype(layer, wrapped))
        except Declined:
            raise
        except Exception as error:
            raise Declined("forward", f"raises {type(error).__name__}: {error}") from error
    if reason is not None:
        raise Declined("forward", reason)
    return spec


def replace(layer: nn.Module, spec: LibrarySpec, *, capacity: Capacity, planner: Planner | None) -> LibraryMoE:
    (library,) = [each for each in _LIBRARIES if spec.library == each.NAME]
    return library.Layer(layer, spec, capacity=capacity, planner=planner)


def _library_of(layer: nn.Module) -> Library | None:
    return next((library for library in _LIBRARIES if library.is_candidate(layer)), None)
