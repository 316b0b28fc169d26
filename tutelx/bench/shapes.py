"""The sizes a row is measured at, and how they are written on a command line. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from tutelx.errors import InvalidValueError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """T tokens, D model dim, K choices a token, E experts, H an expert's hidden dim.

    S: skew, the fullest expert's rows over the mean; at most E/K, as a token chooses an expert once.
    """

    T: int = 8192
    D: int = 1024
    K: int = 2
    E: int = 64
    H: int = 256
    S: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidValueError(f"{name}={value!r} must be an int of at least 1")
        if self.K > self.E:
            raise InvalidValueError(f"K={self.K} exceeds E={self.E}")
        if self.S > 1 and self.S * self.K > self.E:
            raise InvalidValueError(f"S={self.S} exceeds E/K={self.E}/{self.K}")

    def __str__(self) -> str:
        return " ".join(f"{name}{value}" for name, value in asdict(self).items() if name != "S" or value > 1)

    @property
    def rows(self) -> int:
        """Slots, which is the rows of the dropless layout that all benchmarks use."""
        return self.T * self.K


SETS: dict[str, tuple[Shape, ...]] = {
    "small": (Shape(T=1, D=64, E=8, H=128), Shape(T=128, D=64, E=8, H=128)),
    "default": (Shape(T=1), Shape(T=512, K=8), Shape()),
    "large": (
        Shape(T=1, D=4096, K=8, E=128, H=1536),
        Shape(T=4096, D=4096, K=8, E=128, H=1536),
        Shape(T=32768, D=2048, K=8, E=64, H=1024),
    ),
}


def parse(texts: list[str]) -> tuple[Shape, ...]:
    """Names of sets and lists of sizes, in their order, each shape once.

    Raises:
        InvalidValueError: a text that is neither; the message names the part that is wrong.
    """
    shapes: dict[Shape, None] = {}
    for text in texts:
        for shape in SETS[text] if text in SETS else (Shape(**parse_sizes(text)),):
            shapes[shape] = None
    return tuple(shapes)


def parse_sizes(text: str) -> dict[str, int]:
    """The sizes that a list such as "T=512,D=64" gives.

    Raises:
        InvalidValueError: as :func:`parse`.
    """
    names = [field.name for field in fields(Shape)]
    if "=" not in text:
        raise InvalidValueError(f"sizes={text!r} is none of {', '.join(SETS)}, and no list such as T=8192,D=1024")
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in names:
            raise InvalidValueError(f"sizes={text!r}: {name!r} is none of {', '.join(names)}")
        if name in sizes:
            raise InvalidValueError(f"sizes={text!r}: {name} is given twice")
        if not (value.isascii() and value.isdigit()):
            raise InvalidValueError(f"sizes={text!r}: {name}={value!r} is not a positive whole number")
        sizes[name] = int(value)
    return sizes
