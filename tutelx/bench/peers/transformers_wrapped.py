"""transformers 5: the same experts, run by tutelx from within the library."""

from __future__ import annotations

import torch

from tutelx.bench.peers import Ways
from tutelx.bench.peers._experts import ways_of


def ways(device: torch.device) -> Ways:
    from tutelx.integrations.transformers import NAME

    return ways_of("transformers wrapped", NAME)
