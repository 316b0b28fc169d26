"""Every collective of the Tutel face against plain torch on one process: values, and gradients in a subgroup too."""

import pytest
import torch
import torch.distributed as dist

from tests.cases import tensor
from tests.comm.test_failures import caught
from tutelx.integrations.tutel import net

# Ranks 1 and 3 of four stand for a group that is not the world.
GROUPS = [(2, None), (4, (1, 3)), (4, None)]
EVERY_DTYPE = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.bool, torch.complex64]


def data(rank: int, *shape: int) -> torch.Tensor:
    return tensor(*shape, dtype=torch.float64, seed=20 + rank)


def weight(rank: int, shape) -> torch.Tensor:
    """What a rank's loss multiplies its result with."""
    return tensor(*shape, dtype=torch.float64, seed=70 + rank)


def expected_all_to_all(xs, input_dim, output_dim):
    if input_dim == output_dim and len({input_dim, 0}) > 1:
        return xs
    parts = [x.chunk(len(xs), output_dim) for x in xs]
    return [torch.cat([part[rank] for part in parts], input_dim) for rank in range(len(xs))]


def expected_gather(xs, dim):
    return [torch.cat(xs, dim)] * len(xs)


def expected_reduce_scatter(xs, dim):
    return list(sum(xs).chunk(len(xs), dim))


# Name: the call on one rank; all ranks' results, where the losses of all ranks are added up.
DIFFERENTIABLE = {
    "all_to_all_single": (lambda x, g: net.all_to_all_single(x, g), lambda xs: expected_all_to_all(xs, 0, 0)),
    **{
        f"all_to_all {i} {o} {named}": (
            lambda x, g, i=i, o=o, named=named: net.all_to_all(x, i, o, group=g, **dict.fromkeys(named, True)),
            lambda xs, i=i, o=o: expected_all_to_all(xs, i, o),
        )
        for i, o, named in [(1, 0, ()), (0, 1, ()), (2, 1, ()), (-1, 0, ()), (2, 2, ())]
    },
    **{
        f"all_to_all {i} {o} background": (
            lambda x, g, i=i, o=o: net.all_to_all(x, i, o, group=g, background=True)(),
            lambda xs, i=i, o=o: expected_all_to_all(xs, i, o),
        )
        for i, o in [(1, 0), (0, 1), (2, 1), (1, 1)]
    },
    **{
        f"all_gather {dim}": (
            lambda x, g, dim=dim: net.all_gather(x, dim, fused=True, group=g),
            lambda xs, dim=dim: expected_gather(xs, dim),
        )
        for dim in (0, 1, -1)
    },
    **{
        f"reduce_scatter {dim}": (
            lambda x, g, dim=dim: net.reduce_scatter(x, dim, group=g),
            lambda xs, dim=dim: expected_reduce_scatter(xs, dim),
        )
        for dim in (0, 1, 2)
    },
    "zero_gather": (lambda x, g: net.zero_gather(x, group=g), lambda xs: expected_gather(xs, 0)),
    "zero_gather full_shape": (
        lambda x, g: net.zero_gather(x, full_shape=(5, 7), group=g),
        lambda xs: [torch.cat(xs).flatten()[:35].view(5, 7)] * len(xs),
    ),
    "batch_all_gather_v": (
        lambda x, g: net.batch_all_gather_v([x[: 1 + dist.get_rank(g)]], g)[0][0],
        lambda xs: [torch.cat([x[: 1 + rank].flatten() for rank, x in enumerate(xs)])] * len(xs),
    ),
}


def gradients(group, names):
    rank, answers = dist.get_rank(group), []
    for name in names:
        x = data(rank, 4, 8, 4).requires_grad_()
        y = DIFFERENTIABLE[name][0](x, group)
        (grad,) = torch.autograd.grad((y * weight(rank, y.shape)).sum(), x)
        answers.append((y.detach(), grad))
    return answers


