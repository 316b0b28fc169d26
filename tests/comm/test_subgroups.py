"""Groups of some ranks of a mesh, where ranks are in different numbers of groups."""

import pytest
import torch
import torch.distributed as dist

from tutelx.comm.mesh import as_mesh
from tutelx.comm.subgroups import subgroup
from tutelx.errors import InvalidValueError


def summed(group, members, name):
    mesh = as_mesh(group)
    part = subgroup(mesh, members[mesh.rank], name)
    assert part is subgroup(mesh, members[mesh.rank], name), "made once"
    x = torch.tensor([float(10 ** dist.get_rank())])
    dist.all_reduce(x, group=part)
    timeouts = {each._get_backend(torch.device("cpu")).options._timeout for each in (group, part)}
    return x.item(), part.rank(), len(timeouts)


def test_ranks_that_have_seen_other_groups_find_each_other(ranks):
    # First a group of the world's ranks 1 and 3 alone, then two of two ranks of the world: 0 with 3, 1 with 2.
    alone = ranks(4).run(summed, [[0, 1], [0, 1]], "alone", ranks=(1, 3))
    assert alone == [(1010.0, 0, 1), (1010.0, 1, 1)]
    crossed = ranks(4).run(summed, [[0, 3], [2, 1], [2, 1], [0, 3]], "crossed")
    assert crossed == [(1001.0, 0, 1), (110.0, 1, 1), (110.0, 0, 1), (1001.0, 1, 1)]


def outside(group):
    with pytest.raises(InvalidValueError, match=r"rank \d makes a group of the ranks \(7,\) that it is not in"):
        subgroup(as_mesh(group), [7], "outside")


def test_only_members_make_a_group(ranks):
    ranks(4).run(outside)
