"""Weights that come before the experts, and not after them."""

from __future__ import annotations

from typing import Any

import torch

from tutelx import ops
from tutelx.dispatch import Dispatch
from tutelx.gates.base import wide
from tutelx.integrations.tutel.dispatcher import scored


def compute_prescored(x_TM: torch.Tensor, weights_TK: torch.Tensor, experts: Any, step: Dispatch) -> torch.Tensor:
    """As the middle of a layer call: x [T, M], weights [T, K] -> [T, O], the sum of f(weight * x) over K experts."""
    call, map, plan = step.call, step.map, step.decision.plan
    if call is None:
        rows_RO = experts(scored(ops.encode(x_TM, map), map.source, weights_TK), map, plan)
    else:
        map, weights_TK = call.map, call.spread(weights_TK)
        rows_RO = experts.across(scored(ops.encode(x_TM, map), map.source, weights_TK), call, plan)
    return ops.decode(rows_RO, map, torch.ones_like(weights_TK, dtype=wide(rows_RO.dtype)))
