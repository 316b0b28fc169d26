"""How tokens choose experts: one file a gate family, and their losses."""

from tutelx.gates.base import CustomGate, Gate, GateConfig, LinearGate, build_gate, by_priority
from tutelx.gates.cosine import Cosine, CosineGate
from tutelx.gates.deepseek import BiasBalanced, BiasBalancedGate, GroupLimited, GroupLimitedGate, update_biases
from tutelx.gates.expert_choice import ExpertChoice, ExpertChoiceGate
from tutelx.gates.hierarchical import Hierarchical, HierarchicalGate
from tutelx.gates.noisy import NoisyTopK, NoisyTopKGate
from tutelx.gates.second import GShardTop2, GShardTop2Gate, STMoE, STMoEGate
from tutelx.gates.switch import Switch, SwitchGate
from tutelx.gates.top_p import TopP, TopPGate
from tutelx.gates.topk import TopK, TopKGate

__all__ = [
    "BiasBalanced",
    "BiasBalancedGate",
    "Cosine",
    "CosineGate",
    "CustomGate",
    "ExpertChoice",
    "ExpertChoiceGate",
    "GShardTop2",
    "GShardTop2Gate",
    "Gate",
    "GateConfig",
    "GroupLimited",
    "GroupLimitedGate",
    "Hierarchical",
    "HierarchicalGate",
    "LinearGate",
    "NoisyTopK",
    "NoisyTopKGate",
    "STMoE",
    "STMoEGate",
    "Switch",
    "SwitchGate",
    "TopK",
    "TopKGate",
    "TopP",
    "TopPGate",
    "build_gate",
    "by_priority",
    "update_biases",
]
