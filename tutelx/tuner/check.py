"""Is a plan right? Its output and all its gradients against plain torch, and against the default plan's.

T tokens of a rank, K choices, E experts, M model dim, n rows of one expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from tutelx.comm.shards import shards_of
from tutelx.tuner.cases import Case, Inputs, Router

# Relative to the largest value of each tensor; a gradient is a long sum of products, rounded where the dtype is narrow.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
NOISE_FLOOR = 1e-2  # a gradient that cancels to nothing counts relative to this share of the largest one
_DOUBLE_WORK = 2e10  # floating-point operations up to which a reference in float64 takes no time to speak of
_PIECE = 2**18  # elements compared at a time, so that what is made for it stays in the cache

Results = dict[str, torch.Tensor]


def reference(case: Case) -> Results:
    """What the case's layer must give, by name: plain products, expert by expert, in float32 or wider.

    The gradients of experts are those of the sum of all ranks' losses, and of this rank's part of them.
    """
    subject, workload, own = case.subject, case.workload, case.inputs
    dtype = _precision(case)
    whole = subject.layer if subject.group is None else subject.build(None, Router())
    ranks = {subject.rank: own}
    if subject.group is not None and workload.training:
        others = (rank for rank in range(workload.world) if rank != subject.rank)
        ranks |= {rank: Inputs.of(workload, rank, subject.seed, subject.device) for rank in others}
    stacked = {name: p.detach() for name, p in whole.named_parameters()}
    placed = shards_of(subject.layer)
    found = {"y": torch.zeros_like(own.x_TM, dtype=dtype)}
    if workload.training:
        found["x"] = torch.zeros_like(found["y"])
        found["routing weights"] = torch.zeros_like(own.weights_TK, dtype=dtype)
        for name, p in subject.layer.named_parameters():
            found[name] = torch.zeros_like(p, dtype=dtype)
    for expert in range(workload.num_experts):
        weights = {name: tensor[expert].to(dtype).requires_grad_(workload.training) for name, tensor in stacked.items()}
        for rank, inputs in ranks.items():
            here = {name: placed[name].index if placed else (slice(None),) for name in stacked}
            kept = {name: index for name, index in here.items() if _holds(index[0], expert)}
            if rank != subject.rank and not kept:
                continue
            for name, grad in _add_expert(found, case, inputs, expert, weights, mine=rank == subject.rank):
                if name in kept:
                    first, *rest = kept[name]
                    found[name][expert - (first.start or 0)] += grad[tuple(rest)]
    return found


def _add_expert(
    found: Results, case: Case, inputs: Inputs, expert: int, weights: Results, *, mine: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Adds what one expert gives for one rank's tokens to this rank's results; yields its weights' gradients."""
    dtype, training = found["y"].dtype, case.workload.training
    tokens, choices = torch.where(inputs.ids_TK == expert)
    if not len(tokens):
        return
    x = inputs.x_TM.detach()[tokens].to(dtype).requires_grad_(training)
    scale = inputs.weights_TK.detach()[tokens, choices].to(dtype).requires_grad_(training)
    with torch.set_grad_enabled(training):
        y = scale.unsqueeze(1) * _network(x, weights, gated=case.subject.shape.experts == "gated")
    if mine:
        found["y"].index_add_(0, tokens, y.detach())
    if not training:
        return
    leaves = {"x": x, "scale": scale, **weights}
    grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), inputs.grad_TM[tokens].to(dtype))))
    if mine:
        found["x"].index_add_(0, tokens, grads["x"])
        found["routing weights"][tokens, choices] = grads["scale"]
    yield from ((name, grads[name]) for name in weights)


def _network(x: torch.Tensor, weights: Results, *, gated: bool) -> torch.Tensor:
    """x [n, M] -> [n, M]: SwiGLU, or two layers with GELU between."""
    parts = {name.rpartition(".")[2]: tensor for name, tensor in weights.items()}
    up = F.linear(x, parts["up_proj"], parts.get("up_bias"))
    hidden = F.silu(F.linear(x, parts["gate_proj"], parts.get("gate_bias"))) * up if gated else F.gelu(up)
    return F.linear(hidden, parts["down_proj"], parts.get("down_bias"))


def _holds(part: slice, expert: int) -> bool:
    return part.start is None or part.start <= expert < part.stop


def _precision(case: Case) -> torch.dtype:
    workload = case.workload
    work = 6 * workload.tokens * workload.top_k * workload.expert_numbers * workload.world
    wide = workload.dtype == "float64" or (workload.dtype == "float32" and work < _DOUBLE_WORK)
    return torch.float64 if wide else torch.float32


class Checker:
    """Compares plans with what is expected of one case.

    error: the largest over output and gradients of max |given - expected| / max |expected|; inf where a value is no
    number or a shape differs.
    """

    def __init__(self, expected: Results) -> None:
        self._expected = [expected]
        sizes = {name: _largest(tensor) for name, tensor in expected.items()}
        floor = NOISE_FLOOR * max((size for name, size in sizes.items() if name != "y"), default=0.0)
        self._scales = {name: size if name == "y" else max(size, floor) for name, size in sizes.items()}

    def also(self, results: Results) -> None:
        """Plans must agree with these too: those of the default."""
        self._expected.append(results)

    def error(self, results: Results) -> float:
        return max(self._error(results, expected) for expected in self._expected)

    def _error(self, results: Results, expected: Results) -> float:
        if results.keys() != expected.keys():
            return math.inf
        return max(_difference(results[name], expected[name], scale) for name, scale in self._scales.items())


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _difference(given: torch.Tensor, expected: torch.Tensor, scale: float) -> float:
    if given.shape != expected.shape:
        return math.inf
    if not given.numel():
        return 0.0
    pieces = zip(given.reshape(-1).split(_PIECE), expected.reshape(-1).split(_PIECE))
    largest = float(torch.stack([_apart(one, other) for one, other in pieces]).max())
    if largest == 0.0:
        return 0.0
    error = largest / scale if scale > 0 else math.inf
    return error if math.isfinite(error) else math.inf


def _apart(given: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(torch.promote_types(given.dtype, expected.dtype), torch.float32)
    return (given.detach().to(wide) - expected.detach().to(wide)).abs_().max().double()
