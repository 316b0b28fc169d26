"""The layers that are to be tuned: what of a layer its speed depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.tuning.key import Key
from tutelx.types import Workload

DTYPES = ("float32", "bfloat16", "float16", "float64")
Kind = Literal["gated", "ffn"]
_KINDS = ("gated", "ffn")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One MoE layer: M = model_dim, H = hidden_dim, E = num_experts.

    experts: "gated" (three matrices) or "ffn" (two). dtype: of rows and weights, by torch's name.

    Raises:
        InvalidValueError, InvalidTypeError: no layer has these sizes.
    """

    model_dim: int
    hidden_dim: int
    num_experts: int
    experts: Kind = "gated"
    bias: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("model_dim", "hidden_dim", "num_experts"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidTypeError(f"{name}={value!r} is {type(value).__name__}, expected int")
            if not 1 <= value < 2**31:
                raise InvalidValueError(f"{name}={value} is outside 1..2^31-1")
        if not isinstance(self.bias, bool):
            raise InvalidTypeError(f"bias={self.bias!r} is {type(self.bias).__name__}, expected bool")
        for name, known in (("experts", _KINDS), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise InvalidValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(known)}")

    @property
    def expert_numbers(self) -> int:
        """Parameters of one expert."""
        inner = 2 if self.experts == "gated" else 1
        biases = inner * self.hidden_dim + self.model_dim if self.bias else 0
        return (inner + 1) * self.hidden_dim * self.model_dim + biases

    def in_dtype(self, dtype: str) -> Shape:
        return replace(self, dtype=dtype)

    @classmethod
    def of(cls, workload: Workload | Key) -> Shape:
        """The layer that has this workload.

        Raises:
            InvalidValueError: its experts are neither "gated" nor "ffn", with or without biases.
        """
        sizes = {"model_dim": workload.model_dim, "hidden_dim": workload.hidden_dim}
        for kind in _KINDS:
            for bias in (False, True):
                shape = cls(**sizes, num_experts=workload.num_experts, experts=kind, bias=bias, dtype=workload.dtype)  # type: ignore[arg-type]
                if shape.expert_numbers == workload.expert_numbers:
                    return shape
        raise InvalidValueError(
            f"expert_numbers={workload.expert_numbers} with model_dim={workload.model_dim}, hidden_dim="
            f"{workload.hidden_dim} are the parameters of neither gated nor plain experts, with or without biases"
        )

    def __str__(self) -> str:
        bias = " bias" if self.bias else ""
        return f"M{self.model_dim} H{self.hidden_dim} E{self.num_experts} {self.experts}{bias} {self.dtype}"


def shapes_from(value: object, source: str) -> list[Shape]:
    """Of what a YAML or JSON file holds: a list of layers, or one, or a mapping with the key "layers".

    source: the file's name, for messages.

    Raises:
        InvalidValueError, InvalidTypeError: it holds something else; names the layer and the field.
    """
    if isinstance(value, Mapping) and set(value) == {"layers"}:
        value = value["layers"]
    layers = [value] if isinstance(value, Mapping) else value
    if not isinstance(layers, list) or not layers:
        raise InvalidTypeError(f"{source} holds {type(value).__name__}, expected a layer or a list of layers")
    return list(dict.fromkeys(_shape(layer, f"{source}, layer {i}") for i, layer in enumerate(layers)))


def _shape(layer: object, where: str) -> Shape:
    if not isinstance(layer, Mapping):
        raise InvalidTypeError(f"{where} is {type(layer).__name__}, expected a mapping")
    names = [field.name for field in fields(Shape)]
    if unknown := [str(name) for name in layer if name not in names]:
        raise InvalidValueError(f"{where}: {', '.join(unknown)} is none of {', '.join(names)}")
    if missing := [name for name in names[:3] if name not in layer]:
        raise InvalidValueError(f"{where}: {', '.join(missing)} is missing")
    try:
        return Shape(**layer)
    except (InvalidValueError, InvalidTypeError) as error:
        raise type(error)(f"{where}: {error}") from None


def shapes_of(model: Any, *, dtype: str | None = None) -> list[Shape]:
    """The MoE layers of a model in hand that tutelx runs: its own, and those that `tutelx.wrap` took; each shape once.

    dtype: instead of that of the weights. Layers whose experts are modules of any kind are left out: what they compute
    has no shape that could be built again.

    Raises:
        InvalidTypeError: `model` is no `nn.Module`.
        InvalidValueError: no such layer is in it.
    """
    from tutelx.tuner import models  # torch is for those who need it

    found = [shape.in_dtype(dtype or shape.dtype) for shape in models.shapes(model)]
    return list(dict.fromkeys(found))
