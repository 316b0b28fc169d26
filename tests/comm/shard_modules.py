"""A module that holds its part of known expert tensors, for tests of what is done with such parts."""

import torch
from torch import nn

from tutelx.comm.mesh import as_mesh
from tutelx.comm.placement import Placement
from tutelx.comm.shards import Shard, hold_shards

M, H = 3, 5
# With the dimension that is cut where an expert has several ranks.
SHAPES = {"up": ((H, M), 1), "down": ((M, H), 2), "up_bias": ((H,), 1), "down_bias": ((M,), 1)}


def whole_tensors(num_experts: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(num_experts, *shape, generator=generator) for name, (shape, _) in SHAPES.items()}


def parts(whole: dict[str, torch.Tensor], world: int, rank: int) -> dict[str, torch.Tensor]:
    """What a rank holds, cut by torch.chunk alone."""
    experts = len(whole["up"])
    slices = world // experts if experts < world and world % experts == 0 else 1

    def nth(tensor: torch.Tensor, count: int, index: int, dim: int) -> torch.Tensor:
        chunks = tensor.chunk(count, dim)
        return chunks[index] if index < len(chunks) else tensor.narrow(dim, 0, 0)

    found = {}
    for name, tensor in whole.items():
        own = nth(tensor, world // slices, rank // slices, 0)
        found[name] = nth(own, slices, rank % slices, SHAPES[name][1])
    return found


class LocalExperts(nn.Module):
    """Parameters up, down, up_bias, down_bias: this rank's part of `whole_tensors`."""

    def __init__(self, group, num_experts: int, seed: int = 0) -> None:
        super().__init__()
        whole = whole_tensors(num_experts, seed)
        mesh = None if group is None else as_mesh(group)
        own = parts(whole, 1 if mesh is None else mesh.world, 0 if mesh is None else mesh.rank)
        for name, tensor in own.items():
            self.register_parameter(name, nn.Parameter(tensor.clone(memory_format=torch.contiguous_format)))
        if mesh is not None:
            placement = Placement(num_experts=num_experts, hidden_dim=H, world=mesh.world)
            hold_shards(
                self,
                {
                    name: Shard(
                        mesh=mesh, placement=placement, shape=tuple(whole[name].shape), sliced_dim=SHAPES[name][1]
                    )
                    for name in whole
                },
            )
