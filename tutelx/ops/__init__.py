"""The operators: gate -> route -> encode -> expert_ffn -> decode. One file an op; `reference` holds the slow truth."""

from tutelx.ops.activation import activation
from tutelx.ops.brief_call import BriefCall, brief_call
from tutelx.ops.clear_empty import clear_empty
from tutelx.ops.decode import decode
from tutelx.ops.encode import encode
from tutelx.ops.expert_ffn import ExpertWeights, expert_ffn
from tutelx.ops.expert_linear import expert_linear
from tutelx.ops.gate import Gated, gate
from tutelx.ops.inference import GatedInference, gated_inference, inference
from tutelx.ops.linear import linear
from tutelx.ops.route import route

__all__ = [
    "BriefCall",
    "ExpertWeights",
    "Gated",
    "GatedInference",
    "activation",
    "brief_call",
    "clear_empty",
    "decode",
    "encode",
    "expert_ffn",
    "expert_linear",
    "gate",
    "gated_inference",
    "inference",
    "linear",
    "route",
]
