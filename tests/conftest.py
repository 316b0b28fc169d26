"""Set-up that all tests share."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.ranks import Ranks

try:
    from hypothesis import settings
except ImportError:  # a machine with a GPU need not have it: tests/gpu can do without
    pass
else:
    settings.register_profile("tutelx", deadline=None, max_examples=40, derandomize=True)
    settings.load_profile("tutelx")

# Plans do not depend on what was measured on the machine that runs the tests. Ranks and commands inherit it.
os.environ.setdefault("TUTELX_PLANNER", "rules")

# A suite started in the background inherits an ignored SIGINT, and the tests of Ctrl-C would then test nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """ranks(4) is the session's world of four gloo ranks."""
    worlds: dict[int, Ranks] = {}
    yield lambda world: worlds.setdefault(world, Ranks(world))
    for world in worlds.values():
        world.stop()
