"""Agreement: what all ranks must know of each other before the rows of one call may travel.

Every rank sends one small message to every other: the terms that must be equal, and the rows it has for each expert.
A backend that is given messages of unexpected sizes hangs or ends the process, so nothing is sent on other terms.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import lru_cache

import torch

from tutelx.comm._library import native
from tutelx.comm.failures import count_calls, number_of_calls, report, reported
from tutelx.comm.mesh import Mesh
from tutelx.errors import RankFailedError, RankMismatchError
from tutelx.types import Plan

Value = int | float | bool | str | None

_WORDS = 4  # of 64 bits: a field's type and value
_TEXT = 8 * (_WORDS - 1)
_EAGER = 1024  # expert counts that travel with the first message, and words of an error's text
_OK, _FAILED = 0, 1
_VALUES, _NUMBERS = 4, 5  # kinds of fields
MOST_NUMBERS = _EAGER


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What must be equal on all ranks of one call. plan: where the caller gave one, or the planner always gives it.
    planner: how the ranks will come to a plan otherwise."""

    call: str
    num_experts: int
    model_dim: int
    hidden_dim: int
    experts: str
    dtype: str
    device: str
    top_k: int
    capacity: str
    capacity_factor: float | None
    grad: bool
    ranks_per_node: int | None
    planner: str
    plan: Plan | None


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """counts: [W, E] int32 on the CPU, slots that asked for each expert, before any drop. tokens: the most of a rank.
    capacity: the most of a rank, None if none has one. threads: the fewest of a rank. grad: some rank will run the
    backward. train_experts: with gradients for the experts. number: of the call, counted in the group.
    """

    counts: torch.Tensor
    tokens: int
    capacity: int | None
    threads: int
    grad: bool
    train_experts: bool
    number: int

    @property
    def demand(self) -> int:
        """The most slots that ask one rank for one expert."""
        return int(self.counts.max())


def agree(
    mesh: Mesh,
    terms: Terms,
    counts: torch.Tensor,
    *,
    tokens: int,
    capacity: int | None,
    threads: int,
    grad: bool,
    train_experts: bool,
) -> Agreed:
    """Exchanges terms and counts [E] with all ranks, which must all call it.

    capacity: where the gate itself has dropped what exceeds it. The others as in :class:`Agreed`, of this rank.

    Raises:
        RankMismatchError: on every rank, if the terms differ; names the ranks, the field and both values.
        RankFailedError: a rank did not come within the group's timeout, or told that it failed.
    """
    device, counts = counts.device, counts.to("cpu", torch.int64)
    header = _header(terms)
    numbers = [tokens, capacity or 0, -threads, grad, train_experts, number_of_calls(mesh) + 1]
    own = torch.tensor(numbers, dtype=torch.int64)
    table = _gather(mesh, torch.cat([header, own, counts[:_EAGER]]), device)
    _compare(table, header)
    begin, end = len(header), len(header) + _OWN
    most = table[:, begin:end].amax(dim=0).tolist()
    parts = [table[:, end : end + min(len(counts), _EAGER)]]
    for first in range(_EAGER, len(counts), _EAGER):
        piece = counts[first : first + _EAGER]
        parts.append(_gather(mesh, torch.cat([header[:2], piece]), device)[:, 2 : 2 + len(piece)])
    count_calls(mesh, most[5])
    return Agreed(
        counts=torch.cat(parts, dim=1).int(),
        tokens=most[0],
        capacity=most[1] or None,
        threads=-most[2],
        grad=bool(most[3]),
        train_experts=bool(most[4]),
        number=most[5],
    )


def agree_on_size(mesh: Mesh, tokens: int, device: torch.device) -> None:
    """Makes sure that all ranks hold equally many tokens; raises as :func:`agree` does."""
    header = _header_of({"tokens": tokens}, 2)
    _compare(_gather(mesh, header, device), header)


def agree_on_tensor(mesh: Mesh, call: str, how: str, tensor: torch.Tensor, *, same_size: bool = True) -> int:
    """Makes sure that all ranks make one call with a tensor of one dtype and, unless the call takes different ones, one
    shape; raises as :func:`agree` does.

    how: what else must be equal, such as the operation of a reduction.

    Returns:
        The number of the call, the same on all ranks.
    """
    values: dict[str, Value] = {
        "call": call,
        "how": how,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "device": tensor.device.type,
        "elements": tensor.numel() if same_size else None,
        "shape": str(tuple(tensor.shape)) if same_size else None,
    }
    header = _header_of(values, 3)
    number = torch.tensor([number_of_calls(mesh) + 1])
    table = _gather(mesh, torch.cat([header, number]), tensor.device)
    _compare(table, header)
    most = int(table[:, len(header)].max())
    count_calls(mesh, most)
    return most


def agree_on_plan(mesh: Mesh, plan: Plan, device: torch.device) -> None:
    """Makes sure that all ranks run the same plan; raises as :func:`agree` does."""
    header = _header(plan)
    _compare(_gather(mesh, header, device), header)


def compare(mesh: Mesh, values: dict[str, Value], device: torch.device) -> None:
    """Makes sure that all ranks have the same values under the same names; raises as :func:`agree` does."""
    header = _header_of(values, _VALUES)
    _compare(_gather(mesh, header, device), header, list(values))


