"""Figures of one call's load, against numbers worked by hand."""

import math

import pytest
import torch

from tutelx import ops
from tutelx.stats import Load, RoutingStats
from tutelx.types import Routing


def test_before_and_after_the_drop():
    # Six tokens want expert 0, two expert 1, none expert 2 and 3; each may take 4: two of eight are dropped.
    ids = torch.tensor([[0]] * 6 + [[1]] * 2).int()
    stats = RoutingStats(ops.route(ids, 4, 4))
    assert stats.tokens_per_expert.tolist() == [6, 2, 0, 0]
    assert stats.received_per_expert.tolist() == [4, 2, 0, 0]
    assert (stats.dropped, stats.drop_rate) == (2, 0.25)
    asked, got = stats.requested, stats.received
    # Shares 3/4, 1/4: entropy -(3/4 ln 3/4 + 1/4 ln 1/4). Mean 2, variance (16+0+4+4)/4 = 6: CV = sqrt(6)/2.
    assert asked.entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert asked.cv == pytest.approx(math.sqrt(6) / 2)
    assert (asked.max_over_mean, asked.dead_experts) == (3.0, 2)
    # After: 4, 2, 0, 0. Mean 1.5, variance (6.25+0.25+2.25+2.25)/4 = 2.75.
    assert got.cv == pytest.approx(math.sqrt(2.75) / 1.5)
    assert got.max_over_mean == pytest.approx(4 / 1.5)
    assert "max_over_mean=3.000" in repr(asked)


def test_what_the_gate_dropped_counts():
    ids = torch.tensor([[0, -1], [1, -1], [-1, -1]]).int()
    routing = Routing(expert_ids=ids, weights=torch.ones(3, 2), requested=torch.tensor([2, 1]), top_k=1, capacity=1)
    stats = RoutingStats(ops.route(ids, 2, 1), routing)
    assert (stats.dropped, stats.drop_rate) == (1, 1 / 3)
    assert stats.needed_capacity_factor == pytest.approx(2 * 2 / 3)


def test_even_and_empty():
    even = Load(torch.tensor([5, 5, 5]))
    assert (even.cv, even.max_over_mean, even.dead_experts) == (0.0, pytest.approx(1.0), 0)
    assert even.entropy == pytest.approx(math.log(3))
    nothing = Load(torch.tensor([0, 0]))
    assert (nothing.entropy, nothing.cv, nothing.max_over_mean, nothing.dead_experts) == (0.0, 0.0, 0.0, 2)
    empty = RoutingStats(ops.route(torch.zeros(0, 2).int(), 2))
    assert (empty.dropped, empty.drop_rate, empty.needed_capacity_factor) == (0, 0.0, 0.0)
