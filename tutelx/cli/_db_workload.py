"""A workload as people write it: T=512,K=2,E=64,M=128,H=256."""

from __future__ import annotations

from collections.abc import Callable

from tutelx.errors import InvalidValueError
from tutelx.tuner.grid import World, workload
from tutelx.tuner.shapes import Shape
from tutelx.types import Workload


def _integer(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 1 <= len(text) <= 9 or int(text) < 1:
        raise ValueError("a whole number from 1 on")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 1e6:
        raise ValueError("a number from 1 on")
    return value


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("0 or 1")
    return text == "1"


_FIELDS: dict[str, Callable[[str], object]] = {
    **dict.fromkeys(("T", "K", "E", "M", "H", "threads", "world", "ranks_per_node"), _integer),
    "load": _number,
    **dict.fromkeys(("dtype", "experts", "device"), str),
    **dict.fromkeys(("bias", "training"), _flag),
}
_NEEDED = ("T", "K", "E", "M", "H")


def parse_workload(text: str, *, threads: int) -> Workload:
    """threads: of torch, where the text names none.

    Raises:
        InvalidValueError: the text is no workload; names the part that is wrong.
    """
    found: dict = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in _FIELDS or name in found:
            why = "is given twice" if name in found else f"is none of {', '.join(_FIELDS)}"
            raise InvalidValueError(f"workload={text!r}: {name!r} {why}")
        try:
            found[name] = _FIELDS[name](value)
        except ValueError as error:
            raise InvalidValueError(f"workload={text!r}: {name}={value!r} is not {error}") from None
    if missing := [name for name in _NEEDED if name not in found]:
        raise InvalidValueError(f"workload={text!r} has no {missing[0]}")
    device = found.get("device", "cpu")
    if device not in ("cpu", "cuda"):
        raise InvalidValueError(f"workload={text!r}: device={device!r} is neither cpu nor cuda")
    if found["K"] > found["E"]:
        raise InvalidValueError(f"workload={text!r}: K={found['K']} exceeds E={found['E']}")
    shape = Shape(
        model_dim=found["M"],
        hidden_dim=found["H"],
        num_experts=found["E"],
        experts=found.get("experts", "gated"),
        bias=found.get("bias", False),
        dtype=found.get("dtype", "float32"),
    )
    world = World(
        device=device,
        threads=found.get("threads", threads),
        world=found.get("world", 1),
        ranks_per_node=found.get("ranks_per_node"),
    )
    return workload(shape, world, found["T"], found["K"], found.get("load", 1.0), training=found.get("training", True))