@pytest.mark.parametrize(("world", "members"), GROUPS)
def test_values_and_gradients(ranks, world, members):
    names = list(DIFFERENTIABLE)
    answers = ranks(world).run(gradients, names, ranks=members)
    for n, name in enumerate(names):
        xs = [data(rank, 4, 8, 4).requires_grad_() for rank in range(len(answers))]
        ys = DIFFERENTIABLE[name][1](xs)
        loss = sum((y * weight(rank, y.shape)).sum() for rank, y in enumerate(ys))
        for rank, grad in enumerate(torch.autograd.grad(loss, xs)):
            given = answers[rank][n]
            torch.testing.assert_close(given[0], ys[rank].detach(), msg=f"{name} of rank {rank}")
            torch.testing.assert_close(given[1], grad, msg=f"gradient of {name} of rank {rank}")


def replicated(group):
    """Every rank goes on with the same numbers: `whole` is the same on all ranks, and so is each rank's loss."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    part, whole = data(rank, 2, 3).requires_grad_(), data(9, 2 * world, 3).requires_grad_()
    split = net.spatial_split(whole, 0, group)
    split.mul_(2)  # may be changed in place
    joined = net.all_gather(part, 0, group=group)
    summed = net.allreduce_forward(part, group=group)
    mean = net.allreduce_forward(part, dist.ReduceOp.AVG, group)
    entered = net.allreduce_backward(whole, group=group)
    assert torch.equal(entered, whole)
    losses = [
        (split.square().sum(), whole),
        ((joined * weight(9, joined.shape)).sum(), part),
        ((summed * weight(9, summed.shape)).sum(), part),
        ((mean * weight(9, mean.shape)).sum(), part),
        ((entered * weight(rank, entered.shape)).sum(), whole),
    ]
    grads = [torch.autograd.grad(loss, x)[0] for loss, x in losses]
    return split.detach(), joined.detach(), summed.detach(), mean.detach(), grads


@pytest.mark.parametrize(("world", "members"), GROUPS)
def test_replicated_numbers(ranks, world, members):
    answers = ranks(world).run(replicated, ranks=members)
    size = len(answers)
    parts, whole = [data(rank, 2, 3) for rank in range(size)], data(9, 2 * size, 3)
    shares = weight(9, (2 * size, 3)).chunk(size)
    for rank, (split, joined, summed, mean, grads) in enumerate(answers):
        torch.testing.assert_close(split, 2 * whole[2 * rank : 2 * rank + 2])
        torch.testing.assert_close(joined, torch.cat(parts))
        torch.testing.assert_close(summed, sum(parts))
        torch.testing.assert_close(mean, sum(parts) / size)
        torch.testing.assert_close(grads[0], 8 * whole)  # of (2x)^2, gathered from all ranks
        torch.testing.assert_close(grads[1], shares[rank])
        torch.testing.assert_close(grads[2], weight(9, (2, 3)))
        torch.testing.assert_close(grads[3], weight(9, (2, 3)) / size)
        torch.testing.assert_close(grads[4], sum(weight(r, (2 * size, 3)) for r in range(size)))


def second_derivative(group):
    rank = dist.get_rank(group)
    x = data(rank, 2, 2).requires_grad_()
    y = net.all_to_all_single(x, group)
    (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    return torch.autograd.grad(first.sum(), x)[0]


def test_gradients_of_gradients(ranks):
    for rank, second in enumerate(ranks(2).run(second_derivative)):
        torch.testing.assert_close(second, 6 * data(rank, 2, 2))  # x goes there and back


def numbers(group):
    """By hand: rank r holds [r, 10 + r]."""
    rank = dist.get_rank(group)
    x = torch.tensor([rank, 10 + rank])
    kept = x.clone()
    first = dist.get_process_group_ranks(group)[0]
    values = {
        "broadcast": net.simple_broadcast(x.clone(), first, group),
        "broadcast of a column": net.simple_broadcast(torch.stack([x, x]).T[:1], first, group),
        "sum": net.simple_all_reduce(x, group),
        "max": net.simple_all_reduce(x, group, dist.ReduceOp.MAX),
        "all_to_all": net.simple_all_to_all(x, group),
        "split": net.simple_split(x, group).clone(),  # a view, of what changes below
        "reduce_scatter": net.simple_reduce_scatter(x, group),
        "product": net.simple_reduce_scatter(x, group, dist.ReduceOp.PRODUCT),
        "gather": net.simple_all_gather(x, group),
        "gather numbers": net.simple_all_gather(x[0], group),
        "mean": net.simple_all_reduce(x.double(), group, dist.ReduceOp.AVG),
    }
    assert torch.equal(x, kept), "the input stays what it was"
    assert net.simple_all_reduce(x, group, inplace=True) is x
    column = torch.stack([kept, kept]).T[0]
    net.simple_all_reduce(column, group, inplace=True)
    output, wait = net.simple_all_to_all(kept, group, background=True)
    wait()
    net.barrier(group)
    values |= {"in place": x, "column in place": column, "background": output}
    return {name: value.tolist() for name, value in values.items()}


@pytest.mark.parametrize("members", [None, (1, 2)])
def test_by_hand(ranks, members):
    answers = ranks(2 if members is None else 4).run(numbers, ranks=members)
    for rank, given in enumerate(answers):
        assert given == {
            "broadcast": [0, 10],
            "broadcast of a column": [[0, 0]],
            "sum": [1, 21],
            "max": [1, 11],
            "all_to_all": [[0, 1], [10, 11]][rank],
            "split": [[0], [11]][rank],
            "reduce_scatter": [[1], [21]][rank],
            "product": [[0], [110]][rank],
            "gather": [0, 10, 1, 11],
            "gather numbers": [0, 1],
            "mean": [0.5, 10.5],
            "in place": [1, 21],
            "column in place": [1, 1],
            "background": [[0, 1], [10, 11]][rank],
        }


def other_dtypes(group):
    rank = dist.get_rank(group)
    for dtype in EVERY_DTYPE:
        x = torch.arange(4).add(4 * rank).to(dtype)
        moved = net.simple_all_to_all(x, group)
        assert torch.equal(moved, torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7]])[rank].to(dtype)), dtype
        assert torch.equal(net.simple_all_gather(x, group), torch.arange(8).to(dtype)), dtype
        if dtype.is_floating_point:
            assert torch.equal(net.simple_all_reduce(x, group), (torch.arange(4) * 2 + 4).to(dtype)), dtype
            half = (torch.arange(4) * 2 + 4).to(dtype).chunk(2)[rank]
            assert torch.equal(net.simple_reduce_scatter(x, group), half), dtype
    # A rank without tokens, T = 0.
    nothing = torch.zeros(0, 3, requires_grad=True)
    for y in (
        net.all_to_all_single(nothing, group),
        net.all_to_all(nothing, 1, 0, group=group),
        net.all_gather(nothing, 0, fused=True, group=group),
        net.reduce_scatter(nothing, 0, group),
        net.simple_all_reduce(nothing, group),
    ):
        assert y.numel() == 0
        assert torch.autograd.grad(y.sum(), nothing)[0].shape == (0, 3)


def test_every_dtype_and_no_tokens(ranks):
    ranks(2).run(other_dtypes)


def hierarchical(group, per_node):
    rank, answers = dist.get_rank(group), []
    for dtype in (torch.float64, torch.bfloat16, torch.bool):
        x = data(rank, 8, 4, 3).gt(0) if dtype == torch.bool else data(rank, 8, 4, 3).to(dtype)
        x.requires_grad_(dtype.is_floating_point)
        linear = net.all_to_all(x, 1, 0, group=group)
        twice = net.all_to_all(x, 1, 0, group=group, use_2dh=True)
        later = net.all_to_all(x, 1, 0, group=group, use_2dh=True, background=True)()
        assert torch.equal(linear, twice)
        assert torch.equal(linear, later)
        if x.requires_grad:
            pull = weight(rank, linear.shape).to(dtype)
            answers.append([torch.autograd.grad(y, x, pull)[0] for y in (linear, twice)])
    return answers


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_2dh_gives_the_bits_of_linear(ranks, variable):
    for answer in ranks(4).run(with_variable, hierarchical, variable, "2"):
        for linear, twice in answer:
            assert torch.equal(linear, twice)


def with_variable(group, job, name, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOCAL_WORLD_SIZE", raising=False)
        patch.setenv(name, value)
        return job(group, value)


def nodes_unknown(group):
    return caught(net.all_to_all, torch.zeros(2, 2), 1, 0, group=group, use_2dh=True)


def test_2dh_never_falls_back(ranks):
    assert all("2dh' needs the ranks per node" in text for text in ranks(2).run(nodes_unknown))
