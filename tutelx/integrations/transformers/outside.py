"""MoE layers of transformers that do not ask its registry: what is known of them, and how a new one is noticed."""

from __future__ import annotations

import re

from torch import nn

from tutelx.integrations.spec import Declined
from tutelx.integrations.transformers.registry import is_alike, is_registered

# By family: the classes, what has no place, and why.
_KNOWN: dict[str, tuple[tuple[str, ...], str, str]] = {
    "llama4": (("Llama4TextMoe",), "router", "weighs the input of the experts, not their output"),
    "dbrx": (("DbrxFFN",), "experts", "do not ask the registry: one matrix [E * H, M] holds all of them"),
    "jetmoe": (("JetMoeMoE", "JetMoeMoA"), "input_linear", "does not ask the registry: it is cut by expert sizes"),
    "longcat_flash": (("LongcatFlashMoE",), "experts", "give some tokens back as they are, without weights for it"),
    "switch_transformers": (("SwitchTransformersSparseMLP",), "router", "drops tokens over its capacity"),
    "nllb_moe": (("NllbMoeSparseMLP",), "router", "drops tokens over its capacity"),
    "doge": (("DogeCDMoE",), "down_embed", "holds experts of one row each, chosen from two sets of keys"),
}
_NAME = re.compile(r"(Experts|MoE|Moe|MoeBlock|MoEBlock|SparseMLP|MoeLayer|MoELayer)$")


def is_moe(module: nn.Module) -> bool:
    """An MoE layer of transformers, or of a model in its style, with nothing in it that asks the registry.

    Of layers inside one another only the outermost counts; the caller skips what is below.
    """
    kind = type(module)
    if family_reason(module) is not None:
        return True
    if not kind.__module__.startswith("transformers.") or not _NAME.search(kind.__name__):
        return False
    if "Shared" in kind.__name__ or next(module.parameters(), None) is None:
        return False  # shared experts are those that every token goes through
    return not any(is_registered(child) or is_alike(child) for child in module.modules())


def family_reason(module: nn.Module) -> tuple[str, str] | None:
    """The attribute that has no place, and why, if the module is of a known family."""
    parts = type(module).__module__.split(".")
    if parts[:2] != ["transformers", "models"] or parts[2] not in _KNOWN:
        return None
    kinds, attribute, reason = _KNOWN[parts[2]]
    return (attribute, reason) if type(module).__name__ in kinds else None


def why_not(module: nn.Module) -> Declined:
    return Declined(
        *(family_reason(module) or ("forward", "does not ask the registry of transformers, and is not known otherwise"))
    )
