"""What a benchmark run can be asked for, checked at the door. Needs no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tutelx.bench.shapes import SETS, Shape
from tutelx.errors import InvalidValueError

OPS = (
    "linear",
    "gate",
    "gate_backward",
    "route",
    "encode",
    "encode_backward",
    "decode",
    "decode_backward",
    "clear_empty",
    "activation",
    "activation_backward",
    "expert_ffn",
    "expert_linear",
    "layer",
    "layer_inference",
)
# Whole gates against their textbook form: `tutelx bench gate` times them too, a run of all ops does not.
GATES = (
    "gate_topk",
    "gate_noisy_topk",
    "gate_gshard",
    "gate_switch",
    "gate_st_moe",
    "gate_cosine",
    "gate_expert_choice",
    "gate_group_limited",
    "gate_bias_balanced",
    "gate_top_p",
    "gate_hierarchical",
)
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Of "all", those that do not take minutes a row.
QUICK_PEERS = ("liger", "scattermoe", "transformers", "transformers_wrapped", "tutel")
PEERS = (*QUICK_PEERS, "transformers_eager")
DEVICES = ("cpu", "cuda")


def chosen_ops(names: Sequence[str]) -> tuple[str, ...]:
    """What the names of a command line stand for: all ops for none, and `gate` for the op and every whole gate."""
    each = (("gate", *GATES) if name == "gate" else (name,) for name in names)
    return tuple(dict.fromkeys(itertools.chain.from_iterable(each))) or OPS


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run: every op at every shape in every dtype.

    device: None takes cuda where torch finds one, else cpu.
    seconds: about how long the timing of one row may take; set-up and checks come on top.
    threads: of torch on the CPU; None leaves them.
    """

    ops: tuple[str, ...] = OPS
    shapes: tuple[Shape, ...] = SETS["default"]
    dtypes: tuple[str, ...] = ("float32",)
    peers: tuple[str, ...] = QUICK_PEERS
    device: str | None = None
    seconds: float = 2.0
    threads: int | None = None

    def __post_init__(self) -> None:
        known = {"ops": OPS + GATES, "dtypes": DTYPES, "peers": PEERS}
        for name, allowed in known.items():
            for value in getattr(self, name):
                if value not in allowed:
                    raise InvalidValueError(f"{name[:-1]} {value!r} is none of {', '.join(allowed)}")
        if self.device is not None and self.device not in DEVICES:
            raise InvalidValueError(f"device={self.device!r} is none of {', '.join(DEVICES)}")
        if not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise InvalidValueError(f"seconds={self.seconds} must be positive and finite")
        if self.threads is not None and self.threads < 1:
            raise InvalidValueError(f"threads={self.threads} must be at least 1")
