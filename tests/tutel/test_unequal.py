"""Collectives with another number of elements on every rank."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import tensor
from tests.comm.test_failures import caught
from tutelx.integrations.tutel import net


def two_devices(group):
    """Tutel's own examples for two ranks."""
    rank = dist.get_rank(group)
    x = torch.tensor([[10] * 5, [20] * 3][rank])
    sizes = torch.tensor([[1, 4], [2, 1]][rank])
    [dealt], from_each = net.batch_all_to_all_v([x], sizes, group)
    [joined], of_each = net.batch_all_gather_v([x], group)
    return dealt.tolist(), from_each.tolist(), joined.tolist(), of_each.tolist()


@pytest.mark.parametrize("members", [None, (3, 1)])
def test_two_ranks_by_hand(ranks, members):
    members = None if members is None else tuple(sorted(members))
    answers = ranks(2 if members is None else 4).run(two_devices, ranks=members)
    joined = [10] * 5 + [20] * 3, [5, 3]
    assert answers == [([10, 20, 20], [1, 2], *joined), ([10] * 4 + [20], [4, 1], *joined)]


def dealt(group, counts, trials):
    """counts[n][i][j]: what rank i sends to j; element k of it is 100 i + 10 j + k."""
    rank, answers = dist.get_rank(group), []
    for table in counts[:trials]:
        sizes = table[rank]
        x = torch.tensor([100 * rank + 10 * j + k for j, many in enumerate(sizes) for k in range(many)]).double()
        x.requires_grad_()
        (a, b), theirs = net.batch_all_to_all_v((x, x.detach().to(torch.bfloat16)), sizes, group)
        pull = tensor(len(a), dtype=torch.float64, seed=rank)
        (grad,) = torch.autograd.grad(a, x, pull)
        assert torch.equal(b, a.detach().to(torch.bfloat16))
        answers.append((a.detach().int().tolist(), theirs.tolist(), grad, pull))
    return answers


TABLES = st.lists(st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=4, max_size=4), min_size=3)


@settings(max_examples=5)
@given(tables=TABLES)
def test_every_element_arrives_and_its_gradient_returns(ranks, tables):
    answers = ranks(4).run(dealt, tables, 3)
    for n, table in enumerate(tables[:3]):
        for rank in range(4):
            arrived, theirs, grad, _ = answers[rank][n]
            assert arrived == [100 * i + 10 * rank + k for i in range(4) for k in range(table[i][rank])]
            assert theirs == [table[i][rank] for i in range(4)]
            # What rank j pulls at the elements that came from this rank.
            pulls = []
            for j in range(4):
                begin = sum(table[i][j] for i in range(rank))
                pulls.append(answers[j][n][3][begin : begin + table[rank][j]])
            assert torch.equal(grad, torch.cat(pulls))


def wrong(group):
    rank, x = dist.get_rank(group), torch.arange(3.0)
    return [
        caught(net.batch_all_to_all_v, [x], [1, 1], group),
        caught(net.batch_all_to_all_v, [x], [3], group),
        caught(net.batch_all_to_all_v, [x], [4, -1], group),
        caught(net.batch_all_to_all_v, [x, x[:2]], [1, 2], group),
        caught(net.batch_all_to_all_v, x, [1, 2], group),
        caught(net.batch_all_gather_v, [], group),
        # One rank alone is wrong, and the other is told.
        caught(net.batch_all_gather_v, [x, x[: 3 - rank]], group),
        caught(net.batch_all_gather_v, [x] * (1 + rank), group),
        caught(net.batch_all_gather_v, [x], group),
    ]


def test_what_is_refused(ranks):
    first, second = ranks(2).run(wrong)
    assert first[:6] == second[:6]
    assert first[0] == "InvalidValueError: batch_all_to_all_v: partition_sizes=[1, 1] add up to 2, not 3"
    assert "partition_sizes=[3], expected 2 counts" in first[1]
    assert "partition_sizes=[4, -1], expected 2 counts" in first[2]
    assert "the tensors have [3, 2] elements" in first[3]
    assert first[4] == "InvalidTypeError: batch_all_to_all_v: datas is Tensor, expected a list or tuple of tensors"
    assert "datas is empty" in first[5]
    assert first[6].startswith("RankFailedError: rank 1 failed before the exchange: InvalidValueError")
    assert "the tensors have [3, 2] elements" in second[6]
    assert first[7] == second[7]
    assert "rank 1 has how='float32,float32', rank 0 has how='float32'" in first[7]
    assert first[8] == second[8] == "fine"


def test_one_process():
    x = torch.arange(6).view(2, 3)
    [same], sizes = net.batch_all_to_all_v([x], [6])
    assert (same.tolist(), sizes.tolist()) == ([0, 1, 2, 3, 4, 5], [6])
    [same], sizes = net.batch_all_gather_v([x])
    assert (same.tolist(), sizes.tolist()) == ([0, 1, 2, 3, 4, 5], [6])
    assert "add up to 5, not 6" in caught(net.batch_all_to_all_v, [x], [5])
