"""fairseq's `MOELayer` and its relatives in fairscale and torchscale: a gate (`Top1Gate`, `Top2Gate`) and a list.

The gate decides with its capacity and its noise as before, and gives GShard's dense combine tensor [T, E, C].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tutelx.errors import InvalidTypeError
from tutelx.integrations.libraries.replacement import LibraryMoE, routing_of
from tutelx.integrations.libraries.structure import batches, check_alone, check_containers, child, formula_of
from tutelx.integrations.spec import Declined, LibrarySpec
from tutelx.types import Plan

NAME = "fairseq"
_MOST_CHOICES = 2  # of Top2Gate


def is_candidate(layer: nn.Module) -> bool:
    gate = child(layer, "gate")
    return (
        isinstance(child(layer, "experts"), nn.ModuleList)
        and gate is not None
        and hasattr(gate, "wg")
        and "num_local_experts" in vars(layer)
    )


def find_spec(layer: nn.Module) -> LibrarySpec:
    """Raises Declined for experts that are spread over ranks, and for gates of another kind."""
    experts, gate = child(layer, "experts"), child(layer, "gate")
    assert isinstance(experts, nn.ModuleList)
    assert gate is not None
    if type(gate).__name__ not in ("Top1Gate", "Top2Gate"):
        raise Declined("gate", f"is {type(gate).__name__}, expected Top1Gate or Top2Gate")
    for name in ("world_size", "all2all_size"):
        check_alone(int(getattr(layer, name, 1)), name)
    first = child(layer, "gate.wg_reduction") or child(layer, "gate.wg")
    if not isinstance(first, nn.Linear):
        raise Declined("gate.wg", f"is {type(first).__name__}, expected nn.Linear")
    check_containers(layer, "experts")
    formula = formula_of(experts, first.in_features, "experts")
    return LibrarySpec(
        library=NAME,
        model_dim=first.in_features,
        num_experts=len(experts),
        network=str(formula or "called one by one"),
        formula=formula,
        top_k=_MOST_CHOICES,
    )


class Layer(LibraryMoE):
    experts_path = "experts"

    @property
    def leaves(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self._is_masked() else ("l_aux",)

    def examples(self, rows: int = 32) -> list[tuple]:
        like = next(self.experts.parameters())
        return [(x,) for x in batches(self, like, rows, rows=self._batch_size() or self.num_experts)]

    def steps_aside(self, *inputs: Any, **named: Any) -> bool:
        """Batches that the layer fills up to the size in its `args`."""
        size = self._batch_size()
        return size > 0 and bool(inputs) and len(inputs[0]) != size

    def run(
        self,
        *inputs: torch.Tensor,
        plan: Plan | None,
        input_padding_mask: torch.Tensor | None = None,
        **named: Any,
    ) -> Any:
        """inputs: tokens [S, B, M] alone; input_padding_mask: [S, B] bool, the tokens that go nowhere."""
        if len(inputs) != 1 or inputs[0].dim() != 3:
            shapes = [tuple(x.shape) for x in inputs]
            raise InvalidTypeError(f"tensors of shapes {shapes} were given, expected one of three dimensions")
        x = inputs[0]
        x_TM = self._check_input(x).reshape(-1, x.shape[-1])
        masked = self._is_masked()
        given = (
            self.gate(x_TM, None if input_padding_mask is None else input_padding_mask.reshape(-1))
            if masked
            else (self.gate(x_TM))
        )
        if len(given) != (4 if masked else 3):
            raise InvalidTypeError(f"the gate returns {len(given)} values, expected combine weights and a loss")
        aux, combine_TEC = given[:2]
        self.leave("metadata", given[3]) if masked else self.leave("l_aux", aux)
        y = self.run_routed(x, routing_of(combine_TEC, self.spec.top_k), self.listed(), plan)
        return (y, aux) if masked else y

    def _batch_size(self) -> int:
        """What a batch is filled up to; 0 for none."""
        if getattr(self.original, "in_generation", False):
            return 0
        args = getattr(self.original, "args", None)
        return getattr(args, "batch_size" if self.training else "batch_size_valid", 0) or 0

    def _is_masked(self) -> bool:
        """fairseq and torchscale: the gate takes a mask, and the layer returns the loss; fairscale's leaves it."""
        code = type(self.gate).forward.__code__
        return code.co_argcount > 2
