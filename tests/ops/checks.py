"""One check an op, for any device: outputs and all gradients against the references in float64 on the CPU."""

import itertools

import torch

from tests.cases import Case, expert_ids, tensor
from tests.tolerance import TOLERANCE, assert_close, relative_error
from tutelx import ops
from tutelx.ops import reference
from tutelx.types import DispatchMap

CAPACITIES = [(None, "ragged"), (3, "padded"), (2, "ragged")]
NAMES = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


def mapped(case: Case, capacity: int | None, layout: str, device: str = "cpu") -> DispatchMap:
    return ops.route(expert_ids(case).to(device), case.num_experts, capacity, layout=layout)


def as_lists(map: DispatchMap):
    return map.dest.tolist(), map.source.tolist(), map.counts.tolist(), map.offsets.tolist()


def leaf(*shape: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    return tensor(*shape, dtype=dtype, seed=seed).to(device).requires_grad_()


def wide(value: torch.Tensor) -> torch.Tensor:
    """The same numbers in float64 on the CPU, as a leaf."""
    return value.detach().cpu().double().requires_grad_()


def on_cpu(map: DispatchMap) -> DispatchMap:
    tensors = {name: getattr(map, name).cpu() for name in ("dest", "source", "counts", "offsets")}
    return DispatchMap(**tensors, num_experts=map.num_experts, layout=map.layout, capacity=map.capacity)


def check_route(case: Case, capacity: int | None, layout: str, device: str = "cpu", order=None) -> None:
    ids = expert_ids(case)
    given = None if order is None else order.to(device)
    map = ops.route(ids.to(device), case.num_experts, capacity, layout=layout, order=given)
    assert as_lists(map) == reference.route(ids, case.num_experts, capacity, layout=layout, order=order)


def check_encode(case: Case, capacity: int | None, layout: str, dtype: torch.dtype, device: str = "cpu") -> None:
    map = mapped(case, capacity, layout, device)
    x = leaf(case.tokens, case.dim, dtype=dtype, device=device)
    rows = ops.encode(x, map)
    if case.tokens == 0:
        assert rows.shape == (map.num_rows, case.dim)
        return
    assert torch.equal(rows.cpu(), reference.encode(x.cpu(), on_cpu(map)))
    grad_rows = tensor(*rows.shape, dtype=dtype, seed=1)
    (grad_x,) = torch.autograd.grad(rows, x, grad_rows.to(device))
    x64 = wide(x)
    (expected,) = torch.autograd.grad(reference.encode(x64, on_cpu(map)), x64, grad_rows.double())
    assert_close(grad_x.cpu(), expected, what="grad_x")


def check_decode(
    case: Case, capacity: int | None, layout: str, dtype: torch.dtype, weights_dtype: torch.dtype, device: str = "cpu"
) -> None:
    map = mapped(case, capacity, layout, device)
    rows = leaf(map.num_rows, case.dim, dtype=dtype, device=device)
    weights = leaf(case.tokens, case.top_k, dtype=weights_dtype, seed=2, device=device)
    y = ops.decode(rows, map, weights)
    assert y.dtype == dtype
    if case.tokens == 0:
        assert y.shape == (0, case.dim)
        return
    rows64, weights64 = wide(rows), wide(weights)
    expected = reference.decode(rows64, on_cpu(map), weights64)
    assert_close(y.cpu(), expected, what="y")
    grad_y = tensor(*y.shape, dtype=dtype, seed=3)
    grads = torch.autograd.grad(y, (rows, weights), grad_y.to(device))
    wanted = torch.autograd.grad(expected, (rows64, weights64), grad_y.double())
    for name, given, want in zip(("grad_rows", "grad_weights"), grads, wanted):
        assert_close(given.cpu(), want, what=name)
    assert torch.equal(grads[1][map.dest < 0], torch.zeros_like(grads[1][map.dest < 0])), "dropped slots"
    assert torch.equal(grads[0][map.source < 0], torch.zeros_like(grads[0][map.source < 0])), "empty rows"


def check_gate(tokens: int, experts: int, top_k: int, dtype: torch.dtype, device: str = "cpu", **options) -> None:
    """options: score, normalize, and those of groups; biased: with a bias."""
    logits = leaf(tokens, experts, dtype=dtype, device=device)
    logits64 = wide(logits)
    bias = tensor(experts, seed=5) / 4 if options.pop("biased", False) else None
    given = ops.gate(logits, top_k, bias=bias if bias is None else bias.to(device), **options)
    expected = reference.gate(logits64, top_k, bias=bias, **options)
    assert torch.equal(given.expert_ids.cpu(), expected[0])
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    for name, a, b in zip(("weights", "score_sum", "logsumexp"), given[1:], expected[1:]):
        assert a.dtype == kind
        assert_close(a.cpu(), b, what=name)
    grads = [tensor(*v.shape, dtype=kind, seed=i) for i, v in enumerate(given[1:])]
    (grad,) = torch.autograd.grad(given[1:], logits, [g.to(device) for g in grads])
    (want,) = torch.autograd.grad(expected[1:], logits64, [g.double() for g in grads])
    assert_close(grad.cpu(), want, what="grad_logits")


def check_activation(dtype: torch.dtype, kind: str, gated: bool, device: str = "cpu") -> None:
    inputs = [torch.linspace(-30, 30, 1001, dtype=torch.float64).to(dtype).to(device).requires_grad_()]
    if gated:
        inputs.append(leaf(1001, dtype=dtype, device=device))
    out = ops.activation(*inputs, kind=kind)
    inputs64 = [wide(v) for v in inputs]
    expected = reference.activation(*inputs64, kind=kind)
    assert_close(out.cpu(), expected)
    given = torch.autograd.grad(out.sum(), inputs)
    for a, b in zip(given, torch.autograd.grad(expected.sum(), inputs64)):
        assert_close(a.cpu(), b)


def moved(weights: ops.ExpertWeights, device: str) -> ops.ExpertWeights:
    """Leaves there of the same numbers."""
    lists = {n: tuple(w.detach().to(device).requires_grad_() for w in getattr(weights, n)) for n in NAMES}
    return ops.ExpertWeights(**lists)


def check_expert_ffn(case, map, weights, dtype, device="cpu", run=ops.expert_ffn, **options) -> None:
    """run: what computes it; options go there, `activation` to the reference as well."""
    rows = leaf(map.num_rows, case.dim, dtype=dtype, seed=9, device=device)
    with torch.no_grad():
        rows[map.source < 0] = 0
    out = run(rows, map, weights, **options)
    wide_weights = ops.ExpertWeights(**{n: tuple(wide(w) for w in getattr(weights, n)) for n in NAMES})
    rows64 = wide(rows)
    expected = reference.expert_ffn(rows64, on_cpu(map), wide_weights, activation=options.get("activation", "silu"))
    assert_close(out.cpu(), expected, what="out")
    grad = tensor(*out.shape, dtype=dtype, seed=10)
    inputs = [rows, *itertools.chain(*weights.lists())]
    wanted = torch.autograd.grad(
        expected, [rows64, *itertools.chain(*wide_weights.lists())], grad.double(), allow_unused=True
    )
    given = torch.autograd.grad(out, inputs, grad.to(device), allow_unused=True)
    for i, (a, b) in enumerate(zip(given, wanted)):
        # Low precision rounds the hidden values in between, which the float64 reference does not.
        slack = 1 if dtype in (torch.float64, torch.float32) else 2
        error = relative_error(a.cpu(), torch.zeros(a.shape) if b is None else b)
        assert error <= slack * TOLERANCE[dtype], f"gradient {i}: {error:.1e}"
