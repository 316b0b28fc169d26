"""Memory of large results: kept, given again, bounded, and never shared between two tensors in use."""

import subprocess
import sys

import pytest
import torch

from tests.cases import Case, expert_ids, tensor
from tutelx import ops
from tutelx.ops import buffers

MIB = 2**20


@pytest.fixture(autouse=True)
def _nothing_kept():
    buffers.release()
    yield
    buffers.set_limit(2**30)


def rows(tokens: int = 1024, dim: int = 512, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[tokens, dim] of its own memory: 2 MiB in float32."""
    map = ops.route(torch.zeros(tokens, 1, dtype=torch.int32), 1)
    return ops.encode(tensor(tokens, dim, dtype=dtype), map)


def test_freed_memory_is_given_again():
    first = rows()
    address = first.data_ptr()
    assert buffers.idle_bytes() == 0
    del first
    assert buffers.idle_bytes() == 2 * MIB
    assert rows().data_ptr() == address


def test_two_tensors_in_use_never_share():
    held = [rows() for _ in range(4)]
    assert len({t.data_ptr() for t in held}) == 4
    assert all(torch.equal(t, held[0]) for t in held)


def test_small_results_are_left_to_malloc():
    del_me = rows(tokens=8)
    del del_me
    assert buffers.idle_bytes() == 0


def test_the_limit_holds_and_the_longest_idle_goes_first():
    buffers.set_limit(6 * MIB)
    small, large = rows(), rows(tokens=2048)
    del small
    del large
    assert buffers.idle_bytes() == 6 * MIB
    one = rows(tokens=1536)
    del one  # 3 MiB more: the first 2 MiB, then the 4 MiB have to go
    assert buffers.idle_bytes() == 3 * MIB
    buffers.set_limit(0)
    assert buffers.idle_bytes() == 0
    kept = rows()
    del kept
    assert buffers.idle_bytes() == 0


def test_a_view_keeps_its_memory():
    view = rows()[3:5]
    expected = view.clone()
    others = [rows() for _ in range(3)]
    assert buffers.idle_bytes() == 0
    assert torch.equal(view, expected)
    assert all(t.data_ptr() != view.data_ptr() for t in others)


def test_results_can_be_resized_like_any_other():
    t = rows()
    t.resize_(3, 4).fill_(2.0)
    assert torch.equal(t, torch.full((3, 4), 2.0))


def test_a_gradient_has_the_strides_of_its_weight():
    case = Case(tokens=64, top_k=2, num_experts=2, dim=1024)
    map = ops.route(expert_ids(case), 2)
    up = torch.randn(2, 1024, 512).transpose(1, 2).requires_grad_()  # [E, 512, 1024], not contiguous
    down = torch.randn(2, 1024, 512, requires_grad=True)
    x = ops.encode(tensor(64, 1024), map)
    ops.expert_ffn(x, map, ops.ExpertWeights(up=(up,), down=(down,)), activation="relu").sum().backward()
    assert up.grad.stride() == up.stride()


@pytest.mark.parametrize(("value", "message"), [("-1", "'-1' is not a whole number"), ("1g", "'1g' is not a whole")])
def test_a_wrong_limit_is_named(value, message):
    code = "import tutelx.ops"
    result = subprocess.run(
        [sys.executable, "-c", code], env={"TUTELX_BUFFER_BYTES": value, "PATH": ""}, capture_output=True, text=True
    )
    assert message in result.stderr


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match="nbytes=-1 must be at least 0"):
        buffers.set_limit(-1)
