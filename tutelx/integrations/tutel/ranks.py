"""What a script's layer asks of torch.distributed, where there may be none."""

from __future__ import annotations

import torch
import torch.distributed as dist


def world_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group itself, or that of all ranks; None where nothing is initialised."""
    if group is not None:
        return group
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def world_size(group: dist.ProcessGroup | None) -> int:
    group = world_group(group)
    return 1 if group is None else dist.get_world_size(group)


def most_of(number: int | torch.Tensor, device: torch.device, group: dist.ProcessGroup | None) -> int:
    """The greatest of all ranks' numbers; all must call."""
    if world_size(group) == 1:
        return int(number)
    most = torch.as_tensor(number, dtype=torch.int64, device=device).clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=world_group(group))
    return int(most)


class SharedGroup:
    """A process group that a copy of the layer shares, as it has no copy."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict) -> SharedGroup:
        return self
