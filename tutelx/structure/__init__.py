"""What is built around MoE layers: shared experts, residual layers, whole models from dense ones, fine-tuning."""

from tutelx.structure.convert import convert_dense
from tutelx.structure.freezing import aux_loss, freeze_moe, moe_layers, train_only_moe
from tutelx.structure.shared import ResidualMoE, SharedExperts

__all__ = [
    "ResidualMoE",
    "SharedExperts",
    "aux_loss",
    "convert_dense",
    "freeze_moe",
    "moe_layers",
    "train_only_moe",
]
