"""Whole layers on CUDA: equal to the CPU, without a wait for the device, captured in a graph."""

import copy

import pytest
import torch

import tutelx
from tests import models
from tests.cases import tensor
from tests.gpu.conftest import no_waiting
from tests.tolerance import TOLERANCE, assert_close, relative_error
from tests.wrap.compare import assert_same, tokens, wrapped
from tutelx import Capacity, MoE, Plan, ops
from tutelx.gates import TopK
from tutelx.ops.expert_products import groupable
from tutelx.ops.packing import is_packed
from tutelx.planner import FixedPlanner

BMM = Plan(layout="padded", expert_kernel="bmm")
GROUPED = Plan(expert_kernel="grouped")
PLANS = [Plan(), Plan(layout="padded"), BMM]


def gradients(layer: MoE, x: torch.Tensor, **call) -> list[torch.Tensor]:
    y = layer(x, **call)
    grad = tensor(*y.shape, seed=5).to(y)
    return [y, *torch.autograd.grad((y * grad).sum() + layer.aux_loss, [x, *layer.parameters()])]


def skip_unless_grouped() -> None:
    if not groupable(4, 16, 16, torch.bfloat16, torch.device("cuda", 0)):
        pytest.skip("grouped products would wait for this device")


@pytest.mark.parametrize("plan", [None, *PLANS], ids=str)
@pytest.mark.parametrize("experts", ["gated", "ffn"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_the_cpu(plan, experts, dtype):
    layer = MoE(12, 20, 5, experts=experts, bias=True, gate=TopK(k=2, z_coef=0.1), dtype=dtype)
    x = tensor(33, 12, dtype=dtype)
    expected = gradients(layer, x.clone().requires_grad_())
    twin = copy.deepcopy(layer).cuda()
    given = gradients(twin, x.cuda().requires_grad_(), plan=plan)
    for i, (a, b) in enumerate(zip(given, expected)):
        assert relative_error(a.cpu(), b) <= TOLERANCE[dtype], f"output or gradient {i}"


@pytest.mark.parametrize("layout", ["ragged", "padded"])
def test_grouped_equals_one_by_one(layout):
    skip_unless_grouped()
    layer = MoE(64, 128, 8, bias=True, dtype=torch.bfloat16, device="cuda")
    x = tensor(300, 64, dtype=torch.bfloat16).cuda().requires_grad_()
    expected = gradients(layer, x, plan=Plan(layout=layout))
    given = gradients(layer, x, plan=Plan(layout=layout, expert_kernel="grouped"))
    for i, (a, b) in enumerate(zip(given, expected)):
        assert relative_error(a, b) <= 2 * TOLERANCE[torch.bfloat16], f"output or gradient {i}"
    layer(x)
    assert layer.last_decision.plan == GROUPED, "what the rules choose"


def test_no_tokens():
    layer = MoE(16, 32, 4, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros((0, 16), dtype=torch.bfloat16, device="cuda", requires_grad=True)
    assert all(not g.any() for g in gradients(layer, x))


@pytest.mark.parametrize("plan", [BMM, GROUPED], ids=str)
def test_no_wait_for_the_device(plan):
    if plan is GROUPED:
        skip_unless_grouped()
    capacity = Capacity.fixed(1.5) if plan is BMM else Capacity.dropless()
    layer = MoE(64, 128, 8, gate=TopK(k=2, z_coef=0.1), capacity=capacity, dtype=torch.bfloat16, device="cuda")
    layer.planner = FixedPlanner(plan)
    x = tensor(300, 64, dtype=torch.bfloat16).cuda().requires_grad_()
    gradients(layer, x)  # what is loaded or tuned on first use may wait
    grad = torch.ones_like(x)
    with no_waiting():
        y = layer(x)
        torch.autograd.grad((y * grad).sum() + layer.aux_loss, [x, *layer.parameters()])


def test_the_one_op_that_waits():
    """A padded map without a capacity has to know the fullest expert. It also shows that a wait would be seen."""
    ids = torch.zeros((5, 2), dtype=torch.int32, device="cuda")
    with no_waiting():
        ops.route(ids, 3)
        ops.route(ids, 3, 4)
        with pytest.raises(RuntimeError, match="synchroniz"):
            ops.route(ids, 3, layout="padded")


@pytest.mark.parametrize("plan", [BMM, GROUPED], ids=str)
def test_a_graph_of_forward_and_backward(plan):
    if plan is GROUPED:
        skip_unless_grouped()
    layer = MoE(64, 128, 8, capacity=Capacity.fixed(1.25), dtype=torch.bfloat16, device="cuda")
    layer.planner = FixedPlanner(plan)
    x = tensor(256, 64, dtype=torch.bfloat16).cuda().requires_grad_()
    weigh = tensor(256, 64, dtype=torch.bfloat16, seed=1).cuda()
    leaves = [x, *layer.parameters()]

    def step() -> list[torch.Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad((y * weigh).sum() + layer.aux_loss, leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (2, 3):
        with torch.no_grad():
            x.copy_(tensor(256, 64, dtype=torch.bfloat16, seed=seed))
        graph.replay()
        for a, b in zip(captured, step()):
            assert_close(a, b, torch.bfloat16)


@pytest.mark.parametrize("style", [models.MoE, models.Unnormalized, models.Renormalized, models.Sigmoid])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_wrapped_layers(style, dtype):
    original = style(num_experts=8).to("cuda", dtype)
    layer = wrapped(copy.deepcopy(original), verify=True)
    for count in (0, 1, 7, 200):
        assert_same(layer, original, tokens(count, 16, dtype=dtype).cuda())


def test_a_wrapped_layer_in_grouped_products():
    skip_unless_grouped()
    original = models.MoE(model_dim=64, hidden_dim=128, num_experts=8).to("cuda", torch.bfloat16)
    layer = wrapped(copy.deepcopy(original))
    assert_same(layer, original, tokens(200, 64, dtype=torch.bfloat16).cuda(), dtype=torch.bfloat16)
    assert layer.last_decision.plan == GROUPED


def test_a_wrapped_list_packs_itself_and_is_captured():
    """Expert weights move into one storage in the first call; a captured call reads what the optimizer wrote since."""
    skip_unless_grouped()
    layer = wrapped(models.MoE(model_dim=64, hidden_dim=128, num_experts=8).to("cuda", torch.bfloat16))
    weights = [expert.w1.weight for expert in layer.experts]
    x = tokens(256, 64, dtype=torch.bfloat16).cuda()

    def call() -> torch.Tensor:
        return layer(x, capacity=Capacity.fixed(1.25), plan=GROUPED)

    with torch.no_grad():
        call()
        assert is_packed(weights)
        with no_waiting():
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for weight in weights:
            weight.mul_(1.5)
        graph.replay()
        assert_close(captured, call(), torch.bfloat16)


def test_autocast():
    layer = MoE(64, 128, 4, device="cuda")
    x = tensor(200, 64).cuda().requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.experts.up_proj.grad.dtype == torch.float32
    assert relative_error(y, layer(x)) < 0.05


def test_a_checkpointed_layer():
    layer = tutelx.MoE(16, 32, 4, dtype=torch.float64, device="cuda")
    x = tensor(10, 16, dtype=torch.float64).cuda().requires_grad_()
    plain = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(plain, torch.autograd.grad(y.sum(), [x, *layer.parameters()])))
