"""Who stands where, groups of groups, and what ranks are told when one of them is wrong, different or lost."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from tests.comm.test_failures import caught
from tests.ranks import Ranks
from tutelx.integrations.tutel import net


def divided(group, counts):
    found = []
    for count in counts:
        env = net.create_groups_from_world(count)
        assert env is net.create_groups_from_world(count), "the same object"
        sums = []
        for part in (env.model_group, env.data_group):
            sums.append(int(net.simple_all_reduce(torch.tensor([10 ** dist.get_rank()]), part)))
        found.append(
            (env.group_count, env.data_rank, env.model_size, env.model_rank, *sums, env.global_rank, env.is_distributed)
        )
    return found


def test_groups_of_the_world(ranks):
    answers = ranks(4).run(divided, [1, 2, 4, -1, -2, -4])
    for rank, found in enumerate(answers):
        one = (1, 0, 4, rank, 1111, 10**rank, rank, True)
        # Neighbours 0 1 | 2 3, and across 0 2 | 1 3.
        two = (2, rank // 2, 2, rank % 2, [11, 1100][rank // 2], [101, 1010][rank % 2], rank, True)
        four = (4, rank, 1, 0, 10**rank, 1111, rank, True)
        assert found == [one, two, four, four, two, one]


def nested(group):
    """Ranks 0, 2 and 3 are not asked for what only 1 and 3 divide."""
    env = net.create_groups_from_world(2, parent_group=group)
    whole = net.create_groups_from_world(-2, parent_group=group)
    assert whole.model_group is group
    alone = net.create_standalone_group()
    x = torch.tensor([10 ** dist.get_rank()])
    sums = [int(net.simple_all_reduce(x, part)) for part in (env.model_group, env.data_group, group, alone)]
    return sums, env.global_rank, env.model_size, env.data_rank, net.get_world_size(alone), net.get_world_rank(alone)


def test_groups_of_a_group(ranks):
    assert ranks(4).run(nested, ranks=(1, 3)) == [
        ([10, 1010, 1010, 10], 1, 1, 0, 1, 0),
        ([1000, 1010, 1010, 1000], 3, 1, 1, 1, 0),
    ]


def refused(group):
    rank, x = dist.get_rank(), torch.zeros(4, 3)
    texts = [
        caught(net.create_groups_from_world, 3),
        caught(net.create_groups_from_world, -3),
        caught(net.create_groups_from_world, 0),
        caught(net.create_groups_from_world, True),
        caught(net.create_groups_from_world, 1, "mpi"),
        caught(net.create_groups_from_world, 1, "nccl"),
        caught(net.simple_all_to_all, x[:3], group),
        caught(net.simple_split, x[:3], group),
        caught(net.simple_reduce_scatter, x[:3], group),
        caught(net.all_to_all, x, 0, 1, group=group),
        caught(net.all_to_all, x, 2, 0, group=group),
        caught(net.all_gather, x, 2, group=group),
        caught(net.spatial_split, x, "0", group),
        caught(net.simple_broadcast, x, 7, group),
        caught(net.simple_all_reduce, None, group),
        caught(net.simple_all_gather, x, "the world"),
        caught(net.zero_gather, x, (100, 1), group),
        caught(net.allreduce_forward, x.requires_grad_(), dist.ReduceOp.MAX, group),
    ]
    part = net.create_groups_from_world(2).model_group
    theirs = dist.group.WORLD if rank < 0 else part
    return texts, net.get_world_size(theirs)


def test_what_is_refused(ranks):
    answers = ranks(4).run(refused)
    texts, size = answers[0]
    assert all(other == answers[0] for other in answers)
    assert size == 2
    wanted = [
        "InvalidValueError: group_count=3 does not divide 4 ranks",
        "InvalidValueError: group_count=-3 does not divide 4 ranks",
        "InvalidValueError: group_count=0 does not divide 4 ranks",
        "InvalidTypeError: group_count=True is bool, expected int",
        "InvalidValueError: backend='mpi', expected one of 'nccl', 'gloo'",
        "InvalidValueError: backend='nccl' needs a GPU",
        "InvalidValueError: simple_all_to_all: dimension 0 of shape (3, 3) does not divide among 4 ranks",
        "InvalidValueError: simple_split: dimension 0 of shape (3, 3) does not divide among 4 ranks",
        "InvalidValueError: simple_reduce_scatter: dimension 0 of shape (3, 3) does not divide among 4 ranks",
        "InvalidValueError: all_to_all: dimension 1 of shape (4, 3) does not divide among 4 ranks",
        "InvalidValueError: all_to_all: dim=2, but the input has shape (4, 3)",
        "InvalidValueError: all_gather: dim=2, but the input has shape (4, 3)",
        "InvalidTypeError: spatial_split: dim='0' is str, expected int",
        "InvalidValueError: simple_broadcast: src=7 is not in the group (0, 1, 2, 3)",
        "InvalidTypeError: simple_all_reduce: input is NoneType, expected torch.Tensor",
        "InvalidTypeError: mesh is str",
        "InvalidValueError: zero_gather: full_shape=(100, 1), but the ranks hold 48 elements",
        "InvalidValueError: allreduce_forward: op=MAX has no gradient here, expected SUM or AVG",
    ]
    if torch.cuda.is_available():
        wanted[5] = "InvalidValueError: backend='nccl', but torch.distributed is initialised with"
    for text, start in zip(texts, wanted, strict=True):
        assert text.startswith(start)


def differing(group):
    """Rank 1 calls on other terms; afterwards the group is as good as before."""
    odd = dist.get_rank(group) == 1
    x = torch.ones(4, 2)
    texts = [
        caught(net.simple_all_gather, torch.ones(3, 2) if odd else x, group),
        caught(net.simple_all_reduce, x.double() if odd else x, group),
        caught(net.simple_all_reduce, x.view(2, 4) if odd else x, group),
        caught(net.simple_all_reduce, x, group, dist.ReduceOp.MAX if odd else dist.ReduceOp.SUM),
        caught(net.simple_all_to_all if odd else net.simple_all_gather, x, group),
        caught(net.simple_broadcast, x, 1 if odd else 0, group),
        caught(net.simple_all_to_all, x[:3] if odd else x, group),
        caught(net.barrier, group) if odd else caught(net.simple_all_gather, x, group),
    ]
    return texts, net.simple_all_reduce(x, group).sum().item()


def test_ranks_that_differ(ranks):
    first, second = ranks(2).run(differing)
    terms = [
        "rank 1 has elements=6, rank 0 has elements=8; rank 1 has shape='(3, 2)', rank 0 has shape='(4, 2)'",
        "rank 1 has dtype='float64', rank 0 has dtype='float32'",
        "rank 1 has shape='(2, 4)', rank 0 has shape='(4, 2)'",
        "rank 1 has how='MAX', rank 0 has how='SUM'",
        "rank 1 has call='simple_all_to_all', rank 0 has call='simple_all_gather'",
        "rank 1 has how='src=1', rank 0 has how='src=0'",
    ]
    for n, text in enumerate(terms):
        assert first[0][n] == second[0][n] == f"RankMismatchError: {text}"
    assert first[0][6].startswith(
        "RankFailedError: rank 1 failed before the exchange: InvalidValueError: simple_all_to"
    )
    assert second[0][6].startswith("InvalidValueError: simple_all_to_all: dimension 0 of shape (3, 2)")
    assert "rank 1 has call='barrier', rank 0 has call='simple_all_gather'" in first[0][7]
    assert first[1] == second[1] == 16.0


def dying(group):
    if dist.get_rank(group) == 1:
        os._exit(3)
    return caught(net.simple_all_reduce, torch.ones(2), group)


def test_a_rank_that_dies_is_named():
    world = Ranks(2, timeout=20)
    try:
        assert world.run(dying, dying=(1,))[0].startswith("RankFailedError: rank 1 did not take part")
    finally:
        world.stop()


def test_a_process_by_itself():
    code = """
