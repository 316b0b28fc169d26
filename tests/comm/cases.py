"""One layer over many ranks: cases, what every rank runs, and what must come out, in plain torch.

Shapes: T tokens of a rank, M model dim, E experts, H hidden dim, K choices a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from tests.cases import tensor
from tests.tolerance import TOLERANCE, relative_error
from tutelx import Capacity, MoE, Plan
from tutelx.comm.placement import Placement
from tutelx.gates import TopK

MODEL_DIM = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """tokens: of each rank; its length is the number of ranks."""

    tokens: tuple[int, ...]
    num_experts: int
    plan: Plan = field(default_factory=Plan)
    hidden_dim: int = 8
    experts: str = "gated"
    bias: bool = True
    top_k: int = 2
    capacity: float | None = None
    dtype: torch.dtype = torch.float64
    ranks_per_node: int | None = None

    @property
    def k(self) -> int:
        return min(self.top_k, self.num_experts)

    @property
    def setting(self) -> Capacity:
        return Capacity.dropless() if self.capacity is None else Capacity.fixed(self.capacity)

    def layer(self, **where: Any) -> MoE:
        torch.manual_seed(7)
        return MoE(
            MODEL_DIM,
            self.hidden_dim,
            self.num_experts,
            gate=TopK(k=self.k, balance_coef=0),
            experts=self.experts,
            bias=self.bias,
            capacity=self.setting,
            dtype=self.dtype,
            **where,
        )

    def x(self, rank: int) -> torch.Tensor:
        return tensor(self.tokens[rank], MODEL_DIM, dtype=self.dtype, seed=10 + rank, grad=True)

    def grad(self, rank: int) -> torch.Tensor:
        return tensor(self.tokens[rank], MODEL_DIM, dtype=self.dtype, seed=50 + rank)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one rank got. gradients: by parameter name, of its own parameters."""

    y: torch.Tensor
    grad_x: torch.Tensor
    gradients: dict[str, torch.Tensor]
    bytes_tokens: int
    bytes_weights: int
    exchange: str


def run_case(group: dist.ProcessGroup, case: Case) -> Answer:
    rank = dist.get_rank(group)
    layer = case.layer(mesh=group, ranks_per_node=case.ranks_per_node)
    x = case.x(rank)
    y = layer(x, plan=case.plan)
    sent = layer.stats.bytes_tokens, layer.stats.bytes_weights
    y.backward(case.grad(rank))
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return Answer(
        y=y.detach(),
        grad_x=x.grad,
        gradients=gradients,
        bytes_tokens=sent[0],
        bytes_weights=sent[1],
        exchange=layer.last_decision.exchange,
    )


def run_cases(group: dist.ProcessGroup, cases: list[Case], repeat: bool = False) -> list[Answer]:
    """Each case's answer; `repeat`: a second run must give the same bits."""
    answers = []
    for case in cases:
        answer = run_case(group, case)
        if repeat:
            again = run_case(group, case)
            assert torch.equal(answer.y, again.y), case
            assert torch.equal(answer.grad_x, again.grad_x), case
            for name, g in answer.gradients.items():
                assert torch.equal(g, again.gradients[name]), (name, case)
        answers.append(answer)
    return answers


def kept_slots(ids: torch.Tensor, limit: int | None) -> torch.Tensor:
    """[T, K] bool: slots that get a row; all first choices in token order, then all second ones."""
    kept = torch.zeros(ids.shape, dtype=torch.bool)
    used: dict[int, int] = {}
    for k in range(ids.shape[1]):
        for t in range(ids.shape[0]):
            e = int(ids[t, k])
            kept[t, k] = limit is None or used.get(e, 0) < limit
            used[e] = used.get(e, 0) + 1
    return kept


@lru_cache(maxsize=256)
def expected(case: Case) -> list[Answer]:
    """One process, every expert on every token; the capacity holds for each rank's tokens apart."""
    wide = torch.float64 if case.dtype in (torch.bfloat16, torch.float16) else case.dtype
    layer = case.layer().to(wide)
    parameters = dict(layer.named_parameters())
    e = layer.experts
    act = F.silu if case.experts == "gated" else F.gelu
    # The layer's limit follows the most tokens of any rank.
    limit = case.setting.limit(tokens=max(case.tokens), top_k=case.k, num_experts=case.num_experts)
    xs, ys = [], []
    for rank in range(len(case.tokens)):
        x = case.x(rank).detach().to(wide).requires_grad_()
        scores = (x @ layer.gate.weight.T).softmax(-1)
        chosen = scores.topk(case.k, dim=-1)
        weights = chosen.values / chosen.values.sum(-1, keepdim=True)
        weights = weights * kept_slots(chosen.indices, limit)
        mixed = torch.zeros_like(scores).scatter(-1, chosen.indices, weights)
        up = torch.einsum("tm,ehm->teh", x, e.up_proj) + (e.up_bias if case.bias else 0)
        if case.experts == "gated":
            hidden = act(torch.einsum("tm,ehm->teh", x, e.gate_proj) + (e.gate_bias if case.bias else 0)) * up
        else:
            hidden = act(up)
        out = torch.einsum("teh,emh->tem", hidden, e.down_proj) + (e.down_bias if case.bias else 0)
        xs.append(x)
        ys.append((mixed.unsqueeze(-1) * out).sum(1))
    loss = sum((y * case.grad(rank)).sum() for rank, y in enumerate(ys))
    grads = torch.autograd.grad(loss, [*xs, *parameters.values()])
    whole = dict(zip(parameters, grads[len(xs) :]))
    placed = Placement(num_experts=case.num_experts, hidden_dim=case.hidden_dim, world=len(xs))
    answers = []
    for rank, y in enumerate(ys):
        own, part = placed.experts_of(rank), {}
        for name, g in whole.items():
            if name.startswith("experts."):
                g = g[own.start : own.stop]
                sliced = 2 if name.endswith("down_proj") else 1
                at = placed.part_of(rank, g.shape[sliced])
                g = g.narrow(sliced, at.start, len(at))
            part[name] = g
        answers.append(
            Answer(y=y.detach(), grad_x=grads[rank], gradients=part, bytes_tokens=0, bytes_weights=0, exchange="")
        )
    return answers


def check(case: Case, answers: list[Answer]) -> None:
    wanted = expected(replace(case, plan=Plan(), ranks_per_node=None))

    def close(given: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        error = relative_error(given, expected)
        # Low precision rounds in between, which the float64 reference does not.
        slack = 1 if case.dtype in (torch.float64, torch.float32) else 2
        assert error <= slack * TOLERANCE[case.dtype], f"{what}: relative error {error:.1e} in {case}"

    for rank, (given, want) in enumerate(zip(answers, wanted, strict=True)):
        close(given.y, want.y, f"y of rank {rank}")
        close(given.grad_x, want.grad_x, f"gradient of x of rank {rank}")
        for name, g in given.gradients.items():
            if name.startswith("experts."):
                close(g, want.gradients[name], f"gradient of {name} of rank {rank}")
    # The router is replicated: each rank has the gradient of its own tokens.
    gate = torch.stack([a.gradients["gate.weight"] for a in answers]).sum(0)
    close(gate, wanted[0].gradients["gate.weight"], "gradient of the router, summed over ranks")
