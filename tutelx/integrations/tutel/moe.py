"""Tutel's `moe`: the layer, and the routing it is made of."""

from tutelx.integrations.tutel.dispatcher import fast_decode, fast_dispatcher, fast_encode
from tutelx.integrations.tutel.layer import MOELayer
from tutelx.integrations.tutel.routing import (
    extract_critical,
    fast_cumsum_sub_one,
    get_dispatch_count,
    get_reversed_sample_ids,
    get_topk_selection,
    top_k_routing,
)

moe_layer = MOELayer

__all__ = [
    "extract_critical",
    "fast_cumsum_sub_one",
    "fast_decode",
    "fast_dispatcher",
    "fast_encode",
    "get_dispatch_count",
    "get_reversed_sample_ids",
    "get_topk_selection",
    "moe_layer",
    "top_k_routing",
]
