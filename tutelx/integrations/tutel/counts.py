"""How many experts a script's count means, and how many rows its capacity factor allows.

T tokens on this rank, K choices a token, E experts in all, W ranks, s ranks that share an expert.
"""

from __future__ import annotations

import math

from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.types import Capacity


def local_count(options: dict) -> int | float:
    """Takes `count_per_node`, or `num_experts_per_device`, out of a script's experts; 1 if neither is there."""
    other = options.pop("num_experts_per_device", 1)
    return options.pop("count_per_node", other)


def global_count(num_local: int | float, world: int) -> int:
    """E: num_local * W, or W / n where num_local is -n or 1/n, which has n ranks share each expert.

    Raises:
        InvalidValueError: 0 experts, or ranks that cannot be shared out evenly.
        InvalidTypeError: no number.
    """
    if isinstance(num_local, bool) or not isinstance(num_local, (int, float)):
        raise InvalidTypeError(f"num_experts_per_device={num_local!r} is {type(num_local).__name__}, expected int")
    if num_local == 0 or not math.isfinite(num_local):
        raise InvalidValueError(f"num_experts_per_device={num_local} must not be 0")
    if isinstance(num_local, float):
        num_local = -round(1 / num_local) if 0 < num_local < 1 else round(num_local)
    if num_local > 0:
        return num_local * world
    if world % -num_local:
        raise InvalidValueError(
            f"num_experts_per_device={num_local} has {-num_local} ranks share an expert, of {world}"
        )
    return world // -num_local


def setting(factor: float) -> Capacity:
    """The meaning of a capacity factor's sign: > 0 fixed, 0 dropless, < 0 what is needed, at most -factor.

    Raises:
        InvalidTypeError, InvalidValueError: no number, or not a finite one.
    """
    if isinstance(factor, bool) or not isinstance(factor, (int, float)):
        raise InvalidTypeError(f"capacity_factor={factor!r} is {type(factor).__name__}, expected a number")
    if factor == 0:
        return Capacity.dropless()
    return Capacity.fixed(factor) if factor > 0 else Capacity.bounded(-factor)


def rows(factor: float, *, tokens: int, top_k: int, num_experts: int, alignment: int) -> int | None:
    """Rows that an expert may receive from this rank, None if there is no limit.

    K * floor(f * ceil(T/E)), raised to a multiple of `alignment`. Where that is 0, the least that the balanced share
    asks for: ceil(f*K*T/E), at least 1.
    """
    capacity = setting(factor)
    if capacity.factor is None:
        return None
    allowed = top_k * math.floor(capacity.factor * -(-tokens // num_experts))
    if allowed == 0:
        allowed = capacity.limit(tokens=tokens, top_k=top_k, num_experts=num_experts) or 1
    return align(allowed, alignment)


def align(number: int, alignment: int) -> int:
    return -(-number // alignment) * alignment


def layer_alignment(*, slices: int, overlap: int, megablocks: int) -> int:
    """What the rows of a layer are a multiple of: all chunks equal, all slices equal, whole sparse blocks."""
    block = max(megablocks, 1)
    alignment = align(slices * overlap, block)
    return align(alignment, 128) if alignment > 256 else alignment
