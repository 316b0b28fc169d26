"""Each rank's part of the experts, and state dicts that carry the whole."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from tests.comm.shard_modules import LocalExperts, parts, whole_tensors
from tutelx.comm.mesh import Mesh
from tutelx.comm.placement import Placement
from tutelx.comm.shards import Shard, hold_shards
from tutelx.errors import InvalidTypeError, InvalidValueError

# Experts on four ranks: one expert in four slices, two in two, uneven with an idle rank, uneven, even.
EXPERTS = [1, 2, 3, 6, 8]


def same(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(given[name], tensor), name


def gathered(group, experts):
    module = LocalExperts(group, experts)
    state = module.state_dict()
    assert all(isinstance(value, DTensor) for value in state.values())
    shared = all(state[name].to_local().data_ptr() == p.data_ptr() for name, p in module.named_parameters())
    kept = module.state_dict(keep_vars=True)
    assert all(kept[name] is parameter for name, parameter in module.named_parameters())
    return shared, {name: value.full_tensor() for name, value in state.items()}


@pytest.mark.parametrize("experts", EXPERTS)
def test_a_state_dict_gathers_to_the_whole(ranks, experts):
    for shared, state in ranks(4).run(gathered, experts):
        assert shared, "a state dict holds no copies"
        same(state, whole_tensors(experts))


def test_a_group_that_is_not_the_world(ranks):
    for _, state in ranks(4).run(gathered, 1, ranks=(1, 3)):
        same(state, whole_tensors(1))


def loaded(group, experts, source):
    module = LocalExperts(group, experts, seed=1)
    whole = whole_tensors(experts)
    if source == "same":
        whole = LocalExperts(group, experts).state_dict()
    elif source == "elsewhere":
        mesh = init_device_mesh("cpu", (4,))
        whole = {name: distribute_tensor(tensor, mesh, [Replicate()]) for name, tensor in whole.items()}
    before = {name: id(parameter) for name, parameter in module.named_parameters()}
    module.load_state_dict(whole, assign=source == "assigned")
    assert source == "assigned" or before == {name: id(parameter) for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    return dict(module.named_parameters())


@pytest.mark.parametrize("source", ["plain", "assigned", "same", "elsewhere"])
@pytest.mark.parametrize("experts", [2, 3])
def test_each_rank_keeps_its_part_of_what_is_loaded(ranks, experts, source):
    for rank, state in enumerate(ranks(4).run(loaded, experts, source)):
        same(state, parts(whole_tensors(experts), 4, rank))


def wrong_shape(group):
    module = LocalExperts(group, 8)
    with pytest.raises(RuntimeError, match=r"up: a tensor of shape \(2, 5, 3\) was given, expected .* \(8, 5, 3\)"):
        module.load_state_dict({name: parameter.detach() for name, parameter in module.named_parameters()})
    module.up = torch.nn.Parameter(module.state_dict()["up"])
    with pytest.raises(InvalidTypeError, match="up is this rank's own, but something has distributed it again"):
        module.state_dict()


def test_a_part_is_not_taken_for_the_whole(ranks):
    ranks(4).run(wrong_shape)


def test_what_is_declared_must_be_held():
    mesh = Mesh(group=None, rank=1, world=4, ranks_per_node=None, origin="")
    placement = Placement(num_experts=8, hidden_dim=5, world=4)
    module = torch.nn.Module()
    module.up = torch.nn.Parameter(torch.zeros(3, 5, 3))
    with pytest.raises(InvalidValueError, match=r"up has shape \(3, 5, 3\), but rank 1 of 4 holds \(2, 5, 3\)"):
        hold_shards(module, {"up": Shard(mesh=mesh, placement=placement, shape=(8, 5, 3), sliced_dim=1)})
    with pytest.raises(InvalidValueError, match="sliced_dim=None, but each expert has 2 ranks"):
        Shard(mesh=mesh, placement=Placement(num_experts=2, hidden_dim=5, world=4), shape=(2, 5, 3))
