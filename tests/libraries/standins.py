"""Layers with the attribute layout of libraries that do not run on a CPU or are no light dependency.

Written anew from what those libraries compute: slow, obvious, one slot at a time. `DeepSpeedMoE` has the names and the
calling convention of DeepSpeed 0.19 (`routes=True`) and of versions before (`routes=False`), `Megablocks` those of
Megablocks 0.10, whose own operators need a GPU. Where DeepSpeed is installed, tests run the real one too.
"""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn


def place(ids_TK: torch.Tensor, num_experts: int, capacity: int, order: str) -> list[tuple[int, int, int, int]]:
    """(token, choice, expert, location) of every slot that finds room; order "choices": all first choices first."""
    tokens, top_k = ids_TK.shape
    slots = [(t, k) for k in range(top_k) for t in range(tokens)]
    if order == "tokens":
        slots.sort()
    used = [0] * num_experts
    kept = []
    for t, k in slots:
        e = int(ids_TK[t, k])
        if used[e] < capacity:
            kept.append((t, k, e, used[e]))
        used[e] += 1
    return kept


class TopKGate(nn.Module):
    """The K best of a softmax, normalised over what finds room if K > 1."""

    def __init__(self, model_dim, num_experts, k, capacity_factor, eval_capacity_factor, min_capacity, drop_tokens):
        super().__init__()
        self.wg = nn.Linear(model_dim, num_experts, bias=False)
        self.k, self.min_capacity, self.drop_tokens = k, min_capacity, drop_tokens
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor

    def decide(self, x_TM, used_token):
        scores_TE = F.linear(x_TM.float(), self.wg.weight.float()).softmax(dim=1)
        tokens, num_experts = scores_TE.shape
        ids_TK = scores_TE.topk(self.k, dim=1).indices
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        capacity = max(self.min_capacity, math.ceil(factor * self.k * tokens / num_experts))
        if not self.drop_tokens:
            capacity = tokens
        kept = place(ids_TK, num_experts, capacity, "choices")
        if used_token is not None:
            kept = [slot for slot in kept if used_token[slot[0]]]
        mask_TE = torch.zeros_like(scores_TE)
        for t, _, e, _ in kept:
            mask_TE[t, e] = 1
        weights_TE = scores_TE * mask_TE
        if self.k > 1:
            weights_TE = weights_TE / weights_TE.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
        first_E = F.one_hot(ids_TK[:, 0], num_experts).float().mean(dim=0)
        aux = (scores_TE.mean(dim=0) * first_E).sum() * num_experts
        counts_E = torch.bincount(ids_TK.flatten(), minlength=num_experts)
        return aux, capacity, num_experts, kept, weights_TE, counts_E


class RoutesGate(TopKGate):
    def forward(self, input, used_token=None, sparse_routes=False, use_tutel=False):
        assert sparse_routes, "the layer asks for a list of choices"
        aux, capacity, num_experts, kept, weights_TE, counts_E = self.decide(input, used_token)
        ids_KT = torch.full((self.k, len(input)), -1, dtype=torch.int32)
        locations_KT = torch.zeros_like(ids_KT)
        for t, k, e, location in kept:
            ids_KT[k, t], locations_KT[k, t] = e, location
        weights_KT = weights_TE.gather(1, ids_KT.T.long().clamp(min=0)).T * (ids_KT >= 0)
        return aux, torch.tensor(capacity), num_experts, ids_KT, locations_KT, weights_KT, counts_E


class DenseGate(TopKGate):
    def forward(self, input, used_token=None, use_tutel=False):
        aux, capacity, num_experts, kept, weights_TE, counts_E = self.decide(input, used_token)
        room_TEC = torch.zeros(len(input), num_experts, capacity)
        for t, _, e, location in kept:
            room_TEC[t, e, location] = 1
        combine_TEC = weights_TE.unsqueeze(2) * room_TEC
        return aux, combine_TEC, combine_TEC.bool(), counts_E


