"""MoE against a loop over tokens and experts, for every plan, capacity, K and kind of expert."""

import copy
import io

import pytest
import torch
from torch import nn

import tutelx
from tests.cases import DTYPES, tensor
from tests.tolerance import TOLERANCE, assert_close, relative_error
from tutelx import Capacity, MoE, Plan
from tutelx.gates import TopK, losses

PLANS = [
    Plan(),
    Plan(tile_rows=3, tile_columns=7),
    Plan(layout="padded"),
    Plan(layout="padded", expert_kernel="bmm"),
]


def dense_moe(layer: MoE, x: torch.Tensor, top_k: int | None = None) -> torch.Tensor:
    """Every expert on every token, weighted: the definition, without routing tricks or drops."""
    logits = x @ layer.gate.weight.T
    config = layer.gate.config
    scores = logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()
    chosen = scores.topk(top_k or config.k, dim=-1)
    weights = chosen.values / chosen.values.sum(-1, keepdim=True) if config.normalize else chosen.values
    mask = torch.zeros_like(scores).scatter(-1, chosen.indices, weights)
    e = layer.experts
    acts = {"silu": nn.functional.silu, "gelu": nn.functional.gelu}
    act = acts[e.activation]

    def linear(x, weight, bias):
        return torch.einsum("tei,eoi->teo", x, weight) + (bias if bias is not None else 0)

    x_TEM = x.unsqueeze(1).expand(-1, layer.num_experts, -1)
    biases = [getattr(e, n, None) for n in ("gate_bias", "up_bias", "down_bias")]
    up = linear(x_TEM, e.up_proj, biases[1])
    hidden = act(linear(x_TEM, e.gate_proj, biases[0])) * up if e.gated else act(up)
    return (mask.unsqueeze(-1) * linear(hidden, e.down_proj, biases[2])).sum(1)


def compare(layer, x, expected_of, **call):
    dtype = x.dtype
    parameters = list(layer.parameters())
    y = layer(x, **call)
    grad = tensor(*y.shape, dtype=dtype, seed=5)
    given = torch.autograd.grad(y, [x, *parameters], grad)
    expected = expected_of(x)
    wanted = torch.autograd.grad(expected, [x, *parameters], grad)
    assert_close(y, expected, what="y")
    names = ["x", *(n for n, _ in layer.named_parameters())]
    for name, a, b in zip(names, given, wanted):
        assert relative_error(a, b) <= TOLERANCE[dtype], f"gradient of {name}: {relative_error(a, b):.1e}"


