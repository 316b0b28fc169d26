"""Gradients of many ranks against one process that holds all experts."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from tests.parallel.models import Model, grid, loss_of, reference, whole_gradients
from tests.tolerance import assert_close
from tutelx import parallel
from tutelx.errors import InvalidTypeError, InvalidValueError


def compare(given: dict[str, torch.Tensor], expected: torch.nn.Module) -> None:
    wanted = {name: parameter.grad for name, parameter in expected.named_parameters()}
    assert given.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(given[name], gradient, what=name)


def groups(group, columns):
    """The ranks that hold the experts, and those that hold copies of this rank's; None where it is all of them."""
    if columns is None:
        return group, None
    mesh = grid(4 // columns, columns)
    return mesh["experts"].get_group(), mesh["replicas"]


def trained(group, how, experts, columns, steps):
    spread, replicas = groups(group, columns)
    model = Model(spread, experts)
    rank = dist.get_rank(group)
    if how == "ddp":
        model = parallel.data_parallel(model, group=group, replicas=replicas)
    elif how == "fsdp":
        parallel.average_expert_gradients(model, group=group, replicas=replicas)
        fully_shard(model.before, mesh=grid(4, 1)["replicas"])
        own = set(parallel.expert_parameters(model))
        fully_shard(model, mesh=grid(4, 1)["replicas"], ignored_params=own)
    for step in range(steps):
        if how == "ddp" and step + 1 < steps:
            with model.no_sync():
                loss_of(model, rank, step).backward()
        else:
            loss_of(model, rank, step).backward()
    if how == "by hand":
        parallel.sync_gradients(model, group=group, replicas=replicas)
    return whole_gradients(model)


@pytest.mark.parametrize("how", ["ddp", "fsdp", "by hand"])
@pytest.mark.parametrize(
    ("experts", "columns"),
    [(2, None), (6, None), (3, None), (4, 2), (1, 2)],
    ids=["sliced", "uneven", "an idle rank", "inside two nodes", "sliced inside two nodes"],
)
def test_gradients_are_those_of_the_mean_loss(ranks, how, experts, columns):
    expected = reference(experts, 4)
    for given in ranks(4).run(trained, how, experts, columns, 1):
        compare(given, expected)


@pytest.mark.parametrize("how", ["ddp", "by hand"])
def test_two_steps_accumulate(ranks, how):
    expected = reference(4, 4, steps=2)
    for given in ranks(4).run(trained, how, 4, 2, 2):
        compare(given, expected)


@pytest.mark.parametrize("how", ["ddp", "by hand"])
def test_a_group_that_is_not_the_world(ranks, how):
    expected = reference(4, 2)
    for given in ranks(4).run(trained, how, 4, None, 1, ranks=(1, 3)):
        compare(given, expected)


def unfrozen(group):
    model = Model(group, 4)
    model.experts.up.requires_grad_(False)
    wrapped = parallel.data_parallel(model)
    model.experts.up.requires_grad_(True)
    model.experts.down = torch.nn.Parameter(model.experts.down.detach().clone())
    loss_of(wrapped, dist.get_rank()).backward()
    return whole_gradients(model)


def test_parameters_that_are_unfrozen_or_replaced_are_averaged_too(ranks):
    for given in ranks(4).run(unfrozen):
        compare(given, reference(4, 4))


def replicas_start_alike(group):
    model = Model(grid(2, 2)["experts"].get_group(), 4)
    with torch.no_grad():
        for parameter in model.experts.parameters():
            parameter.fill_(dist.get_rank())
    parallel.data_parallel(model, replicas=grid(2, 2)["replicas"])
    return {parameter.unique().item() for parameter in model.experts.parameters()}


def test_replicas_start_with_the_values_of_the_first(ranks):
    # Ranks 0 and 2 hold the same experts, and 1 and 3.
    assert ranks(4).run(replicas_start_alike) == [{0.0}, {1.0}, {0.0}, {1.0}]


def missing_gradients(group):
    model = Model(group, 4)
    rank = dist.get_rank()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is not model.after.bias)
    if rank == 2:
        model.before.weight.grad = torch.full_like(model.before.weight, 8.0)
    parallel.sync_gradients(model)
    return model.before.weight.grad.unique().tolist(), model.before.bias.grad is None, model.after.bias.grad is None


def test_a_gradient_that_one_rank_lacks_counts_as_zero(ranks):
    assert ranks(4).run(missing_gradients) == [([2.0], True, True)] * 4


def misuse(group):
    def said(function, *args, **kwargs):
        with pytest.raises((InvalidValueError, InvalidTypeError)) as error:
            function(*args, **kwargs)
        return str(error.value)

    mesh = grid(2, 2)
    inside = Model(mesh["experts"].get_group(), 4)
    twice = Model(group, 4)
    parallel.average_expert_gradients(twice)
    sparse = Model(group, 4)
    sparse.before.weight.grad = torch.zeros(3, 3).to_sparse()
    return [
        said(parallel.data_parallel, inside),
        said(parallel.data_parallel, Model(group, 4), group=mesh["experts"]),
        said(parallel.data_parallel, inside, replicas=mesh["experts"]),
        said(parallel.data_parallel, inside, replicas=mesh),
        said(parallel.data_parallel, inside, replicas="all"),
        said(parallel.average_expert_gradients, twice),
        said(parallel.sync_gradients, twice),
        said(copy.deepcopy, twice),
        said(parallel.sync_gradients, sparse),
        said(parallel.expert_parameters, "model"),
        said(parallel.sync_gradients, Model(group, 4) if dist.get_rank() else torch.nn.Linear(3, 3)),
    ]


def test_misuse_names_both_sides_and_hangs_nobody(ranks):
    patterns = [
        r"experts.up lies on 2 ranks, but the group has 4: give replicas",
        r"experts.up lies on the ranks \[0, 1, 2, 3\], but the group has the ranks \[0, 1\]",
        r"experts.up lies on the ranks \[0, 1\] and replicas are the ranks \[0, 1\], which together do not make up",
        r"replicas has shape \(2, 2\), expected one dimension",
        "replicas is str, expected DeviceMesh, ProcessGroup or None",
        "the gradients of this model's experts are averaged already",
        "the gradients of this model's experts are averaged already",
        "cannot be copied",
        "a gradient is torch.sparse_coo, expected torch.strided",
        "model is str, expected torch.nn.Module",
        # 3*3 + 3 of the first layer; with the last one 3*2 + 2 more.
        "this rank has 2 replicated parameters of 12 elements, but the group's ranks have between 2 of 12 and 4 of 20",
    ]
    for pattern, message in zip(patterns, ranks(4).run(misuse)[0], strict=True):
        assert re.search(pattern, message)


def test_every_parameter_is_of_one_kind():
    model = Model(None, 4)
    assert parallel.expert_parameters(model) == []
    assert parallel.replicated_parameters(model) == list(model.parameters())
    with pytest.raises(InvalidValueError, match=r"torch.distributed is not initialised"):
        parallel.sync_gradients(model)


def kinds(group):
    model = Model(group, 4)
    own, shared = parallel.expert_parameters(model), parallel.replicated_parameters(model)
    assert {id(p) for p in own} == {id(p) for p in model.experts.parameters()}
    assert {id(p) for p in own} | {id(p) for p in shared} == {id(p) for p in model.parameters()}
    return len(own), len(shared)


def test_experts_are_told_from_the_rest(ranks):
    assert ranks(4).run(kinds) == [(4, 4)] * 4