class DeepSpeedExperts(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(experts)
        self.num_local_experts = len(experts)

    def forward(self, inputs):
        chunks = inputs.chunk(self.num_local_experts, dim=1)
        return torch.cat([expert(chunk) for chunk, expert in zip(chunks, self.deepspeed_experts)], dim=1)


class MOELayer(nn.Module):
    def __init__(self, gate, experts, ep_size=1):
        super().__init__()
        self.gate, self.experts = gate, experts
        self.ep_group, self.ep_size, self.ep_group_name = None, ep_size, f"ep_size_{ep_size}"
        self.num_local_experts = experts.num_local_experts
        self.use_tutel = False

    def forward(self, *input, **kwargs):
        x_TM = input[0].reshape(-1, input[0].shape[-1])
        if isinstance(self.gate, RoutesGate):
            routes = self.gate(x_TM, input[1], True, self.use_tutel)
            self.l_aux, capacity, num_experts, ids_KT, locations_KT, weights_KT, self.exp_counts = routes
            combine_TEC = x_TM.new_zeros(len(x_TM), num_experts, int(capacity), dtype=weights_KT.dtype)
            k, t = torch.where(ids_KT >= 0)
            place = (t, ids_KT[k, t].long(), locations_KT[k, t].long())
            combine_TEC = combine_TEC.index_put(place, weights_KT[k, t])
        else:
            self.l_aux, combine_TEC, _, self.exp_counts = self.gate(x_TM, input[1])
        combine_TEC = combine_TEC.to(x_TM.dtype)
        rows_ECM = torch.einsum("tec,tm->ecm", combine_TEC.bool().to(x_TM.dtype), x_TM)
        out_ECM = self.experts(rows_ECM.unsqueeze(0)).squeeze(0)
        return torch.einsum("tec,ecm->tm", combine_TEC, out_ECM).reshape(input[0].shape)


class DeepSpeedMoE(nn.Module):
    """The outer layer, with the residual network that DeepSpeed can put beside the experts."""

    def __init__(
        self, model_dim, make, num_experts, *, k=1, factor=1.0, drop_tokens=True, residual=False, routes=True, ep_size=1
    ):
        super().__init__()
        gate = (RoutesGate if routes else DenseGate)(model_dim, num_experts, k, factor, 2 * factor, 4, drop_tokens)
        self.deepspeed_moe = MOELayer(gate, DeepSpeedExperts([make() for _ in range(num_experts)]), ep_size)
        self.use_residual = residual
        if residual:
            self.mlp = make()
            self.coefficient = nn.Linear(model_dim, 2)

    def forward(self, hidden_states, used_token=None):
        y = self.deepspeed_moe(hidden_states, used_token)
        if self.use_residual:
            share = self.coefficient(hidden_states).softmax(dim=-1)
            y = y * share[..., :1] + self.mlp(hidden_states) * share[..., 1:]
        return y, self.deepspeed_moe.l_aux, self.deepspeed_moe.exp_counts


# ---- Megablocks ------------------------------------------------------------------------------------------------------

saved: list[tuple[torch.Tensor, torch.Tensor]] = []


def save_load_balancing_loss(loss):
    saved.append(loss)


class MLP(nn.Module):
    """Weights [E, M, H] and [E, H, M] of `MoE`; [E * H, M] of `dMoE`, with v1 if gated."""

    def __init__(self, args, dropless, gated):
        super().__init__()
        E, M, H = args.moe_num_experts, args.hidden_size, args.ffn_hidden_size
        shapes = [(E * H, M), (E * H, M)] if dropless else [(E, M, H), (E, H, M)]
        self.args = args
        self.w1, self.w2 = (nn.Parameter(torch.randn(shape) / M**0.5) for shape in shapes)
        if gated:
            self.v1 = nn.Parameter(torch.randn(shapes[0]) / M**0.5)

    def of(self, name, e):
        """[H, M] of one expert, whichever the layout."""
        weight, H = getattr(self, name), self.args.ffn_hidden_size
        if weight.dim() == 2:
            return weight[e * H : (e + 1) * H]
        return weight[e].T if name == "w1" else weight[e]

    def forward(self, e, x):
        hidden = self.args.activation_fn(x @ self.of("w1", e).T)
        if "v1" in self._parameters:
            hidden = hidden * (x @ self.of("v1", e).T)
        return hidden @ self.of("w2", e)


class ParallelMLP(nn.Module):
    def __init__(self, args, dropless, gated):
        super().__init__()
        self.args, self.num_experts, self.top_k = args, args.moe_num_experts, args.moe_top_k
        self.mlp = MLP(args, dropless, gated)
        self.dropless = dropless
        self.register_parameter("bias", nn.Parameter(torch.randn(args.hidden_size)) if args.bias else None)

    def expert_capacity(self, tokens):
        return int(self.args.moe_capacity_factor * self.top_k * tokens / self.num_experts)

    def forward(self, x, scores, expert_weights, top_experts):
        x_TM = x.reshape(-1, x.shape[-1])
        capacity = 0 if self.dropless else self.expert_capacity(len(x_TM))
        kept = place(top_experts, self.num_experts, capacity or x_TM.numel(), "tokens")
        rows = [torch.zeros_like(x_TM[0]) for _ in x_TM]
        for t, k, e, _ in kept:
            rows[t] = rows[t] + expert_weights[t, k] * self.mlp(e, x_TM[t])
        if self.training and self.args.moe_loss_weight > 0:
            counts = torch.bincount(top_experts.flatten(), minlength=self.num_experts).int()
            save_load_balancing_loss((counts, scores))
        y = torch.stack(rows).reshape(x.shape)
        if self.bias is None:
            return y
        return (y, self.bias) if self.args.return_bias else y + self.bias


class LearnedRouter(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.layer = nn.Linear(args.hidden_size, args.moe_num_experts, bias=False)

    def forward(self, x):
        if self.training and self.args.moe_jitter_eps:
            x = x * (1 + (2 * torch.rand_like(x) - 1) * self.args.moe_jitter_eps)
        scores = self.layer(x.reshape(-1, x.shape[-1])).softmax(dim=-1)
        return scores, *scores.topk(self.args.moe_top_k, dim=-1)


class Megablocks(nn.Module):
    """`MoE` and `dMoE`: tokens come as [sequence, batch, model dim]."""

    def __init__(self, *, dropless, gated=False, **changes):
        super().__init__()
        settings = {
            "hidden_size": 8,
            "ffn_hidden_size": 12,
            "bias": True,
            "return_bias": True,
            "activation_fn": partial(F.gelu, approximate="tanh"),
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_capacity_factor": 1,
            "moe_loss_weight": 0.1,
            "moe_jitter_eps": 0.1,
            "moe_expert_model_parallelism": False,
        }
        args = SimpleNamespace(**{**settings, **changes})
        self.router = LearnedRouter(args)
        self.experts = ParallelMLP(args, dropless, gated)

    def forward(self, x):
        return self.experts(x, *self.router(x))
