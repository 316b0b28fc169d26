"""Bytes that a rank sends, against the formulas worked out by hand; load over ranks."""

import pytest
import torch
import torch.distributed as dist

from tests.cases import tensor
from tutelx import Capacity, MoE, Plan
from tutelx.gates import TopK


def ordered(group, experts_of_rank, plan, num_experts, bias, capacity):
    """Every token of a rank goes to the expert that is listed for it. M = 4, H = 8, float64."""
    rank = dist.get_rank(group)
    moe = MoE(
        4,
        8,
        num_experts,
        gate=TopK(k=1, balance_coef=0),
        experts="ffn",
        bias=bias,
        capacity=capacity or Capacity.dropless(),
        mesh=group,
        ranks_per_node=2,
        dtype=torch.float64,
    )
    with torch.no_grad():
        moe.gate.weight.copy_(torch.eye(num_experts, 4, dtype=torch.float64))
    x = 9 * torch.eye(4, dtype=torch.float64)[torch.tensor(experts_of_rank[rank], dtype=torch.long)]
    x.requires_grad_()
    y = moe(x, plan=plan)
    forward = moe.stats.bytes_tokens, moe.stats.bytes_weights
    y.sum().backward()
    both = moe.stats.bytes_tokens, moe.stats.bytes_weights
    return forward, both, moe.stats.load_over_ranks, moe.stats.received_over_ranks


ROW = 4 * 8  # bytes of a row


def sent(answers):
    return [tokens for (tokens, _), *_ in answers]


def test_rows_that_travel(ranks):
    # Two experts a rank: 0, 1 live on rank 0, 2, 3 on rank 1.
    # Rank 0 sends 2 rows and returns 1, rank 1 sends 1 and returns 2: 3 rows each; the backward sends as many.
    routes = [[0, 2, 3], [3, 3, 1, 2]]
    answers = ranks(2).run(ordered, routes, Plan(), 4, False, None)
    for forward, both, load, received in answers:
        assert forward == (3 * ROW, 0)
        assert both == (6 * ROW, 0)
        assert load.tolist() == [[1, 0, 1, 1], [0, 1, 1, 2]]
        assert torch.equal(received, load)
    chunks = ranks(2).run(ordered, routes, Plan(pipeline_degree=4), 4, False, None)
    assert sent(chunks) == [3 * ROW, 3 * ROW]
    # Padded to the greatest demand, 2: each rank sends 2 experts x 2 rows there, and returns as many.
    padded = ranks(2).run(ordered, routes, Plan(layout="padded"), 4, False, None)
    assert sent(padded) == [8 * ROW, 8 * ROW]
    # With one row an expert, rank 1 drops one of two.
    dropping = ranks(2).run(ordered, routes, Plan(), 4, False, Capacity.fixed(1.0))
    for *_, load, received in dropping:
        assert load.tolist() == [[1, 0, 1, 1], [0, 1, 1, 2]]
        assert received.tolist() == [[1, 0, 1, 1], [0, 1, 1, 1]]


def test_each_row_is_sent_to_r_places(ranks):
    # One expert on four ranks, s = 4, four tokens a rank.
    routes = [[0] * 4] * 4
    # r = 4: every rank sends its 4 rows to the 3 others, and returns 4 rows to each of them.
    assert sent(ranks(4).run(ordered, routes, Plan(shard_degree=4), 1, False, None)) == [24 * ROW] * 4
    # r = 2: rank w sends to member w % 2 of both pairs: one of the two is itself, so 4 rows out, 4 rows back.
    assert sent(ranks(4).run(ordered, routes, Plan(shard_degree=2), 1, False, None)) == [8 * ROW] * 4
    # r = 1: rank w sends to rank w % 4, which is itself.
    assert sent(ranks(4).run(ordered, routes, Plan(shard_degree=1), 1, False, None)) == [0] * 4


@pytest.mark.parametrize(("num_experts", "degree", "others"), [(1, 0, 3), (1, 1, 3), (1, 2, 1), (1, 4, 0), (4, 0, 3)])
def test_weights_that_travel(ranks, num_experts, degree, others):
    # P = up 8x4 + down 4x8 + biases 8 + 4 = 76 numbers an expert; a rank owns P * E / W of them, that is
    # 76 / 4 = 19 of one expert cut in four, or 76 of four experts. It sends its own to those that gather with it.
    own = 8 * (19 if num_experts == 1 else 76)
    answers = ranks(4).run(ordered, [[0]] * 4, Plan(shard_degree=degree), num_experts, True, None)
    for (_, forward), (_, both), *_ in answers:
        assert forward == own * others
        # The backward gathers again, and sends home the gradients of what the others own.
        assert both == 3 * own * others


def test_two_steps_send_most_rows_twice(ranks):
    # Four experts on 2 nodes of 2; each rank has one row for each. Rank 0, in the first step: the rows for rank 1 and
    # for rank 3 go to rank 1 (2 rows). In the second: its own and rank 1's row for rank 2 go there (2 rows).
    # The way back is the same.
    routes = [[0, 1, 2, 3]] * 4
    assert sent(ranks(4).run(ordered, routes, Plan(all_to_all="2dh"), 4, False, None)) == [8 * ROW] * 4
    assert sent(ranks(4).run(ordered, routes, Plan(), 4, False, None)) == [6 * ROW] * 4


def test_one_process_sends_nothing():
    moe = MoE(4, 8, 3)
    moe(tensor(5, 4))
    assert (moe.stats.bytes_tokens, moe.stats.bytes_weights) == (0, 0)
    assert moe.stats.load_over_ranks.tolist() == [moe.stats.tokens_per_expert.tolist()]
