"""transformers 5: its eager experts, which pay for a gradient of all experts' weights for each of them."""

from __future__ import annotations

import torch

from tutelx.bench.peers import Ways
from tutelx.bench.peers._experts import ways_of


def ways(device: torch.device) -> Ways:
    return ways_of("transformers eager", "eager")
