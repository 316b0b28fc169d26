"""Exceptions. Each is also the built-in error that a caller of torch would expect to catch."""


class TutelxError(Exception):
    """Base of all errors that tutelx raises on purpose."""


class InvalidValueError(TutelxError, ValueError):
    """An argument has the right type and a value that cannot be used; the message names both sides."""


class InvalidTypeError(TutelxError, TypeError):
    """An argument has a wrong type or dtype; the message names what was given and what was expected."""


class ParityError(TutelxError):
    """A wrapped layer does not reproduce the numbers of the layer it replaces."""


class RankMismatchError(TutelxError, RuntimeError):
    """Ranks call one layer on different terms; raised on every rank, naming the ranks, the field and both values."""


class RankFailedError(TutelxError, RuntimeError):
    """Another rank died, failed, did not call or is too late; the process group is of no further use."""


class ExtensionError(TutelxError, ImportError):
    """The compiled extension is missing or does not load."""


class DatabaseError(TutelxError, OSError):
    """A tuning database cannot be written to, or not be locked; what was to be written is still in memory."""
