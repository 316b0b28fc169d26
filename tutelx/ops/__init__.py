"""The operators: gate -> route -> encode -> expert_ffn -> decode. One file an op; `reference` holds the slow truth."""

from tutelx.ops.activation import activation
from tutelx.ops.clear_empty import clear_empty
from tutelx.ops.decode import decode
from tutelx.ops.encode import encode
from tutelx.ops.expert_ffn import ExpertWeights, expert_ffn
from tutelx.ops.expert_linear import expert_linear
from tutelx.ops.gate import Gated, gate
from tutelx.ops.inference import (
    GatedInference,
    gated_arguments,
    gated_inference,
    gated_inference_if_few,
    inference,
)
from tutelx.ops.linear import linear
from tutelx.ops.route import route

__all__ = [
    "ExpertWeights",
    "Gated",
    "GatedInference",
    "activation",
    "clear_empty",
    "decode",
    "encode",
    "expert_ffn",
    "expert_linear",
    "gate",
    "gated_arguments",
    "gated_inference",
    "gated_inference_if_few",
    "inference",
    "linear",
    "route",
]
