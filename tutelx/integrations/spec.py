"""What a recogniser found out about a layer, and how it says that it could not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tutelx.experts.linked import ExpertFormula
from tutelx.integrations.rule import TopKRule
from tutelx.ops.activation import Activation

Returns = Literal["tensor", "with_logits", "with_batched_logits"]


class Declined(Exception):
    """The layer is left alone. `attribute` is what could not be placed, as a path from the layer."""

    def __init__(self, attribute: str, reason: str) -> None:
        super().__init__(f"`{attribute}` {reason}")
        self.attribute, self.reason = attribute, reason


class Undecided(Declined):
    """The layer's present weights do not show what it computes; other weights may."""


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Everything needed to run the layer in its place.

    router, experts: names of the two children.
    zero_unused: an expert without tokens gets a zero gradient; False: it gets none.
    returns: y alone, or (y, router logits) with the logits [T, E] or [..., E].
    rank: of an input that the original takes; 3 where it takes both 2 and 3.
    input_name: of the first argument of the layer's forward, for callers that pass it by keyword.
    keeps_dtype: under autocast the output has the dtype of the input, not that of the products.
    """

    router: str
    experts: str
    model_dim: int
    num_experts: int
    formula: ExpertFormula
    rule: TopKRule
    zero_unused: bool = True
    returns: Returns = "tensor"
    rank: int = 3
    input_name: str = "x"
    keeps_dtype: bool = False

    def vanishing(self, names: Iterable[str]) -> set[str]:
        """Those of the parameters that have no gradient on paper: the router's, if the one weight of a token is 1."""
        if self.rule.k > 1 or not self.rule.normalize:
            return set()
        return {name for name in names if name.startswith(f"{self.router}.")}

    def __str__(self) -> str:
        return f"{self.num_experts} experts {self.formula}, {self.rule}"


@dataclass(frozen=True, kw_only=True)
class LibrarySpec:
    """What the experts of another library's layer compute, where the library's own gate goes on choosing.

    library: the name of the file that knows it.
    formula: of experts that are a list of modules; None if they are no such list, or are called one by one.
    network: what each expert computes, for people.
    activation: of stacked weights; None where `formula` says it, or nothing needs to.
    top_k: the most experts a token; 0 if the gate says so in each call.
    keeps_dtype: under autocast the output has the dtype of the input, not that of the products.
    """

    library: str
    model_dim: int
    num_experts: int
    network: str
    formula: ExpertFormula | None = None
    activation: Activation | None = None
    top_k: int = 0
    keeps_dtype: bool = False

    def __str__(self) -> str:
        return f"{self.num_experts} experts {self.network}, routed by the gate of {self.library}"


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """What the experts of a library compute, where the library keeps its own router and calls them with its choice.

    activation: of the compiled kinds, or the name of the module's own method that runs instead.
    compared: its numbers were compared; False on the meta device, where there are none.
    """

    num_experts: int
    model_dim: int
    hidden_dim: int
    gated: bool
    activation: str
    bias: bool = False
    transposed: bool = False
    norm: bool = False
    compared: bool = True

    def __str__(self) -> str:
        up, act = "up(x)", self.activation
        hidden = f"{act}(gate(x), {up})" if act.startswith("_") else f"{act}(gate(x)) * {up}"
        hidden = hidden if self.gated else f"{act}({up})"
        formula = f"norm(down({hidden}))" if self.norm else f"down({hidden})"
        extras = [
            "biases" if self.bias else "",
            "weights [in, out]" if self.transposed else "",
            "" if self.compared else "numbers not compared, as there are none on the meta device",
        ]
        sizes = f"{self.num_experts} experts {self.model_dim} -> {self.hidden_dim} -> {self.model_dim}"
        return ", ".join([f"{sizes}, {formula}", *filter(None, extras)])
