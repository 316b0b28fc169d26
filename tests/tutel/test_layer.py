"""The layer on one process against the reference, and what a script can read of it and tell it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.tolerance import assert_close
from tests.tutel import reference
from tutelx import Plan
from tutelx.integrations.tutel import moe
from tutelx.planner import FixedPlanner

M, H, E = 6, 8, 4
ROUTING = [
    {"k": 1, "factor": 1.0},
    {"k": 2, "factor": 0.5},
    {"k": 2, "factor": 0},
    {"k": 3, "factor": -0.4},
    {"k": 9, "factor": 2.0},
    {"k": 2, "factor": 0.5, "overlap": 3},
]


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(experts=None, gate=None, **arguments):
    experts = {"type": "ffn", "num_experts_per_device": E, "hidden_size_per_expert": H, **(experts or {})}
    return moe.moe_layer({"type": "top", "k": 2, **(gate or {})}, M, experts, **arguments)


def with_biases(layer):
    """Biases that are not zero, as they are at the start."""
    for name, parameter in layer.experts.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return layer


def check(layer, x, expected_y, expected_loss, forward=None):
    """y, loss and every gradient; the expectation is made of the layer's own parameters."""
    grads = []
    for y, loss in ((expected_y, expected_loss), (None, None)):
        layer.zero_grad()
        x.grad = None
        if y is None:
            y = layer(x, **(forward or {}))
            loss = layer.l_aux
            assert y.l_aux is loss
            assert_close(y, expected_y)
            assert_close(loss, expected_loss)
        (y.square().sum() + loss).backward()
        grads.append({"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}})
    for name, expected in grads[0].items():
        given = grads[1][name]
        if given is None:
            assert expected is None
        else:  # a bias that an activation ignores, a gate that one choice does not ask, has zeros here
            assert_close(given, torch.zeros_like(given) if expected is None else expected, what=name)


def expected(layer, x, *, top_k, factor, overlap=1, experts=None, **options):
    if experts is None:
        own = layer.experts
        experts = reference.feed_forward(
            own.batched_fc1_w, own.batched_fc2_w, own.batched_fc1_bias, own.batched_fc2_bias, own.activation_fn
        )
    top_k = min(top_k, E)
    capacity = reference.rows_allowed(factor, len(x), top_k, E, overlap) if factor else None
    return reference.layer(x, F.linear(x, layer.gates[0].wg.weight), experts, top_k=top_k, capacity=capacity, **options)


@pytest.mark.parametrize("routing", ROUTING, ids=str)
@pytest.mark.parametrize("activation", [F.relu, torch.tanh])
def test_routing(float64, routing, activation):
    k, factor, overlap = routing["k"], routing["factor"], routing.get("overlap", 1)
    layer = with_biases(build({"activation_fn": activation}, {"k": k, "capacity_factor": factor}))
    x = torch.randn(11, M, requires_grad=True)
    wanted = expected(layer, x, top_k=k, factor=factor, overlap=overlap)
    check(layer, x, *wanted, forward={"a2a_ffn_overlap_degree": overlap})


@pytest.mark.parametrize(
    ("experts", "arguments", "options"),
    [
        ({}, {"normalize_gate": False}, {"normalize": False}),
        ({}, {"batch_prioritized_routing": True}, {"by_priority": True}),
        ({}, {"is_postscore": False}, {"before": True}),
        ({"activation_fn": torch.tanh}, {"is_postscore": False}, {"before": True}),
        ({"has_fc1_bias": False}, {}, {}),
        ({"has_fc2_bias": False}, {}, {}),
        ({"output_dim": 3}, {}, {}),
        ({"output_dim": 9, "has_fc1_bias": False}, {}, {}),
        ({}, {"planner": FixedPlanner(Plan(layout="padded", expert_kernel="bmm"))}, {}),
    ],
    ids=str,
)
def test_options(float64, experts, arguments, options):
    layer = with_biases(build(experts, {"capacity_factor": 0.5}, **arguments))
    x = torch.randn(11, M, requires_grad=True)
    check(layer, x, *expected(layer, x, top_k=2, factor=0.5, **options))


@pytest.mark.parametrize("activation", [F.silu, torch.tanh])
def test_llama_experts(float64, activation):
    layer = build({"type": "llama_ffn", "activation_fn": activation})
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter *= 30
    x = torch.randn(9, M, requires_grad=True)
    whole = [getattr(layer.experts, name).view(E, *shape) for name, *shape in (("W_fc1", M, H), ("W_fc2", M, H))]
    experts = reference.llama(*whole, layer.experts.W_fc3.view(E, H, M), activation)
    check(layer, x, *expected(layer, x, top_k=2, factor=1.0, experts=experts))


def test_an_activation_that_is_given_the_experts(float64):
    layer = build({"activation_fn_with_self": lambda x, experts: torch.tanh(x) * experts.batched_fc1_w.shape[1]})
    x = torch.randn(9, M, requires_grad=True)
    own = layer.experts
    weights = own.batched_fc1_w, own.batched_fc2_w, own.batched_fc1_bias, own.batched_fc2_bias
    experts = reference.feed_forward(*weights, activation=lambda h: torch.tanh(h) * H)
    check(layer, x, *expected(layer, x, top_k=2, factor=1.0, experts=experts))


def test_cosine_gate(float64):
    layer = build(gate={"type": "cosine_top", "proj_dim": 5, "init_t": 0.5, "capacity_factor": 0})
    gate, x = layer.gates[0], torch.randn(9, M, requires_grad=True)
    projected = x @ gate.cosine_projector.weight.T + gate.cosine_projector.bias
    cosine = (projected / projected.norm(dim=1, keepdim=True)) @ (gate.sim_matrix / gate.sim_matrix.norm(dim=0))
    own = layer.experts
    experts = reference.feed_forward(own.batched_fc1_w, own.batched_fc2_w, own.batched_fc1_bias, own.batched_fc2_bias)
    # The scale starts at 1/0.5.
    assert gate.temperature.exp().item() == pytest.approx(2.0)
    check(layer, x, *reference.layer(x, cosine * gate.temperature.exp(), experts, top_k=2, capacity=None))


def test_noise_and_the_loss_of_importance_and_load(float64):
    layer = build(gate={"gate_noise": 1.5, "capacity_factor": 0}, is_gshard_loss=False)
    x = torch.randn(9, M)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    logits = F.linear(x, layer.gates[0].wg.weight)
    noisy = logits + 1.5 * torch.randn_like(logits) / E
    own = layer.experts
    experts = reference.feed_forward(own.batched_fc1_w, own.batched_fc2_w)
    assert_close(y, reference.layer(x, noisy, experts, top_k=2, capacity=None)[0])
    scores = F.softmax(logits, dim=1)
    second = noisy.topk(2, dim=1).values[:, 1:]
    load = torch.distributions.Normal(0.0, 1.5 / E).cdf(scores - second).sum(dim=0)
    cv = [(v.var() / v.mean() ** 2) for v in (scores.sum(dim=0), load)]
    assert_close(layer.l_aux, (cv[0] + cv[1]) / 2)
    layer.eval()
    assert_close(layer(x), reference.layer(x, logits, experts, top_k=2, capacity=None)[0])
    with pytest.raises(ValueError, match=r"gate_noise=0\.0"):
        build(is_gshard_loss=False)(x)


def test_the_numbers_at_the_start():
    """Experts one after the other, fc1 then fc2, uniform in +-1/sqrt(fan_in); three seeds."""
    layer = build(seeds=(11, 12, 13))
    after = torch.rand(3)
    torch.manual_seed(12)
    for e in range(E):
        for weight, fan_in in ((layer.experts.batched_fc1_w, M), (layer.experts.batched_fc2_w, H)):
            bound = fan_in**-0.5
            assert torch.equal(weight[e], torch.rand(H, M) * (2 * bound) - bound)
    assert not layer.experts.batched_fc1_bias.any()
    assert not layer.experts.batched_fc2_bias.any()
    torch.manual_seed(11)
    assert torch.equal(layer.gates[0].wg.weight, nn.Linear(M, E, bias=False).weight)
    torch.manual_seed(13)
    assert torch.equal(after, torch.rand(3))
    two = moe.moe_layer(
        [{"type": "top"}, {"type": "top", "k": 3}], M, {"type": "ffn", "hidden_size_per_expert": H}, seeds=(5,)
    )
    torch.manual_seed(6)  # the second gate has the next seed
    assert torch.equal(two.gates[1].wg.weight, nn.Linear(M, 1, bias=False).weight)


def test_what_a_call_may_say(float64):
    layer = with_biases(build())
    layer.gates.append(copy.deepcopy(layer.gates[0]))
    layer.gates[1].wg = layer.gates[0].wg
    layer.gates[1].top_k, layer.gates[1].capacity_factor = 1, 0
    x = torch.randn(9, M, requires_grad=True)
    check(layer, x, *expected(layer, x, top_k=3, factor=0.5), forward={"top_k": 3, "capacity_factor": 0.5})
    check(layer, x, *expected(layer, x, top_k=1, factor=0), forward={"gate_index": 1, "inequivalent_tokens": True})
    chosen = layer.gates[0](x).topk(2, dim=1).indices.flatten()
    layer(x, a2a_ffn_overlap_degree=4, adaptive_r=0)
    assert layer.dispatch_count.tolist() == [(chosen == e).sum() for e in range(E)]
    # Both hold until the next call says otherwise.
    layer(x)
    assert (layer.a2a_ffn_overlap_degree, layer.adaptive_degree) == (4, 0)
    with torch.no_grad():
        # 2 * floor(0.5 * 3) = 2 rows, in whole blocks of 4.
        wanted = expected(layer, x, top_k=2, factor=0.5, overlap=4)[0]
        assert_close(layer(x, capacity_factor=0.5, megablocks_size=4, a2a_ffn_overlap_degree=1), wanted)
        assert layer.megablocks_size == 4
    layer(x, megablocks_size=4)
    assert layer.megablocks_size == 0  # sparse blocks are for inference


def test_what_a_script_reads():
    layer = build()
    assert (layer.num_global_experts, layer.num_local_experts, layer.sharded_count) == (4, 4, 1)
    assert (layer.valid_rs, layer.adaptive_degree, layer.world_size) == ([0, 1], 1, 1)
    assert [n for n, _ in layer.get_parameter_iterator("gate")] == ["0.wg.weight"]
    assert next(n for n, _ in layer.get_parameter_iterator(param_type="local_experts")) == "batched_fc1_w"
    assert all(p._tutel_expert for p in layer.experts.parameters())
    assert moe.moe_layer.global_expert_count(3) == 3
    assert layer.l_aux is None
    with torch.no_grad():
        assert layer(torch.randn(2, 3, M)).l_aux is not None


def test_what_is_given_stays_as_it_was():
    gate = {"type": "top", "k": 2, "capacity_factor": 0.0}
    experts = {"type": "ffn", "count_per_node": 2, "hidden_size_per_expert": H, "activation_fn": F.relu}
    before = dict(gate), dict(experts)
    seen = []
    layer = moe.moe_layer(
        gate_type=gate,
        model_dim=M,
        experts=experts,
        scan_expert_func=lambda n, p: seen.append(n),
        result_func=lambda y: (y, 7),
    )
    assert (gate, experts) == before
    assert seen == ["batched_fc1_w", "batched_fc2_w", "batched_fc1_bias", "batched_fc2_bias"]
    assert layer(torch.randn(3, M))[1] == 7


class OwnGate(nn.Module):
    def __init__(self, model_dim, num_global_experts, top_k):
        super().__init__()
        self.top_k = top_k
        self.mine = nn.Linear(model_dim, num_global_experts, bias=False)

    def forward(self, x):
        return self.mine(x)


class OwnExperts(nn.Module):
    """Tokens of two dimensions [2, 3], of which it makes [3, 4]."""

    def __init__(self, model_dim, local_experts, sharded_count, scale):
        super().__init__()
        assert (model_dim, local_experts, sharded_count) == (M, E, 1)
        self.W = nn.Parameter(torch.randn(local_experts, 6, 12))
        self.scale = scale

    def forward(self, x, ctx):
        assert x.shape[0] == ctx.num_local_experts
        assert x.shape[2:] == (2, 3)
        assert ctx.dispatch_count.sum() == 2 * 8
        return (self.scale * (x.flatten(2) @ self.W)).unflatten(2, (3, 4))


def test_own_gate_and_experts(float64):
    layer = moe.moe_layer(
        {"type": "custom", "module": OwnGate, "top_k": 2},
        M,
        {"type": "custom", "module": OwnExperts, "num_experts_per_device": E, "scale": 0.5},
    )
    assert (layer.gates[0].gate_noise, layer.gates[0].capacity_factor) == (0.0, 1.0)
    assert list(layer.state_dict()) == ["_num_global_experts", "experts.W", "gates.0.mine.weight"]
    x = torch.randn(4, 2, 2, 3)
    y = layer(x, reserve_dims=2)
    experts = [lambda token, e=e: 0.5 * token @ layer.experts.W[e] for e in range(E)]
    capacity = reference.rows_allowed(1.0, 8, 2, E)
    flat = x.view(8, M)
    wanted = reference.layer(flat, F.linear(flat, layer.gates[0].mine.weight), experts, top_k=2, capacity=capacity)
    assert_close(y, wanted[0].view(4, 2, 3, 4))


def test_a_capacity_that_truncates_to_nothing(float64):
    # floor(0.3 * ceil(8/4)) = 0; the balanced share asks for ceil(0.3 * 2 * 8 / 4) = 2 rows.
    layer = build(gate={"capacity_factor": 0.3})
    x = torch.randn(8, M)
    own = layer.experts
    experts = reference.feed_forward(own.batched_fc1_w, own.batched_fc2_w)
    logits = F.linear(x, layer.gates[0].wg.weight)
    assert_close(layer(x), reference.layer(x, logits, experts, top_k=2, capacity=2)[0])


@pytest.mark.parametrize("activation", [F.relu, torch.tanh])
@pytest.mark.parametrize("factor", [1.0, 0, -1.0])
def test_without_a_token(activation, factor):
    layer = build({"activation_fn": activation}, {"capacity_factor": factor})
    x = torch.randn(2, 0, M, requires_grad=True)
    y = layer(x)
    assert y.shape == (2, 0, M)
    (y.sum() + layer.l_aux).backward()
    assert x.grad.shape == x.shape
    assert layer.l_aux.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


def test_an_odd_model_dim(float64):
    layer = moe.moe_layer({"type": "top", "k": 1}, 5, {"type": "ffn", "hidden_size_per_expert": 3})
    x = torch.randn(4, 5)
    own = layer.experts
    experts = reference.feed_forward(own.batched_fc1_w, own.batched_fc2_w)
    assert_close(layer(x), reference.layer(x, layer.gates[0](x), experts, top_k=1, capacity=None)[0])


def test_low_precision_is_rounded_once(monkeypatch):
    """bfloat16 rows stay bfloat16 on their way, and the router may be float32."""
    from tutelx import ops

    seen = []
    for name in ("encode", "decode"):
        original = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda rows, *a, _f=original: seen.append(rows.dtype) or _f(rows, *a))
    layer = build(gate={"k": E, "fp32_gate": True, "capacity_factor": 0}).bfloat16()
    x = torch.randn(33, M).bfloat16()
    y = layer(x)
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert layer.gates[0].wg.weight.dtype == torch.bfloat16  # what was converted stays so
    wide = copy.deepcopy(layer).double()
    own = wide.experts
    experts = reference.feed_forward(own.batched_fc1_w, own.batched_fc2_w, own.batched_fc1_bias, own.batched_fc2_bias)
    wanted, _ = reference.layer(x.double(), wide.gates[0](x.double()), experts, top_k=E, capacity=None)
    assert y.dtype == torch.bfloat16
    assert_close(y, wanted, torch.bfloat16)


def test_inputs_of_another_dtype_and_autocast():
    layer = build(gate={"k": E, "capacity_factor": 0})
    x = torch.randn(9, M)
    y = layer(x)
    assert layer(x.double()).dtype == torch.float64
    assert_close(layer(x.double()), y.double(), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.float32
    assert_close(low, y, torch.bfloat16)


def test_a_copy_runs_alone():
    layer = build()
    x = torch.randn(9, M)
    y = layer(x)
    again = copy.deepcopy(layer)
    assert again.l_aux is None
    assert torch.equal(again(x), y)


def test_skipped(monkeypatch):
    monkeypatch.setenv("SKIP_MOE", "1")
    layer, x = build(result_func=lambda y: (y, y.l_aux)), torch.randn(4, M)
    y, loss = layer(x)
    assert torch.equal(y, x)
    assert loss is None
    monkeypatch.setenv("SKIP_MOE", "0")
    monkeypatch.setenv("BATCH_PRIO", "1")
    monkeypatch.setenv("CAP_FACTOR", "0.25")
    layer = build()
    assert layer.batch_prioritized
    assert layer.gates[0].capacity_factor == 0.25
