"""transformers 5: its grouped_mm experts, which is its default."""

from __future__ import annotations

import torch

from tutelx.bench.peers import Ways
from tutelx.bench.peers._experts import ways_of


def ways(device: torch.device) -> Ways:
    return ways_of("transformers", "grouped_mm")
