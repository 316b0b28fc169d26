"""Checkpoints that outlive the number of ranks: saved on two, loaded on one, three and four, bit for bit."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from tests.comm.shard_modules import parts, whole_tensors
from tests.parallel.models import Model, grid, loss_of
from tutelx import parallel
from tutelx.comm.shards import shards_of
from tutelx.errors import InvalidValueError

FULL = StateDictOptions(full_state_dict=True)


def adam(model: Model) -> torch.optim.Optimizer:
    return torch.optim.Adam(
        [{"params": model.experts.parameters(), "lr": 0.1}, {"params": model.before.parameters(), "lr": 0.01}]
    )


def stepped(group, experts: int):
    """A model and its optimizer after one step with known gradients, which are the same for any number of ranks."""
    model = Model(group, experts)
    optimizer = adam(model)
    whole = whole_tensors(experts, seed=5)
    world, rank = (1, 0) if group is None else (group.size(), group.rank())
    for name, gradient in parts(whole, world, rank).items():
        getattr(model.experts, name).grad = gradient.clone()
    for parameter in model.before.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def expected(experts: int) -> dict[str, torch.Tensor]:
    return flat(*stepped(None, experts))


def flat(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What this rank holds of parameters and optimizer state, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}.{key}"] = value
    return found


def save(group, experts, folder):
    model, optimizer = stepped(group, experts)
    state = {"model": model.state_dict(), "optimizer": parallel.optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder, process_group=group)


def load(group, experts, folder):
    model = Model(group, experts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer = adam(model)
    state = {"model": model.state_dict(), "optimizer": parallel.optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder, process_group=group)
    model.load_state_dict(state["model"])
    before = copy.deepcopy(state["optimizer"]["param_groups"])
    parallel.load_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert state["optimizer"]["param_groups"] == before
    assert [each["lr"] for each in optimizer.param_groups] == [0.1, 0.01]
    for value in flat(model, optimizer).values():
        assert value.untyped_storage().nbytes() == value.nbytes, "no view of what other ranks hold"
    return flat(model, optimizer)


def check(found: dict[str, torch.Tensor], experts: int, world: int, rank: int) -> None:
    wanted = expected(experts)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name.startswith("experts.") and value.dim():
            _, parameter, *_ = name.split(".")
            every = {
                key: wanted[name] if key == parameter else tensor for key, tensor in whole_tensors(experts).items()
            }
            value = parts(every, world, rank)[parameter]
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("experts", [1, 6])
def test_saved_on_two_loaded_on_others(ranks, tmp_path, experts):
    ranks(4).run(save, experts, str(tmp_path), ranks=(0, 1))
    check(load(None, experts, str(tmp_path)), experts, 1, 0)
    for members in [(0, 1, 2), (0, 1, 2, 3), (1, 3)]:
        for rank, found in enumerate(ranks(4).run(load, experts, str(tmp_path), ranks=members)):
            check(found, experts, len(members), rank)


def test_saved_on_four_of_which_one_is_idle_loaded_on_one(ranks, tmp_path):
    ranks(4).run(save, 3, str(tmp_path))
    check(load(None, 3, str(tmp_path)), 3, 1, 0)


def save_replicated(group, folder):
    model = Model(grid(2, 2)["experts"].get_group(), 4)
    dcp.save({"model": parallel.data_parallel(model, replicas=grid(2, 2)["replicas"]).module.state_dict()},
             checkpoint_id=folder)  # fmt: skip


def test_replicas_are_saved_once(ranks, tmp_path):
    ranks(4).run(save_replicated, str(tmp_path))
    model = Model(None, 4)
    wanted = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    dcp.load({"model": model.state_dict()}, checkpoint_id=str(tmp_path))
    for name, value in model.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    stored = sum(file.stat().st_size for file in tmp_path.glob("*.distcp"))
    # Twice the experts would be over this: the file's own overhead is about 1 kB a tensor.
    sizes = dcp.FileSystemReader(tmp_path).read_metadata().storage_data.values()
    assert stored == sum(entry.length for entry in sizes)
    assert len(sizes) == sum(2 if name.startswith("experts.") else 1 for name in wanted)


def full_states(group, experts):
    model, optimizer = stepped(group, experts)
    wrapped = parallel.data_parallel(model, group=group)
    found = get_model_state_dict(wrapped, options=FULL)
    states = parallel.optimizer_state_dict(wrapped, optimizer, full=True)
    return found, states


def load_full(group, experts, model_state, optimizer_state, broadcast):
    model = Model(group, experts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer = adam(model)
    wrapped = parallel.data_parallel(model, group=group)
    if broadcast:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(wrapped, model_state if dist.get_rank(group) == 0 else {}, options=options)
    else:
        set_model_state_dict(wrapped, model_state, options=FULL)
    parallel.load_optimizer_state_dict(wrapped, optimizer, optimizer_state)
    return flat(model, optimizer)


@pytest.mark.parametrize("experts", [2, 6])
def test_full_state_dicts_go_out_and_in(ranks, experts):
    wanted = expected(experts)
    for model_state, optimizer_state in ranks(4).run(full_states, experts):
        for name, value in model_state.items():
            assert torch.equal(value, wanted[name]), name
        for name, values in optimizer_state["state"].items():
            for key, value in values.items():
                assert torch.equal(value, wanted[f"{name}.{key}"]), (name, key)
    for broadcast in (False, True):
        for rank, found in enumerate(ranks(4).run(load_full, experts, model_state, optimizer_state, broadcast)):
            check(found, experts, 4, rank)


def odd_state(group):
    model = Model(group, 8)
    optimizer = adam(model)
    loss_of(model, dist.get_rank()).backward()
    optimizer.step()
    optimizer.state[model.experts.up]["rows"] = torch.zeros(2, 5)
    with pytest.raises(InvalidValueError, match=r"experts.up: rows has shape \(2, 5\), its parameter \(2, 5, 3\): how"):
        parallel.optimizer_state_dict(model, optimizer)
    del optimizer.state[model.experts.up]["rows"]
    state = parallel.optimizer_state_dict(model, optimizer)
    state["state"]["experts.up"]["exp_avg"] = model.experts.up.detach()
    with pytest.raises(InvalidValueError, match=r"experts.up: exp_avg: a tensor of shape \(2, 5, 3\) was given, expec"):
        parallel.load_optimizer_state_dict(model, optimizer, state)
    assert shards_of(model)["experts.up"].shape == (8, 5, 3)


def test_a_state_of_unknown_shape_is_an_error(ranks):
    ranks(4).run(odd_state)
