"""What an op cannot avoid: the bytes that must move, and the floating-point operations.

Dropless, so R = K*T rows. S: bytes of an element. Bytes count every input read once and every output written once;
indices count where they are the subject (gate, route) and are left out where rows of D elements dwarf them. What an
implementation keeps for its own backward is its choice and does not count, nor does a cache that saves a read.
"""

from __future__ import annotations

from tutelx.bench.shapes import Shape

INDEX = 4  # bytes of an int32


def linear(shape: Shape, S: int) -> int:
    """Tokens and the router in, logits out."""
    return S * (shape.T * shape.D + shape.E * shape.D + shape.T * shape.E)


def linear_flops(shape: Shape) -> int:
    return 2 * shape.T * shape.D * shape.E


def gate(shape: Shape, S: int) -> int:
    """Logits in; an index and a weight a slot out. Weights are float32, float64 for float64."""
    return S * shape.T * shape.E + (INDEX + _wide(S)) * shape.rows


def gate_backward(shape: Shape, S: int) -> int:
    """Logits, indices and gradients of the weights in; gradients of the logits out."""
    return 2 * S * shape.T * shape.E + (INDEX + _wide(S)) * shape.rows


def gate_and_route(shape: Shape, S: int) -> int:
    """A gate, its map and its gradient: what the ops of these names must move, added up."""
    return gate(shape, S) + route(shape, S) + gate_backward(shape, S)


def route(shape: Shape, S: int) -> int:
    """Expert ids in, `dest` and `source` out."""
    return 3 * INDEX * shape.rows


def encode(shape: Shape, S: int) -> int:
    """Each token read once, each row written once. Also the backward of encode, and decode."""
    return (1 + shape.K) * shape.T * shape.D * S


def decode_backward(shape: Shape, S: int) -> int:
    """Gradients of the tokens and rows in, gradients of the rows out; those of the weights are small."""
    return (1 + 2 * shape.K) * shape.T * shape.D * S


def activation(shape: Shape, S: int) -> int:
    """gate and up in, their product out."""
    return 3 * shape.rows * shape.H * S


def activation_backward(shape: Shape, S: int) -> int:
    """grad, gate and up in, the gradients of gate and up out."""
    return 5 * shape.rows * shape.H * S


def expert_ffn(shape: Shape, S: int, touched: int) -> int:
    """Rows in and out, and the three matrices of every expert that got a row."""
    return 2 * shape.rows * shape.D * S + touched * _matrices(shape, S)


def expert_linear(shape: Shape, S: int, touched: int) -> int:
    """Rows in, rows of H out, and one matrix of every expert that got a row."""
    return shape.rows * (shape.D + shape.H) * S + touched * shape.D * shape.H * S


def clear_empty(shape: Shape, S: int) -> int:
    """Each empty row written; of the padded layout at a capacity factor of 2 as many as are filled."""
    return shape.rows * shape.D * S


def layer(shape: Shape, S: int, touched: int) -> int:
    """Forward and backward: x, y and their gradients; the touched experts' matrices read twice; all gradients
    written, zeros for an expert that got no row. The router's share is left out."""
    return 4 * shape.T * shape.D * S + (2 * touched + shape.E) * _matrices(shape, S)


def layer_inference(shape: Shape, S: int, touched: int) -> int:
    """x and y, and the three matrices of every expert that got a row. The router's share is left out."""
    return 2 * shape.T * shape.D * S + touched * _matrices(shape, S)


def expert_ffn_flops(shape: Shape) -> int:
    """Three products of D x H a row, two operations each."""
    return 6 * shape.rows * shape.D * shape.H


def expert_linear_flops(shape: Shape) -> int:
    return 2 * shape.rows * shape.D * shape.H


def layer_flops(shape: Shape) -> int:
    """The backward of a product is two products; the router's share is left out."""
    return 3 * expert_ffn_flops(shape)


def _matrices(shape: Shape, S: int) -> int:
    return 3 * shape.D * shape.H * S


def _wide(S: int) -> int:
    return 8 if S == 8 else 4
