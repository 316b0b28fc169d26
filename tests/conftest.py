"""Set-up that all tests share."""

import signal

import pytest
import torch
from hypothesis import settings

settings.register_profile("tutelx", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("tutelx")

# A suite started in the background inherits an ignored SIGINT, and the tests of Ctrl-C would then test nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
