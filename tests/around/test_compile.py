"""torch.compile makes one graph of a layer; torch.export takes its evaluation path; a fixed capacity asks nobody."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

from tests.around.layers import LAYERS, M, assert_same, build, gradients, tokens
from tutelx import Capacity, MoE, Plan
from tutelx.planner import FixedPlanner


@pytest.fixture(autouse=True)
def _forgotten():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", LAYERS)
def test_one_graph(name):
    """Forward, backward and auxiliary loss, for an even load and for one that two experts carry."""
    layer = build(name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x in (tokens(12), tokens(1).expand(12, M)):
        assert_same(gradients(layer, x, compiled), gradients(layer, x))


def test_any_number_of_tokens():
    layer = build("MoE")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for x in (tokens(12), tokens(7)):
        assert_same(gradients(layer, x, compiled), gradients(layer, x))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_one_graph_by_inductor(name):
    layer = build(name)
    assert_same(gradients(layer, tokens(12), torch.compile(layer, fullgraph=True)), gradients(layer, tokens(12)))


def test_a_planner_given_to_the_layer_is_asked_while_tracing():
    layer = MoE(M, 24, 4, planner=FixedPlanner(Plan(layout="padded")), capacity=Capacity.fixed(1.0))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(gradients(layer, tokens(12), compiled), gradients(layer, tokens(12)))
    torch.compile(layer, fullgraph=True, backend="aot_eager")(tokens(12))
    assert layer.last_decision.plan.layout == "padded"


@pytest.mark.parametrize("name", LAYERS)
def test_export_of_the_evaluation_path(name):
    layer = build(name).eval()
    # Rows of a fixed capacity are a number of the graph, so its tokens are too.
    fixed = "capacity" in name
    sizes = None if fixed else ({0: Dim.DYNAMIC},)
    with torch.no_grad():
        program = torch.export.export(layer, (tokens(12),), dynamic_shapes=sizes).module()
        for count in (12,) if fixed else (12, 1, 40):
            x = tokens(count, seed=count)
            torch.testing.assert_close(program(x), layer(x))
    assert {key.split(".")[-1] for key, _ in program.named_parameters()} >= {"weight"}


class NoWaiting(TorchDispatchMode):
    """Raises where the host reads a number or a size that the device has computed."""

    asking = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in self.asking, f"the host waits for {func}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("name", ["MoE, fixed capacity", "wrapped list"])
def test_a_fixed_capacity_asks_the_device_nothing(name, layout):
    """What a CUDA graph needs: sizes that are known before, and nothing read back; tests/gpu captures one."""
    layer = build(name)
    plan = Plan(layout=layout)
    with NoWaiting():
        y = layer(tokens(12), capacity=Capacity.fixed(1.0), plan=plan)
        y.square().sum().backward()
    assert layer.last_decision.plan is plan
    with pytest.raises(AssertionError, match="the host waits for"), NoWaiting():
        layer.stats.dropped  # noqa: B018
