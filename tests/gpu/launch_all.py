"""Launches every CUDA kernel at odd sizes, for compute-sanitizer to watch; compares nothing.

Run with PYTORCH_NO_CUDA_MEMORY_CACHING=1, or an access behind one tensor lands in its neighbour's block.
"""

from __future__ import annotations

import torch

from tutelx import ops
from tutelx.ops.activation import ACTIVATIONS
from tutelx.testing.cases import DTYPES, ODD_CASES, Case, expert_ids, tensor

# Several blocks and chunks; rows of whole vectors, of one element more, and of rounds that end early.
CASES = [
    *ODD_CASES[1:],
    Case(tokens=3001, top_k=2, num_experts=37, dim=64, unused=0.1),
    Case(tokens=65, top_k=1, num_experts=4, dim=3400),
    Case(tokens=33, top_k=9, num_experts=16, dim=1033, skew=0.3),
]
LAYOUTS = [(None, "ragged"), (3, "ragged"), (5, "padded"), (None, "padded")]
GATES = [(7, 3, 3), (33, 17, 2), (129, 64, 6), (5, 130, 40), (3, 257, 8), (3, 600, 8), (2, 1024, 9), (0, 8, 2)]


def on_device(*shape: int, dtype: torch.dtype, seed: int = 0, shift: int = 0) -> torch.Tensor:
    """A leaf; `shift` elements behind the beginning of its memory."""
    flat = tensor(shift + torch.Size(shape).numel(), dtype=dtype, seed=seed).cuda()
    return flat[shift:].view(shape).requires_grad_()


def rows(case: Case, dtype: torch.dtype, shift: int) -> None:
    ids = expert_ids(case).cuda()
    for capacity, layout in LAYOUTS:
        order = torch.randperm(case.tokens).int().cuda() if layout == "padded" else None
        map = ops.route(ids, case.num_experts, capacity, layout=layout, order=order)
        x = on_device(case.tokens, case.dim, dtype=dtype, shift=shift)
        encoded = ops.encode(x, map)
        for weights_dtype in dict.fromkeys((dtype, torch.float32)):
            weights = on_device(case.tokens, case.top_k, dtype=weights_dtype, seed=1)
            y = ops.decode(encoded, map, weights)
            torch.autograd.grad(y, (x, weights), y.detach(), retain_graph=True)
        ops.clear_empty(encoded.detach().clone(), map)


def gates(dtype: torch.dtype) -> None:
    for tokens, experts, top_k in GATES:
        for score in ("softmax", "sigmoid"):
            logits = on_device(tokens, experts, dtype=dtype)
            gated = ops.gate(logits, top_k, score=score)
            torch.autograd.grad(gated[1:], logits, [g.detach() for g in gated[1:]])
            num_groups = experts if experts <= 256 else 1
            ops.gate(logits, 1, score=score, bias=gated.score_sum.detach(), num_groups=num_groups, best_of_group=2)


def activations(dtype: torch.dtype, shift: int) -> None:
    for n, h in ((1, 1), (5, 33), (7, 1032)):
        gate, up = (on_device(n, h, dtype=dtype, seed=seed, shift=shift) for seed in (1, 2))
        for kind in ACTIVATIONS:
            for inputs in ((gate, up), (gate,)):
                out = ops.activation(*inputs, kind=kind)
                torch.autograd.grad(out, inputs, out.detach())


def main() -> None:
    for dtype in DTYPES:
        gates(dtype)
        for shift in (0, 1):
            activations(dtype, shift)
            for case in CASES:
                rows(case, dtype, shift)
    torch.cuda.synchronize()
    print("every kernel was launched")


if __name__ == "__main__":
    main()
