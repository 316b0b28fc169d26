"""Calls of a few tokens without a gradient give what ordinary calls give, and are only made where nothing differs."""

import copy
import pickle
import weakref

import pytest
import torch

from tests.cases import tensor
from tests.tolerance import assert_close
from tutelx import Capacity, MoE, Plan, monitor
from tutelx.base import _LastCall
from tutelx.brief import BriefCalls
from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.gates import Switch, TopK, TopKGate
from tutelx.planner import FixedPlanner, RulePlanner
from tutelx.scheduler import Scheduler, default_planner


@pytest.fixture(params=["with the gate", "after the gate"])
def brief(request, monkeypatch):
    """Lists the calls that ran as one operator."""
    calls = []
    end = _LastCall.end

    def counted(last, decision, *others):
        if "asked once" in decision.reason:
            calls.append(decision)
        end(last, decision, *others)

    monkeypatch.setattr(_LastCall, "end", counted)
    if request.param == "after the gate":
        monkeypatch.setattr(TopKGate, "router", lambda gate: None)
    return calls


def make(dtype=torch.float32, **options):
    torch.manual_seed(0)
    options = {"gate": TopK(k=2), "planner": RulePlanner(), **options}
    return MoE(16, 24, 8, dtype=dtype, **options).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (7, 16), (2, 3, 16), (64, 16), (0, 16)], ids=str)
@torch.no_grad()
def test_equals_an_ordinary_call(shape, dtype, brief):
    layer, x = make(dtype, bias=True), tensor(*shape, dtype=dtype)
    layer(tensor(*shape, dtype=dtype, seed=1))
    assert len(brief) == 0
    expected = layer(x, plan=Plan())
    stats = layer.stats
    assert len(brief) == 0
    y = layer(x)
    assert len(brief) == 1
    assert torch.equal(y, expected)
    assert torch.equal(layer.stats.tokens_per_expert, stats.tokens_per_expert)
    assert layer.stats.dropped == 0
    assert layer.stats.needed_capacity_factor == stats.needed_capacity_factor
    assert float(layer.aux_loss) == 0


@torch.no_grad()
def test_the_decision_says_so(brief):
    layer = make()
    layer(tensor(3, 16))
    first = layer.last_decision
    layer(tensor(3, 16, seed=1))
    assert len(brief) == 1
    assert (layer.last_decision.plan, layer.last_decision.source) == (first.plan, first.source)
    assert layer.last_decision.reason == f"{first.reason}; asked once for 3 tokens without a gradient"


@torch.no_grad()
def test_another_k_of_a_call(brief):
    layer, x = make(), tensor(3, 16)
    for _ in range(2):
        assert_close(layer(x, top_k=3), layer(x, top_k=3, plan=Plan()))
    assert len(brief) == 1


def runs(layer, x, brief, times=3, **call):
    """How many of some calls were brief."""
    before = len(brief)
    for _ in range(times):
        layer(x, **call)
    return len(brief) - before


@torch.no_grad()
def test_where_anything_differs_the_call_is_an_ordinary_one(brief):
    x = tensor(3, 16)
    assert runs(make(), x, brief) == 2
    assert runs(make(), tensor(65, 16), brief) == 0
    assert runs(make(torch.float64), x.double(), brief) == 0
    assert runs(make(), x, brief, capacity=Capacity.fixed(1.0)) == 0
    assert runs(make(), x, brief, plan=Plan()) == 0
    assert runs(make(capacity=Capacity.bounded(1.0)), x, brief) == 0
    assert runs(make(batch_prioritized=True), x, brief) == 0
    assert runs(make(planner=FixedPlanner(Plan())), x, brief) == 0  # its plan can be set
    assert runs(make(planner=Scheduler((), "online")), x, brief) == 0
    assert runs(make(planner=Scheduler((), "fixed", plan=Plan(layout="padded"))), x, brief) == 0
    assert runs(make(planner=Scheduler(())), x, brief) == 2
    assert runs(make(expert_dropout=0.5), x, brief) == 2
    assert runs(make(expert_dropout=0.5).train(), x, brief) == 0
    with torch.enable_grad():
        assert runs(make(), x, brief) == 0
        assert runs(make().requires_grad_(False), x, brief) == 2
        assert runs(make().requires_grad_(False), tensor(3, 16, grad=True), brief) == 0
        router_trained, experts_trained = make().requires_grad_(False), make().requires_grad_(False)
        router_trained.gate.weight.requires_grad_()
        assert runs(router_trained, x, brief) == 0
        experts_trained.experts.down_proj.requires_grad_()
        assert runs(experts_trained, x, brief) == 0
        assert experts_trained(x).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert runs(make(), x, brief) == 0
    with torch.profiler.profile():
        assert runs(make(), x, brief) == 0


@torch.no_grad()
def test_changes_after_the_first_call_are_seen(brief, tmp_path):
    layer, x = make(), tensor(3, 16)
    assert runs(layer, x, brief) == 2
    with monitor.Monitor(layer, jsonl=tmp_path / "calls.jsonl"):
        assert runs(layer, x, brief) == 0
    seen = []
    hook = layer.experts.register_forward_hook(lambda *args: seen.append(args))
    assert (runs(layer, x, brief), len(seen)) == (0, 3)
    hook.remove()
    layer.planner = FixedPlanner(Plan(layout="padded"))
    assert runs(layer, x, brief) == 0
    assert layer.last_decision.plan.layout == "padded"
    layer.planner = RulePlanner()
    assert runs(layer, x, brief) == 2
    layer.bfloat16()
    assert runs(layer, x.bfloat16(), brief) == 2
    layer.experts.up_proj.zero_()
    assert layer(x.bfloat16()).abs().max() == 0


