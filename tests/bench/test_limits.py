"""The byte formulas, against numbers worked by hand for T=8, D=16, K=2, E=4, H=32: 16 rows."""

import pytest

from tutelx.bench import limits
from tutelx.bench.shapes import Shape

SHAPE = Shape(T=8, D=16, K=2, E=4, H=32)


@pytest.mark.parametrize(
    ("formula", "S", "expected"),
    [
        # 8 tokens of 16, 4 experts' 16, 8 tokens' 4
        (limits.linear, 2, (8 * 16 + 4 * 16 + 8 * 4) * 2),
        # 32 logits of 4 bytes; 16 slots of an index and a weight
        (limits.gate, 4, 32 * 4 + 16 * 8),
        (limits.gate, 2, 32 * 2 + 16 * 8),
        (limits.gate, 8, 32 * 8 + 16 * 12),
        (limits.gate_backward, 2, 2 * 32 * 2 + 16 * 8),
        # the three of them
        (limits.gate_and_route, 4, (128 + 128) + 192 + (256 + 128)),
        # ids, dest, source: 16 each
        (limits.route, 2, 3 * 16 * 4),
        # 8 tokens and 16 rows of 16 elements
        (limits.encode, 4, (8 + 16) * 16 * 4),
        # 8 gradients in, 16 rows in, 16 out
        (limits.decode_backward, 2, (8 + 16 + 16) * 16 * 2),
        # 16 empty rows
        (limits.clear_empty, 4, 16 * 16 * 4),
        (limits.activation, 2, 3 * 16 * 32 * 2),
        (limits.activation_backward, 4, 5 * 16 * 32 * 4),
    ],
)
def test_bytes(formula, S, expected):
    assert formula(SHAPE, S) == expected


def test_only_touched_experts_are_read():
    matrix = 16 * 32 * 4
    assert limits.expert_ffn(SHAPE, 4, touched=3) == 2 * 16 * 16 * 4 + 3 * 3 * matrix
    # 16 rows of 16 in, of 32 out, 3 matrices
    assert limits.expert_linear(SHAPE, 4, touched=3) == 16 * (16 + 32) * 4 + 3 * matrix
    # x, y and their gradients; 3 experts read twice, 4 written
    assert limits.layer(SHAPE, 4, touched=3) == 4 * 8 * 16 * 4 + (3 + 3 + 4) * 3 * matrix


def test_operations():
    assert limits.linear_flops(SHAPE) == 2 * 8 * 16 * 4
    assert limits.expert_ffn_flops(SHAPE) == 16 * 3 * 2 * 16 * 32
    assert limits.expert_linear_flops(SHAPE) == 16 * 2 * 16 * 32
    assert limits.layer_flops(SHAPE) == 3 * limits.expert_ffn_flops(SHAPE)