import torch
from tutelx.integrations.tutel import net
env = net.create_groups_from_world(group_count=1, include_init="gloo")
assert net.create_groups_from_world(1) is env
x = torch.arange(4.0).requires_grad_()
assert (env.global_size, env.global_rank, env.local_rank, env.local_size, env.model_size) == (1, 0, 0, 1, 1)
assert (env.is_distributed, env.is_cuda, env.model_group, env.local_device) == (False, False, None, torch.device("cpu"))
assert net.create_standalone_group() is None and net.get_world_size() == 1 and net.get_world_rank() == 0
net.barrier()
y = net.all_to_all(net.all_gather(x.view(2, 2), 1), 1, 0)
y = net.reduce_scatter(net.zero_gather(net.spatial_split(y, 0)), 0)
y = net.allreduce_backward(net.allreduce_forward(net.all_to_all_single(y)))
assert net.all_to_all(y, 1, 0, background=True)() is y and net.all_to_all(y, 1, 0, use_2dh=True) is y
y.sum().backward()
assert x.grad.tolist() == [1, 1, 1, 1]
assert net.simple_all_to_all(x, background=True)[0] is x
env.dist_print("printed", end="!")
"""
    variables = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "printed!", "")


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "MASTER_ADDR is not set, and mpiexec started 2 r"),
        ({"OMPI_COMM_WORLD_SIZE": "two"}, "OMPI_COMM_WORLD_SIZE='two' is no positive integer"),
    ],
)
def test_half_a_launch(monkeypatch, variables, text):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert text in caught(net.create_groups_from_world, 1, "gloo")
