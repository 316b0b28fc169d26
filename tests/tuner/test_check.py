"""The reference against numbers worked by hand and against autograd of the whole; what the checker finds."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from tutelx.tuner.cases import Subject
from tutelx.tuner.check import TOLERANCE, Checker, reference
from tutelx.tuner.grid import World, workload
from tutelx.tuner.shapes import Shape
from tutelx.types import Plan


def case_of(shape, tokens=6, top_k=2, training=True, group=None, world=None):
    subject = Subject(shape=shape, group=group, ranks_per_node=None, device=torch.device("cpu"), seed=1)
    return subject.case(workload(shape, world or World(), tokens, top_k, 1.5, training=training))


def test_by_hand():
    # One expert of size 1: y = w * down * silu(gate * x) * up * x, with x = 2, w = 1 (normalised), all weights 1:
    # silu(2) = 2 * 0.88079708 = 1.76159416, y = 1.76159416 * 2 = 3.52318831.
    case = case_of(Shape(model_dim=1, hidden_dim=1, num_experts=1, dtype="float64"), tokens=1, top_k=1)
    with torch.no_grad():
        for p in case.subject.layer.parameters():
            p.fill_(1.0)
        case.inputs.x_TM.fill_(2.0)
        case.inputs.grad_TM.fill_(1.0)
    found = reference(case)
    assert found["y"].item() == pytest.approx(3.52318831, abs=1e-8)
    assert found["routing weights"].item() == pytest.approx(3.52318831, abs=1e-8)
    assert found["experts.down_proj"].item() == pytest.approx(3.52318831, abs=1e-8)
    # d silu(g)/dg at 2 = s + 2 s (1 - s) = 0.88079708 + 2 * 0.10499359 = 1.09078425, times up * x = 2, times x = 2.
    assert found["experts.gate_proj"].item() == pytest.approx(4.36313702, abs=1e-7)


@pytest.mark.parametrize("experts", ["gated", "ffn"])
@pytest.mark.parametrize("bias", [False, True])
def test_against_one_graph_of_everything(experts, bias):
    case = case_of(Shape(model_dim=3, hidden_dim=5, num_experts=4, experts=experts, bias=bias, dtype="float64"))
    layer = case.subject.layer.experts
    leaves = {f"experts.{name}": p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    x, w = (t.detach().clone().requires_grad_() for t in (case.inputs.x_TM, case.inputs.weights_TK))
    y = []
    for t, ids in enumerate(case.inputs.ids_TK.tolist()):
        total = torch.zeros(3, dtype=torch.float64)
        for k, e in enumerate(ids):
            one = {name.removeprefix("experts."): p[e] for name, p in leaves.items()}
            hidden = F.linear(x[t], one["up_proj"], one.get("up_bias"))
            if experts == "gated":
                hidden = F.silu(F.linear(x[t], one["gate_proj"], one.get("gate_bias"))) * hidden
            else:
                hidden = F.gelu(hidden)
            total = total + w[t, k] * F.linear(hidden, one["down_proj"], one.get("down_bias"))
        y.append(total)
    torch.stack(y).backward(case.inputs.grad_TM)
    found = reference(case)
    expected = {"y": torch.stack(y).detach(), "x": x.grad, "routing weights": w.grad}
    expected |= {name: p.grad for name, p in leaves.items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_is_right_within_the_tolerance_and_a_scaled_one_is_not(dtype, training):
    case = case_of(Shape(model_dim=16, hidden_dim=32, num_experts=4, dtype=dtype), tokens=40, training=training)
    limit = TOLERANCE[getattr(torch, dtype)]
    checker = Checker(reference(case))
    results = case.results(Plan())
    assert results.keys() == ({"y", "x", "routing weights", "experts.gate_proj", "experts.up_proj", "experts.down_proj"}
                              if training else {"y"})  # fmt: skip
    assert checker.error(results) <= limit
    for name in results:
        wrong = {**results, name: results[name] * 1.5}
        assert checker.error(wrong) > limit, name


def test_one_wrong_element_shows_and_oddities_are_infinite():
    expected = {"y": torch.tensor([4.0, -8.0]), "x": torch.tensor([1.0])}
    checker = Checker(expected)
    assert checker.error(expected) == 0.0
    # The largest expected value is 8: 0.08 of difference is 1%.
    assert checker.error({**expected, "y": torch.tensor([4.08, -8.0])}) == pytest.approx(0.01, rel=1e-4)
    assert checker.error({**expected, "y": torch.tensor([float("nan"), -8.0])}) == math.inf
    assert checker.error({**expected, "y": torch.zeros(3)}) == math.inf
    assert checker.error({"y": expected["y"]}) == math.inf
    checker.also({"y": torch.tensor([4.0, -8.8]), "x": torch.tensor([1.0])})
    assert checker.error(expected) == pytest.approx(0.1, rel=1e-4)


def test_a_gradient_that_cancels_is_noise():
    checker = Checker({"y": torch.ones(1), "a": torch.tensor([1.0]), "b": torch.tensor([1e-12])})
    assert checker.error({"y": torch.ones(1), "a": torch.tensor([1.0]), "b": torch.tensor([2e-12])}) < 1e-9


def errors(group, num_experts, plans):
    shape = Shape(model_dim=4, hidden_dim=8, num_experts=num_experts, bias=True, dtype="float64")
    case = case_of(shape, group=group, world=World(world=dist.get_world_size(group)))
    checker = Checker(reference(case))
    return [checker.error(case.results(plan)) for plan in plans]


@pytest.mark.parametrize(("num_experts", "members"), [(5, (0, 1)), (2, (0, 1, 2, 3))])
def test_every_rank_has_its_part(ranks, num_experts, members):
    # Five experts on two ranks are dealt 3 and 2; two on four ranks are cut in halves.
    plans = [Plan(), Plan(shard_degree=0), Plan(pipeline_degree=2, layout="padded")]
    for found in ranks(4).run(errors, num_experts, plans, ranks=members):
        assert max(found) <= 1e-10
