"""Expert parameters and their compute: built-in feed-forward experts, and modules that somebody else wrote."""

from tutelx.experts.base import Experts
from tutelx.experts.build import build_experts
from tutelx.experts.custom import BatchedExperts, ListedExperts
from tutelx.experts.dropout import DroppingExperts
from tutelx.experts.ffn import FeedForwardExperts

__all__ = [
    "BatchedExperts",
    "DroppingExperts",
    "Experts",
    "FeedForwardExperts",
    "ListedExperts",
    "build_experts",
]
