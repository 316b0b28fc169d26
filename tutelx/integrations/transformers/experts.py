"""The forward of an experts module of transformers: route -> encode -> two products -> decode.

The module holds the weights and says itself what it computes: `has_gate`, `has_bias`, `is_transposed`,
`has_post_expert_norm`, `_apply_gate`, `act_fn`. All are read on every call, so that whatever took their place since
(an adapter, FSDP, `load_state_dict(assign=True)`) is what runs.

Shapes: T tokens, K choices a token, E experts, M model dim, H hidden dim, G = 2H if gated, else H; R rows.
"""

from __future__ import annotations

from typing import Any

import torch

from tutelx import ops
from tutelx.errors import InvalidValueError
from tutelx.integrations.transformers.across import forward_across
from tutelx.integrations.transformers.gating import fused_activation, says
from tutelx.integrations.transformers.setting import DEFAULT, Setting
from tutelx.stats import RoutingStats
from tutelx.stopwatch import named, stopwatch
from tutelx.types import Decision, DispatchMap, Plan, Workload


def experts_forward(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    setting: Setting = DEFAULT,
) -> torch.Tensor:
    """What transformers' `ExpertsInterface` asks of an implementation.

    Args:
        experts: the module, with `num_experts`, `gate_up_proj` [E, G, M] or `up_proj` [E, H, M], `down_proj` [E, M, H]
            (last two dimensions exchanged if `is_transposed`), and biases of the same names with `_bias`.
        hidden_states: [T, M], in any floating dtype; computed in that of the weights, or of autocast.
        top_k_index: [T, K] integer, 0..E-1; E itself, or -1, is an expert that is not here: it adds nothing.
        top_k_weights: [T, K] floating.

    Returns:
        [T, M] in the dtype of `hidden_states`. Differentiable in both, and in the module's parameters.

    Raises:
        ValueError, TypeError: shapes, ids or dtypes that do not fit together; the message names both.
    """
    E = experts.num_experts
    first = "gate_up_proj" if says(experts, "has_gate") else "up_proj"
    dtype = _compute_dtype(getattr(experts, first))
    ids_TK = torch.where(top_k_index == E, -1, top_k_index)
    weights_TK = _as_weights(top_k_weights, dtype)
    if setting.ranks is not None:
        y_TM = forward_across(
            experts,
            hidden_states.to(dtype),
            ids_TK,
            weights_TK,
            hidden_dim=_hidden_dim(experts),
            setting=setting,
            compute=lambda rows, map, plan: _compute(experts, rows, map, plan),
        )
        return y_TM.to(hidden_states.dtype)
    map, decision = _dispatch(experts, hidden_states, ids_TK, dtype, setting)
    plan = Plan() if decision is None else decision.plan
    watch = None if decision is None else stopwatch(setting.planner, decision, hidden_states.device)
    x_TM = hidden_states.to(dtype)
    with named(plan):
        out_RM = _compute(experts, ops.encode(x_TM if watch is None else watch.begin(x_TM), map), map, plan)
        y_TM = ops.decode(out_RM, map, weights_TK)
        if watch is not None:
            watch.end(y_TM)
            setting.watch = watch if setting is not DEFAULT else None
    return y_TM.to(hidden_states.dtype)


def _compute(experts: Any, rows_RM: torch.Tensor, map: DispatchMap, plan: Plan) -> torch.Tensor:
    hidden_RG = _product(experts, "gate_up_proj" if says(experts, "has_gate") else "up_proj", rows_RM, map, plan)
    out_RM = _product(experts, "down_proj", _activate(experts, hidden_RG), map, plan)
    return experts.post_expert_norm(out_RM) if says(experts, "has_post_expert_norm") else out_RM


def _hidden_dim(experts: Any) -> int:
    return experts.down_proj.shape[1 if says(experts, "is_transposed") else 2]


def _numbers(experts: Any, model_dim: int) -> int:
    """Parameters of one expert."""
    hidden_dim, inner = _hidden_dim(experts), 2 if says(experts, "has_gate") else 1
    biases = inner * hidden_dim + model_dim if says(experts, "has_bias") else 0
    return (inner + 1) * hidden_dim * model_dim + biases


def _compute_dtype(weight: torch.Tensor) -> torch.dtype:
    # As torch's own products do: autocast leaves float64 alone.
    if torch.is_autocast_enabled(weight.device.type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def _dispatch(
    experts: Any, x_TM: torch.Tensor, ids_TK: torch.Tensor, dtype: torch.dtype, setting: Setting
) -> tuple[DispatchMap, Decision | None]:
    """Rows for every slot, and how large the tiles are; nothing decides while the module is compiled.

    Always ragged rows: between a forward and its recomputation under gradient checkpointing no shape may change,
    whatever the planner has learned meanwhile.
    """
    tokens, top_k = ids_TK.shape
    E = experts.num_experts
    limit = setting.capacity.limit(tokens=tokens, top_k=top_k, num_experts=E)
    map = ops.route(ids_TK, E, limit, layout="ragged")
    if torch.compiler.is_compiling():
        return map, None
    workload = Workload(
        tokens=tokens,
        top_k=top_k,
        num_experts=E,
        model_dim=x_TM.shape[1],
        hidden_dim=_hidden_dim(experts),
        demand=int(map.counts.max()) if x_TM.device.type == "cpu" else None,
        capacity=limit,
        dtype=str(dtype).removeprefix("torch."),
        device=x_TM.device.type,
        training=torch.is_grad_enabled(),
        threads=torch.get_num_threads(),
        layouts=("ragged",),
        expert_numbers=_numbers(experts, x_TM.shape[1]),
    )
    decision = setting.planner.plan(workload)
    if decision.plan.layout != "ragged" or decision.plan.expert_kernel != "tiled":
        raise InvalidValueError(f"plan={decision.plan}, but the experts of transformers run ragged rows in tiles only")
    if setting is not DEFAULT:
        setting.last_decision, setting.stats = decision, RoutingStats(map)
    return map, decision


def _product(experts: Any, name: str, rows: torch.Tensor, map: DispatchMap, plan: Plan) -> torch.Tensor:
    weight = getattr(experts, name)
    bias = (getattr(experts, f"{name}_bias").to(rows.dtype),) if says(experts, "has_bias") else ()
    return ops.expert_linear(
        rows,
        map,
        ((weight.transpose(1, 2) if says(experts, "is_transposed") else weight).to(rows.dtype),),
        bias,
        tile_rows=plan.tile_rows,
        tile_columns=plan.tile_columns,
    )


def _activate(experts: Any, hidden_RG: torch.Tensor) -> torch.Tensor:
    kind = fused_activation(experts)
    if kind is None:
        return experts._apply_gate(hidden_RG) if says(experts, "has_gate") else experts.act_fn(hidden_RG)
    if not says(experts, "has_gate"):
        return ops.activation(hidden_RG, kind=kind)
    gate_RH, up_RH = hidden_RG.chunk(2, dim=-1)
    return ops.activation(gate_RH, up_RH, kind=kind)


def _as_weights(weights_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In the dtype of the rows or in float32, whichever keeps them exact."""
    if dtype == torch.float64:
        return weights_TK.double()
    return weights_TK if weights_TK.dtype == dtype else weights_TK.float()
