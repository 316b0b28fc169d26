"""Many ranks: who owns which expert, and how tokens get there and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tutelx.errors import InvalidValueError

if TYPE_CHECKING:
    import torch.distributed as dist

    from tutelx.comm.mesh import MeshLike
    from tutelx.comm.ranks import Ranks
    from tutelx.comm.tensor_parallel import TensorParallel


def join(
    mesh: MeshLike | None,
    *,
    num_experts: int,
    hidden_dim: int | None,
    ranks_per_node: int | None,
    tp_group: dist.ProcessGroup | None,
) -> tuple[Ranks | None, TensorParallel | None]:
    """What a layer needs to share its experts with other ranks.

    hidden_dim: None for experts that cannot be sliced.

    Raises:
        InvalidValueError, InvalidTypeError: as `tutelx.comm.mesh.as_mesh`; a `tp_group` that is not part of the mesh.
    """
    from tutelx.comm.mesh import as_mesh
    from tutelx.comm.placement import Placement
    from tutelx.comm.ranks import Ranks
    from tutelx.comm.tensor_parallel import TensorParallel

    ranks = as_mesh(mesh, ranks_per_node=ranks_per_node)
    within = as_mesh(tp_group)
    if ranks is None:
        if within is not None:
            raise InvalidValueError(f"tp_group has {within.world} ranks, but mesh is None: its experts are not shared")
        return None, None
    if within is not None and not set(within.global_ranks) <= set(ranks.global_ranks):
        raise InvalidValueError(f"tp_group {within.global_ranks} is not part of the mesh {ranks.global_ranks}")
    placement = Placement(num_experts=num_experts, hidden_dim=hidden_dim, world=ranks.world)
    return Ranks(ranks, placement), None if within is None else TensorParallel(within)
