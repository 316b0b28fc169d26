"""Reading what others wrote: JSON of bounded depth and size, every field of the type and range that is expected."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from tutelx.errors import InvalidValueError

Check = Callable[[object, str], Any]

DEEPEST = 8  # brackets inside brackets; a record has four
LARGEST_INTEGER = 2**53  # beyond, a number differs from reader to reader
LONGEST_TEXT = 4096
MOST_NAMES = 64

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKS = re.compile(r'\\.|["\[\]{}]', re.DOTALL)


def document(data: bytes) -> object:
    """The JSON in `data`, as the standard has it: no NaN, no infinity, no name twice.

    Raises:
        InvalidValueError: it is none, or it is nested deeper than any record.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidValueError(f"byte {error.start} is not UTF-8") from None
    _check_depth(text)
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except InvalidValueError:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidValueError(f"no JSON: {str(error)[:120]}") from None


def record(value: object, where: str, required: Mapping[str, Check], optional: Mapping[str, Check]) -> dict[str, Any]:
    """The fields of an object, each checked; those of `optional` that it leaves out are left out.

    Raises:
        InvalidValueError: naming the field that is missing, unknown or wrong.
    """
    if not isinstance(value, dict):
        raise InvalidValueError(f"{where}={short(value)} is no object")
    if missing := [name for name in required if name not in value]:
        raise InvalidValueError(f"{where} has no {missing[0]!r}")
    checks = {**required, **optional}
    if unknown := [name for name in value if name not in checks]:
        raise InvalidValueError(f"{where} has an unknown field {short(unknown[0])}")
    return {name: checks[name](value[name], f"{where}.{name}") for name in value}


def integer(low: int, high: int = LARGEST_INTEGER) -> Check:
    def check(value: object, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InvalidValueError(f"{where}={short(value)} is no integer from {low} to {high}")
        return value

    return check


def number(low: float, high: float = 1e30, *, above: bool = False) -> Check:
    """above: `low` itself is not allowed."""

    def check(value: object, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InvalidValueError(f"{where}={short(value)} is no number")
        if not (low <= value <= high) or (above and value == low):
            raise InvalidValueError(
                f"{where}={short(value)} is not {'above' if above else 'at least'} {low} or over {high}"
            )
        return float(value)

    return check


def text(pattern: str | None = None) -> Check:
    """A printable line; with a pattern, one that matches it whole."""

    def check(value: object, where: str) -> str:
        if not isinstance(value, str) or len(value) > LONGEST_TEXT or _CONTROL.search(value):
            raise InvalidValueError(f"{where}={short(value)} is no printable text of up to {LONGEST_TEXT} characters")
        if pattern is not None and not re.fullmatch(pattern, value, re.ASCII):
            raise InvalidValueError(f"{where}={short(value)} does not match {pattern}")
        return value

    return check


def choice(*values: str) -> Check:
    def check(value: object, where: str) -> str:
        if not isinstance(value, str) or value not in values:
            raise InvalidValueError(f"{where}={short(value)} is none of {values}")
        return value

    return check


def flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidValueError(f"{where}={short(value)} is neither true nor false")
    return value


def texts(value: object, where: str) -> dict[str, str]:
    """Texts by name."""
    if not isinstance(value, dict) or len(value) > MOST_NAMES:
        raise InvalidValueError(f"{where}={short(value)} is no object of up to {MOST_NAMES} texts")
    check = text()
    return {check(name, f"a name in {where}"): check(entry, f"{where}[{name!r}]") for name, entry in value.items()}


def short(value: object) -> str:
    """A value for a message, in a few printable characters."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST_INTEGER:
        return f"an integer of {value.bit_length()} bits"
    shown = ascii(value[:40]) if isinstance(value, str) else ascii(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}..."


def _check_depth(text: str) -> None:
    depth, inside = 0, False
    for mark in _MARKS.findall(text):
        if mark == '"':
            inside = not inside
        elif not inside and mark in "[{":
            depth += 1
            if depth > DEEPEST:
                raise InvalidValueError(f"nested deeper than {DEEPEST} levels")
        elif not inside and mark in "]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise InvalidValueError(f"the name {short(next(n for n in names if names.count(n) > 1))} stands there twice")
    return found


def _constant(name: str) -> NoReturn:
    raise InvalidValueError(f"{name} is no number of JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidValueError(f"the number {text[:40]} is too large")
    return value
