"""The MoE families of the installed transformers, found by scanning it, and a tiny random model of each."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

_REGISTERED = re.compile(r"^@use_experts_implementation[^\n]*\nclass (\w+)", re.MULTILINE)
# The first of these that the family has, in this order.
_HEADS = ("ForCausalLM", "ForTokenClassification", "TextModel", "Model")

# What a configuration is given of these, if it knows the name.
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # experts
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "top_k_experts"), 2),
    **dict.fromkeys(("moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_groups", "num_expert_group", "num_limited_groups"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_interval"), 1),
    "moe_layer_start_index": 0,
    # attention in low rank
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 4,
    # linear attention and state spaces
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_dt_rank": 4,
    "n_groups": 1,
    "ssm_state_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
}
# Where the names above are not enough: layers that must be sparse, sizes that must fit together.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "mrope_section": [2, 1, 1],
        }
    },
    "glm5_next": {"index_kpool": 2, "qk_rope_head_dim": 0, "mlp_layer_types": ["dense", "sparse"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": {"head_dim": 24, "v_head_dim": 16, "num_key_value_heads": 2},
    "mistral4": {"head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True)
class Family:
    """experts: its classes that ask the registry."""

    name: str
    module: str
    experts: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def families() -> list[Family]:
    """Every folder of `transformers.models` with experts that ask the registry. Imports nothing of it."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return []
    found = []
    for path in sorted(Path(spec.submodule_search_locations[0], "models").glob("*/modeling_*.py")):
        if names := _REGISTERED.findall(path.read_text()):
            found.append(Family(path.parent.name, f"transformers.models.{path.parent.name}.{path.stem}", tuple(names)))
    return found


@cache
def model_class(family: Family) -> type:
    from transformers import PreTrainedModel

    module = importlib.import_module(family.module)
    own = [
        kind
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, PreTrainedModel) and kind.__module__ == family.module
    ]
    return next(kind for head in _HEADS for kind in own if kind.__name__.endswith(head))


def configuration(kind: type, family: str = "", **changes: Any) -> Any:
    """A tiny one for the model class, with a new field's default where its name is not known here."""
    config_class = kind.config_class
    known = set(config_class().to_dict()) | set(inspect.signature(config_class.__init__).parameters)
    sizes = {name: value for name, value in _SIZES.items() if name in known}
    return config_class(**{**sizes, **_OVERRIDES.get(family, {}), "use_cache": False, **changes})


def build(family: Family, *, implementation: str = "eager", dtype: torch.dtype | None = None, **changes: Any) -> Any:
    """A model in evaluation mode, its weights so large that every expert shows in the logits."""
    kind = model_class(family)
    config = configuration(kind, family.name, experts_implementation=implementation, **changes)
    torch.manual_seed(0)
    model = kind(config).eval()
    spread(model)
    return model if dtype is None else model.to(dtype)


def spread(model: nn.Module) -> None:
    """Unit-variance products instead of the library's own initialisation, which hides the experts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() in (2, 3):
                parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]), generator=generator)


def narrowed(model: nn.Module) -> nn.Module:
    """In bfloat16, but for what the family keeps in float32, as `from_pretrained` would load it."""
    kept = model._keep_in_fp32_modules_strict or ()
    model.bfloat16()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and any(re.search(rf"(^|\.){part}($|\.)", name) for part in kept):
            tensor.data = tensor.data.float()
    return model


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "_is_expert_parallel")}
