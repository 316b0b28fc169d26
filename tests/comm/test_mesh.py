"""What `mesh=` means, and how many ranks sit on a node."""

import os
import re

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tutelx.comm.mesh import as_mesh


def said(function) -> str:
    try:
        return str(function())
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def describe(group, local_world_size):
    os.environ.pop("LOCAL_WORLD_SIZE", None)
    if local_world_size:
        os.environ["LOCAL_WORLD_SIZE"] = local_world_size
    mesh = as_mesh(group)
    os.environ.pop("LOCAL_WORLD_SIZE", None)
    return mesh.rank, mesh.world, mesh.ranks_per_node, mesh.global_ranks, said(mesh.check_nodes)


@pytest.mark.parametrize(
    ("members", "local", "per_node", "message"),
    [
        (None, "2", 2, "2"),
        (None, None, None, "InvalidValueError: all_to_all='2dh' needs the ranks per node: give ranks_per_node"),
        (None, "3", None, r"LOCAL_WORLD_SIZE=3 the group's ranks lie on the nodes \[0, 0, 0, 1\], unevenly"),
        ((1, 3), "2", 1, "1"),
        ((2, 3), "2", 2, "2"),
        ((0, 1, 3), "2", None, r"nodes \[0, 0, 1\], unevenly"),
    ],
)
def test_ranks_per_node(ranks, members, local, per_node, message):
    answers = ranks(4).run(describe, local, ranks=members)
    for nth, (rank, world, found, global_ranks, text) in enumerate(answers):
        assert (rank, world, found) == (nth, len(answers), per_node)
        assert global_ranks == (members or (0, 1, 2, 3))
        assert re.search(message, text)


def meshes(group):
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    line = init_device_mesh("cpu", (4,))
    whole = as_mesh(grid)
    return [
        (whole.world, whole.ranks_per_node, whole.origin),
        (as_mesh(grid["local"]).global_ranks, as_mesh(grid["node"]).global_ranks),
        as_mesh(line, ranks_per_node=2).ranks_per_node,
        said(lambda: as_mesh(grid, ranks_per_node=4)),
        said(lambda: as_mesh(line, ranks_per_node=3)),
        said(lambda: as_mesh(line, ranks_per_node=2.0)),
        said(lambda: as_mesh(init_device_mesh("cpu", (1, 2, 2)))),
        said(lambda: as_mesh("world")),
    ]


def test_device_meshes(ranks):
    answers = ranks(4).run(meshes)
    for rank, answer in enumerate(answers):
        local = (0, 1) if rank < 2 else (2, 3)
        node = (0, 2) if rank % 2 == 0 else (1, 3)
        assert answer == [
            (4, 2, "the mesh's second dimension"),
            (local, node),
            2,
            "InvalidValueError: ranks_per_node=4 contradicts the mesh, which has 2 ranks a node",
            "InvalidValueError: ranks_per_node=3 does not divide the group's 4 ranks",
            "InvalidTypeError: ranks_per_node=2.0 is float, expected int",
            "InvalidValueError: mesh has shape (1, 2, 2), expected one or two dimensions; take mesh['name']",
            "InvalidTypeError: mesh is str, expected DeviceMesh, ProcessGroup or None",
        ]


def outside(group):
    pair = dist.new_group([0, 1])
    return said(lambda: as_mesh(pair).rank)


def test_not_a_member(ranks):
    answers = ranks(4).run(outside)
    assert answers[:2] == ["0", "1"]
    assert all("expected DeviceMesh, ProcessGroup or None" in a or "is not in the group" in a for a in answers[2:])


def test_no_mesh():
    assert as_mesh(None) is None
    with pytest.raises(ValueError, match="ranks_per_node=2 was given, but mesh is None"):
        as_mesh(None, ranks_per_node=2)