@pytest.mark.parametrize("plan", [None, *PLANS], ids=str)
@pytest.mark.parametrize("experts", ["gated", "ffn"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_the_dense_definition(plan, experts, bias, dtype):
    layer = MoE(12, 20, 5, experts=experts, bias=bias, dtype=dtype)
    x = tensor(33, 12, dtype=dtype, grad=True)
    compare(layer, x, lambda x: dense_moe(layer, x), plan=plan)


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("bias", [True, False])
def test_grouped_products(layout, bias):
    layer = MoE(12, 20, 5, bias=bias)
    x = tensor(33, 12, grad=True)
    compare(layer, x, lambda x: dense_moe(layer, x), plan=Plan(layout=layout, expert_kernel="grouped"))
    assert layer.last_decision.workload.expert_kernels == ("tiled", "bmm", "grouped")
    with pytest.raises(ValueError, match=r"'grouped', but these experts run \('tiled', 'bmm'\) in float64 on cpu"):
        layer.double()(x.double(), plan=Plan(expert_kernel="grouped"))


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_top_k_of_a_call(top_k):
    layer = MoE(12, 20, 5, dtype=torch.float64)
    x = tensor(9, 12, dtype=torch.float64, grad=True)
    compare(layer, x, lambda x: dense_moe(layer, x, top_k), top_k=top_k)
    assert layer.last_decision.workload.top_k == top_k


@pytest.mark.parametrize("gate", [TopK(k=3, score="sigmoid"), TopK(k=2, normalize=False), TopK(k=1)], ids=str)
def test_gates(gate):
    layer = MoE(12, 20, 5, gate=gate, dtype=torch.float64)
    x = tensor(21, 12, dtype=torch.float64, grad=True)
    compare(layer, x, lambda x: dense_moe(layer, x))


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_low_precision(dtype):
    layer = MoE(16, 32, 4, dtype=dtype)
    x = tensor(40, 16, dtype=dtype)
    wide = copy.deepcopy(layer).double()
    # The same choices on both sides: routing in low precision may flip near ties.
    logits = layer.gate.weight.double() @ x.double().T
    assert torch.equal(logits.T.topk(2).indices.int(), layer.gate(x).expert_ids)
    assert_close(layer(x), wide(x.double()), dtype)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_fixed_capacity_drops_what_exceeds_it(plan):
    layer = MoE(6, 8, 2, gate=TopK(k=1), capacity=Capacity.fixed(1.0), dtype=torch.float64)
    with torch.no_grad():
        layer.gate.weight.copy_(torch.stack([torch.ones(6), -torch.ones(6)]))
    x = tensor(8, 6, dtype=torch.float64).abs()  # all tokens want expert 0, which may take 1*8/2 = 4
    y = layer(x, plan=plan)
    assert_close(y[:4], dense_moe(layer, x)[:4])
    assert torch.equal(y[4:], torch.zeros(4, 6, dtype=torch.float64))
    assert layer.stats.tokens_per_expert.tolist() == [8, 0]
    assert layer.stats.dropped == 4
    assert layer.stats.needed_capacity_factor == 2.0
    # Bounded above the need drops nothing; bounded below behaves as fixed; dropless of one call as well.
    assert_close(layer(x, plan=plan, capacity=Capacity.bounded(2.0)), dense_moe(layer, x))
    assert torch.equal(layer(x, plan=plan, capacity=Capacity.bounded(1.0)), y)
    assert_close(layer(x, plan=plan, capacity=Capacity.dropless()), dense_moe(layer, x))
    assert layer.stats.dropped == 0


@pytest.mark.parametrize("plan", [None, *PLANS], ids=str)
def test_empty_batch(plan):
    layer = MoE(6, 8, 3, bias=True)
    x = torch.zeros(0, 6, requires_grad=True)
    y = layer(x, plan=plan)
    assert y.shape == (0, 6)
    (y.sum() + layer.aux_loss).backward()
    assert x.grad.shape == (0, 6)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
    assert (layer.stats.dropped, layer.stats.needed_capacity_factor) == (0, 0.0)


def test_shapes_and_strides():
    layer = MoE(6, 8, 3)
    x = tensor(2, 5, 6)
    y = layer(x)
    assert y.shape == x.shape
    assert torch.equal(layer(x[0, 0]), layer(x[0, 0].unsqueeze(0))[0])
    turned = tensor(6, 5, 2).permute(2, 1, 0)
    assert torch.equal(layer(turned), layer(turned.contiguous()))


def test_one_expert_is_a_plain_network():
    layer = MoE(6, 8, 1, gate=TopK(k=1), dtype=torch.float64)
    x = tensor(4, 6, dtype=torch.float64)
    e = layer.experts
    hidden = nn.functional.silu(x @ e.gate_proj[0].T) * (x @ e.up_proj[0].T)
    assert_close(layer(x), hidden @ e.down_proj[0].T)


class Scale(nn.Module):
    """Multiplies by a number of its own, in place of an expert."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value), dtype=torch.float64))

    def forward(self, x):
        return x * self.value


@pytest.mark.parametrize("plan", [None, Plan(), Plan(layout="padded")], ids=str)
def test_listed_modules(plan):
    layer = MoE(4, 1, 3, gate=TopK(k=3), experts=nn.ModuleList(Scale(v) for v in (1, 10, 100)), dtype=torch.float64)
    x = tensor(5, 4, dtype=torch.float64, grad=True)
    weights = (x @ layer.gate.weight.T).softmax(-1)
    assert_close(layer(x, plan=plan), x * (weights @ torch.tensor([1.0, 10, 100], dtype=torch.float64))[:, None])
    layer(x[:1], top_k=1, plan=plan).sum().backward()
    assert all(e.value.grad is not None for e in layer.experts.experts), "an expert without rows still has a gradient"


def test_batched_module():
    seen = []

    class Batched(nn.Module):
        def forward(self, rows_ECM):
            seen.append(tuple(rows_ECM.shape))
            return rows_ECM * 2

    layer = MoE(4, 1, 3, experts=Batched())
    x = tensor(5, 4)
    assert_close(layer(x), 2 * x)
    assert seen == [(3, int(layer.stats.tokens_per_expert.max()), 4)]
    assert layer.last_decision.plan.layout == "padded"
    assert layer(x[:0]).shape == (0, 4)
    with pytest.raises(ValueError, match=r"plan.layout='ragged', but these experts run \('padded',\)"):
        layer(x, plan=Plan())

    class Shrinks(nn.Module):
        def forward(self, rows):
            return rows[..., :2]

    with pytest.raises(ValueError, match=r"experts returned shape \(3, .*, 2\) for rows of shape"):
        MoE(4, 1, 3, experts=Shrinks())(x)


def test_aux_loss_by_hand():
    # Both tokens choose expert 0 with probability p: f = (1, 0), P = (p, 1-p), loss = 2 * p.
    layer = MoE(2, 4, 2, gate=TopK(k=1, balance_coef=0.5, z_coef=0.1), dtype=torch.float64)
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    x = torch.tensor([[1.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
    layer(x)
    e = torch.e
    expected = 0.5 * 2 * e / (e + 1) + 0.1 * float(torch.log(torch.tensor(e + 1, dtype=torch.float64))) ** 2
    assert layer.aux_loss.item() == pytest.approx(expected, rel=1e-9)
    layer.aux_loss.backward()
    assert layer.gate.weight.grad.abs().sum() > 0
    with torch.no_grad():
        layer(x)
    assert layer.aux_loss.item() == 0


def test_balance_loss_is_one_when_uniform():
    ids = torch.arange(4).reshape(4, 1).int()
    assert losses.switch_balance(ids, torch.ones(4)).item() == 1.0


def test_repeated_calls_give_the_same_bits():
    layer = MoE(32, 64, 8)
    x = tensor(200, 32, grad=True)

    def run():
        y = layer(x)
        return [y, *torch.autograd.grad(y.sum() + layer.aux_loss, [x, *layer.parameters()])]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


def test_copy_pickle_and_state_dict():
    layer = MoE(6, 8, 3)
    x = tensor(4, 6)
    y = layer(x.requires_grad_())
    twin = copy.deepcopy(layer)
    assert twin.last_decision is None
    assert torch.equal(twin(x), y)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)
    assert set(layer.state_dict()) == {"gate.weight", "experts.gate_proj", "experts.up_proj", "experts.down_proj"}


def test_autocast():
    layer = MoE(16, 32, 4)
    x = tensor(20, 16, grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.experts.up_proj.grad.dtype == torch.float32
    assert relative_error(y, layer(x)) < 0.05


def test_checkpointing():
    layer = MoE(8, 16, 4, dtype=torch.float64)
    x = tensor(10, 8, dtype=torch.float64, grad=True)
    plain = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(plain, torch.autograd.grad(y.sum(), [x, *layer.parameters()])))


def test_decision_says_why():
    layer = MoE(6, 8, 3)
    assert layer.last_decision is None
    assert layer.stats is None
    layer(tensor(4, 6))
    decision = layer.last_decision
    assert decision.source == "rule"
    assert decision.reason
    assert decision.workload.demand == int(layer.stats.tokens_per_expert.max())
    assert "needed_capacity_factor" in repr(layer.stats)
    layer(tensor(4, 6), plan=Plan(layout="padded"))
    assert layer.last_decision.source == "call"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model_dim": 0}, ValueError, "model_dim=0 must be at least 1"),
        ({"hidden_dim": -1}, ValueError, "hidden_dim=-1 must be at least 1"),
        ({"num_experts": 0}, ValueError, "num_experts=0 must be at least 1"),
        ({"num_experts": 2.0}, TypeError, "num_experts=2.0 is float, expected int"),
        ({"gate": TopK(k=9)}, ValueError, "k=9 exceeds num_experts=8"),
        ({"experts": "dense"}, ValueError, "experts='dense'"),
        ({"experts": nn.ModuleList([Scale(1)])}, ValueError, "experts holds 1 modules, num_experts=8"),
        ({"capacity": 1.5}, TypeError, "capacity is float, expected tutelx.Capacity"),
        ({"activation": "swish"}, ValueError, "activation='swish' is none of"),
    ],
)
def test_bad_construction(arguments, error, message):
    fields = {"model_dim": 4, "hidden_dim": 8, "num_experts": 8, **arguments}
    with pytest.raises(error, match=message) as caught:
        MoE(**fields)
    assert isinstance(caught.value, tutelx.errors.TutelxError)


def test_bad_calls():
    layer = MoE(6, 8, 3)
    with pytest.raises(ValueError, match=r"x has shape \(4, 5\), expected \[..., model_dim=6\]"):
        layer(tensor(4, 5))
    with pytest.raises(TypeError, match="x is list"):
        layer([1.0])
    with pytest.raises(TypeError, match=r"x is torch.float64, but the layer's weights are torch.float32"):
        layer(tensor(4, 6, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"x is torch.int64"):
        layer(torch.zeros(4, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="top_k=4 exceeds num_experts=3"):
        layer(tensor(4, 6), top_k=4)
    with pytest.raises(ValueError, match="top_k=0"):
        layer(tensor(4, 6), top_k=0)
    x = tensor(4, 6)
    x[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"logits\[1,0\]=nan"):
        layer(x)
