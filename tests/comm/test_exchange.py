"""The all-to-all itself: every row arrives, in the order of the ranks that sent it, in every dtype, on both ways."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import DTYPES
from tests.comm.test_failures import caught
from tutelx.comm._library import native
from tutelx.comm.call import node_groups, targets
from tutelx.comm.mesh import as_mesh
from tutelx.comm.placement import Placement

# counts[i][j]: rows from rank i to rank j.
COUNTS = [
    [[1, 2, 0, 3], [0, 0, 0, 0], [4, 1, 1, 0], [2, 0, 5, 1]],
    [[0] * 4] * 4,
    [[2] * 4] * 4,
    [[0, 0, 0, 7], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
]


def rows(source, counts, dtype):
    """Row n from i to j is [i, j, n]."""
    found = [[source, to, n] for to, many in enumerate(counts[source]) for n in range(many)]
    return torch.tensor(found, dtype=dtype).reshape(-1, 3)


def exchanged(group, ranks_per_node, dtype):
    rank = dist.get_rank(group)
    mesh = as_mesh(group, ranks_per_node=ranks_per_node or 1)
    exchange = native.Exchange(group, *(node_groups(mesh) if ranks_per_node else ()))
    return [exchange.all_to_all(rows(rank, counts, dtype), counts) for counts in COUNTS], exchange.bytes_sent


@pytest.mark.parametrize("ranks_per_node", [None, 1, 2, 4])
def test_every_row_arrives_in_order(ranks, ranks_per_node):
    for dtype in [*DTYPES, torch.int32]:
        answers = ranks(4).run(exchanged, ranks_per_node, dtype)
        for rank, (tables, sent) in enumerate(answers):
            for counts, arrived in zip(COUNTS, tables):
                wanted = [[i, rank, n] for i in range(4) for n in range(counts[i][rank])]
                assert arrived.tolist() == wanted
                assert arrived.dtype == dtype
            if ranks_per_node is None:
                away = sum(many for counts in COUNTS for to, many in enumerate(counts[rank]) if to != rank)
                assert sent == away * 3 * arrived.element_size()


def refused(group):
    exchange = native.Exchange(group)
    x = torch.zeros(3, 2)
    return [
        caught(exchange.all_to_all, x, [[1, 1], [1, 1]]),
        caught(exchange.all_to_all, x, [[3, 0]]),
        caught(exchange.all_to_all, x, [[3], [0]]),
        caught(native.Exchange, group, group, group),
    ]


def test_refuses(ranks):
    for answers in ranks(2).run(refused):
        assert answers[0].startswith("ValueError: rows.size(0)=3 differs from the rows to send=2")
        assert answers[1].startswith("ValueError: counts has 1 rows, expected 2")
        assert answers[2].startswith("ValueError: counts[0] has 1 entries, expected 2")
        assert answers[3].startswith("ValueError: 2dh needs 2 ranks a node x 2 nodes, the group has 2")


def test_traffic_refuses():
    kept, everyone = torch.ones(2, 3, dtype=torch.int32), torch.zeros(3, 2, 1, dtype=torch.int32)
    assert native.Traffic(kept, everyone, 0, 0, 3, 2, True).rows_sent(0) == 0  # one row in two chunks: 0, then 1
    for change, message in (
        ({"kept": kept.long()}, "kept is Long, expected Int"),
        ({"targets": everyone + 2}, "target 2 is outside"),
        ({"chunks": 0}, "chunks=0 must be at least 1"),
        ({"num_local": 4}, "do not lie within"),
        ({"rank": 2}, "rank=2 is outside"),
        ({"kept": -kept}, "kept holds -1"),
    ):
        given = {"kept": kept, "targets": everyone, "rank": 0, "first": 0, "num_local": 3, "chunks": 2, **change}
        with pytest.raises((ValueError, TypeError), match=message):
            native.Traffic(*given.values(), True)


@given(
    world=st.integers(1, 6),
    num_experts=st.integers(1, 6),
    chunks=st.integers(1, 5),
    data=st.data(),
)
def test_what_is_sent_is_what_arrives(world, num_experts, chunks, data):
    placed = Placement(num_experts=num_experts, hidden_dim=8, world=world)
    degree = data.draw(st.sampled_from(placed.degrees()[1:]))
    drawn = data.draw(st.lists(st.integers(0, 9), min_size=world * num_experts, max_size=world * num_experts))
    kept = torch.tensor(drawn, dtype=torch.int32).reshape(world, num_experts)
    traffics = []
    for rank in range(world):
        own = placed.experts_of(rank)
        traffics.append(native.Traffic(kept, targets(placed, degree), rank, own.start, len(own), chunks, False))
    for chunk in range(chunks):
        assert sum(t.rows_sent(chunk) for t in traffics) == sum(t.rows_received(chunk) for t in traffics)
    for rank, t in enumerate(traffics):
        assert sum(t.rows_sent(chunk) for chunk in range(chunks)) == int(kept[rank].sum()) * degree
        origin, place = (order.long() for order in t.send_order())
        assert torch.equal(origin[place], torch.arange(len(place)))
        computed = torch.stack([t.segments(chunk)[0] for chunk in range(chunks)]).sum(0)
        for e, n in zip(placed.experts_of(rank), computed.tolist()):
            assert n == sum(int(kept[w, e]) for w in range(world) if rank in placed.targets(e, w, degree))
