"""The process groups of the hierarchical exchange: the ranks of a node, and the ranks of equal place on all nodes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from tutelx.comm.mesh import Mesh

# By the name of the group, and with it: names are given anew after destroy_process_group.
_node_groups: dict[tuple[str, int], tuple[Any, Any, Any]] = {}


def node_groups(mesh: Mesh) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """(intra, inter): made on first use, which all ranks of the mesh have at the same time, as they run one plan.

    Raises:
        InvalidValueError: the ranks per node are not known.
    """
    m = mesh.check_nodes()
    key = mesh.group.group_name, m
    group, *found = _node_groups.get(key, (None, None, None))
    if group is not mesh.group:
        ranks = mesh.global_ranks
        node, local = divmod(mesh.rank, m)
        # All ranks make the group of their node first, so that none waits for one that waits for it.
        wanted = [ranks[node * m : (node + 1) * m], ranks[local::m]]
        found = [dist.new_group(list(r), timeout=mesh.timeout, use_local_synchronization=True) for r in wanted]
        _node_groups[key] = mesh.group, found[0], found[1]
    return found[0], found[1]
