"""Set-up that all tests share."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("tutelx", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("tutelx")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