def gather_numbers(mesh: Mesh, words: Sequence[int], device: torch.device) -> torch.Tensor:
    """[W, n] int64: n numbers of every rank, at most MOST_NUMBERS; raises as :func:`agree` does."""
    header = _header_of({"numbers": len(words)}, _NUMBERS)
    table = _gather(mesh, torch.cat([header, torch.tensor(words, dtype=torch.int64)]), device)
    _compare(table, header)
    return table[:, len(header) : len(header) + len(words)].contiguous()


@contextmanager
def announced_failure(mesh: Mesh, device: torch.device) -> Iterator[None]:
    """A rank that fails in here tells the others, which are about to agree, and raises its own error."""
    try:
        yield
    except Exception as error:
        text = f"{type(error).__name__}: {error}".encode()[: 8 * _EAGER]
        words = struct.unpack(f"<{-(-len(text) // 8)}q", text.ljust(-(-len(text) // 8) * 8, b"\0"))
        message = torch.tensor([_FAILED, len(text), *words], dtype=torch.int64)
        with suppress(RankFailedError):
            native.gather_messages(mesh.group, message, _CAPACITY, device)
        raise


def _gather(mesh: Mesh, message: torch.Tensor, device: torch.device) -> torch.Tensor:
    """[W, ...] int64: the message of every rank."""
    table, missing = native.gather_messages(mesh.group, message, _CAPACITY, device)
    absent = {rank: why for rank, why in enumerate(missing) if why}
    if absent:
        number = number_of_calls(mesh)
        report(mesh, number + 1)
        # Who left the last call alive has closed its connections, but is not the one that was lost.
        left = reported(mesh, number)
        absent = {rank: why for rank, why in absent.items() if rank not in left} or absent
    reasons = [f"rank {rank} did not take part: {why}" for rank, why in absent.items()]
    if (table[:, 0] == _FAILED).any():
        for rank, row in enumerate(table):
            if row[0] == _FAILED and not missing[rank]:
                length = int(row[1])
                text = struct.pack(f"<{len(row) - 2}q", *row[2:].tolist())[:length].decode(errors="replace")
                reasons.append(f"rank {rank} failed before the exchange: {text}")
    if reasons:
        raise RankFailedError("; ".join(reasons))
    return table


def _compare(table: torch.Tensor, header: torch.Tensor, names: Sequence[str] = ()) -> None:
    """names: of the fields of a message that is compared by name."""
    if torch.equal(table[:, : len(header)], header.expand(len(table), -1)):
        return
    rows = [_decode(row.tolist(), names) for row in table[:, : max(len(header), _HEADER_WORDS)]]
    differences = []
    for rank, row in enumerate(rows[1:], 1):
        for name in dict.fromkeys([*rows[0], *row]):
            here, there = rows[0].get(name, "nothing"), row.get(name, "nothing")
            if here != there:
                differences.append(f"rank {rank} has {name}={there!r}, rank 0 has {name}={here!r}")
    raise RankMismatchError("; ".join(differences))


@lru_cache(maxsize=256)
def _header(of: Terms | Plan) -> torch.Tensor:
    return _header_of(_values(of), int(isinstance(of, Plan)))


def _header_of(values: dict[str, Value], kind: int) -> torch.Tensor:
    """Status, which kind of fields, and the fields."""
    return torch.tensor([_OK, kind, *(word for value in values.values() for word in _encode(value))])


def _values(of: Terms | Plan) -> dict[str, Value]:
    if isinstance(of, Plan):
        return {f"plan.{f.name}": getattr(of, f.name) for f in fields(Plan)}
    values: dict[str, Value] = {f.name: getattr(of, f.name) for f in fields(Terms) if f.name != "plan"}
    for f in fields(Plan):
        values[f"plan.{f.name}"] = None if of.plan is None else getattr(of.plan, f.name)
    return values


_PLAN_NAMES = [f"plan.{f.name}" for f in fields(Plan)]
_TERM_NAMES = [*(f.name for f in fields(Terms) if f.name != "plan"), *_PLAN_NAMES]
_TENSOR_NAMES = ["call", "how", "dtype", "device", "elements", "shape"]
_HEADER_WORDS = 2 + _WORDS * len(_TERM_NAMES)
_OWN = 6  # numbers that may differ from rank to rank
_CAPACITY = _HEADER_WORDS + _OWN + _EAGER


def _encode(value: Value) -> list[int]:
    if value is None:
        return [0, 0, 0, 0]
    if isinstance(value, str):
        return [3, *struct.unpack(f"<{_WORDS - 1}q", value.encode()[:_TEXT].ljust(_TEXT, b"\0"))]
    if isinstance(value, float):
        return [2, struct.unpack("<q", struct.pack("<d", value))[0], 0, 0]
    return [1, int(value), 0, 0]


def _decode(words: list[int], named: Sequence[str]) -> dict[str, Value]:
    names = (_TERM_NAMES, _PLAN_NAMES, ["tokens"], _TENSOR_NAMES, named, ["numbers"])[words[1]]
    values: dict[str, Value] = {}
    for i, name in enumerate(names):
        kind, *data = words[2 + i * _WORDS : 2 + (i + 1) * _WORDS]
        if kind == 3:
            values[name] = struct.pack(f"<{_WORDS - 1}q", *data).rstrip(b"\0").decode(errors="replace")
        elif kind == 2:
            values[name] = struct.unpack("<d", struct.pack("<q", data[0]))[0]
        else:
            values[name] = None if kind == 0 else data[0]
    return values