def replace_up(layer):
    layer.experts.up_proj = torch.nn.Parameter(-layer.experts.up_proj)


def swap_gate_and_up(layer):
    experts = layer.experts
    gate, up = experts.gate_proj, experts.up_proj
    parameters = {"up_proj": gate, "gate_proj": up, "down_proj": experts.down_proj}  # equal values in equal order
    experts._parameters.clear()
    experts._parameters.update(parameters)


def parametrize(layer):
    torch.nn.utils.parametrize.register_parametrization(layer.experts, "down_proj", Doubled())
    layer.experts.parametrizations.down_proj.original.mul_(3)


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


CHANGES = {
    "another parameter": replace_up,
    "parameters under each other's names": swap_gate_and_up,
    "a parametrization": parametrize,
    "another activation": lambda layer: setattr(layer.experts, "activation", "relu"),
    "another configuration": lambda layer: setattr(layer.gate, "config", TopK(k=2, score="sigmoid")),
    "another gate": lambda layer: setattr(layer, "gate", make(gate=TopK(k=3)).gate),
    "another k": lambda layer: setattr(layer, "top_k", 4),
    "a capacity": lambda layer: setattr(layer, "capacity", Capacity.fixed(0.5)),
    "training": lambda layer: layer.train(),
    "weights in their place": lambda layer: layer.load_state_dict(make(activation="relu").state_dict(), assign=True),
    "values in their place": lambda layer: layer.experts.down_proj.data.mul_(2),
    "in float64": lambda layer: layer.double().float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_calls_like_one_before_see_every_change(change, brief):
    layer, x = make(), tensor(3, 16)
    assert runs(layer, x, brief, times=4) == 3
    change(layer)
    expected = copy.deepcopy(layer)(x)
    for _ in range(3):
        assert torch.equal(layer(x), expected)


SAME_PARAMETERS = {"values in their place", "in float64"}


@pytest.mark.parametrize("name", sorted(CHANGES.keys() - SAME_PARAMETERS))
@torch.no_grad()
def test_a_call_like_one_before_asks_for_nothing(name, monkeypatch):
    asked = []
    general = BriefCalls.gate_and_run
    monkeypatch.setattr(BriefCalls, "gate_and_run", lambda *args: asked.append(args) or general(*args))
    layer, others = make(top_k=2), [tensor(3, 16), tensor(1, 4, 16), tensor(16)]
    for _ in range(2):
        for x in others:
            layer(x)
    assert len(asked) == 6
    for x in others:
        assert torch.equal(layer(x), layer(x, plan=Plan()))
    assert len(asked) == 6
    CHANGES[name](layer)
    layer(others[0])
    assert len(asked) == 7


@torch.no_grad()
def test_a_change_while_a_call_runs_is_seen(monkeypatch):
    layer, x = make(), tensor(3, 16)
    layer(x)
    network = layer.experts.network

    def changed_after():
        found = network()
        replace_up(layer)
        return found

    monkeypatch.setattr(type(layer.experts), "network", lambda experts: changed_after())
    layer(x)
    monkeypatch.undo()
    assert torch.equal(layer(x), layer(x, plan=Plan()))


@torch.no_grad()
def test_weights_that_others_took_the_place_of_are_freed(brief):
    layer, x = make(), tensor(3, 16)
    runs(layer, x, brief, times=4)
    before = weakref.ref(layer.experts.up_proj)
    layer.load_state_dict(make().state_dict(), assign=True)
    assert before() is None
    last = weakref.ref(layer.experts.up_proj)
    runs(layer, x, brief, times=4)
    del layer
    assert last() is None


@pytest.mark.parametrize("config", [TopK(k=3, normalize=False), TopK(k=2, score="sigmoid")], ids=str)
@torch.no_grad()
def test_every_setting_of_the_gate(config, brief):
    layer, x = make(gate=config), tensor(5, 16)
    y, stats = layer(x), layer.stats
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.stats.tokens_per_expert, stats.tokens_per_expert)
    assert len(brief) == 1


@torch.no_grad()
def test_a_gate_that_does_more_is_called():
    class Noted(TopKGate):
        def forward(self, *args, **named):
            calls.append(self)
            return super().forward(*args, **named)

    def hook(gate, *_):
        calls.append(gate)

    calls: list = []
    x = tensor(3, 16)
    hooked, trained = make(), make()
    hooked.gate.register_forward_hook(hook)
    trained.gate.train()
    trained.gate.register_forward_pre_hook(hook)
    for layer in (make(gate=Noted(TopK(), 16, 8)), hooked, trained):
        before = len(calls)
        for _ in range(3):
            layer(x)
        assert len(calls) == before + 3
    for config in (Switch(), TopK(fp32_router=True)):
        layer = make(gate=config)
        assert torch.equal(layer(x), layer(x))
        assert layer.gate.router() is None if hasattr(layer.gate, "router") else True


@torch.no_grad()
def test_threads_are_part_of_what_was_asked(brief):
    layer, x, threads = make(), tensor(3, 16), torch.get_num_threads()
    layer(x)
    try:
        torch.set_num_threads(threads + 1)
        assert runs(layer, x, brief) == 2
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_a_copy_asks_for_itself(brief):
    layer, x = make(planner=default_planner()), tensor(3, 16)
    layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert runs(other, x, brief) == 2
        assert torch.equal(other(x), layer(x))


@torch.no_grad()
def test_errors_are_the_same(brief):
    layer, x = make(), tensor(3, 16)
    layer(x)
    with pytest.raises(ValueError, match="not a number"):
        layer(x * float("nan"))
    with pytest.raises(InvalidTypeError, match="bfloat16"):
        layer(x.bfloat16())
    with pytest.raises(InvalidValueError, match="model_dim=16"):
        layer(x[:, :5])
