"""What `wrap` and `unwrap` do to a model, and what they leave as it was."""

import copy
import io
import logging
import random

import pytest
import torch
from torch import nn

import tutelx
from tests import models
from tests.wrap.compare import assert_same, run, tokens, wrapped
from tutelx.wrapping import WrappedMoE, explain, unwrap, wrap


def two_layers() -> nn.Sequential:
    return models.model(models.MoE(), models.Renormalized(expert=models.FFN))


def replaced(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, WrappedMoE)]


def test_every_layer_of_a_model_is_replaced():
    model = two_layers()
    original = copy.deepcopy(model)
    assert wrap(model) is model
    assert replaced(model) == ["0.moe", "1.moe"]
    assert_same(model, original, tokens(2, 9, 16))


def test_public_names():
    assert tutelx.wrap is wrap
    assert tutelx.unwrap is unwrap


def test_state_dict_and_parameters_are_the_same():
    model = two_layers()
    before, parameters = model.state_dict(), dict(model.named_parameters())
    modules = [name for name, _ in model.named_modules()]
    wrap(model)
    assert list(model.state_dict()) == list(before)
    assert [name for name, _ in model.named_modules()] == modules
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_load_both_ways(assign):
    theirs, ours = two_layers(), wrap(two_layers())
    x = tokens(12, 16)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()), assign=assign)
    assert_same(ours, theirs, x)
    other = wrap(two_layers())
    theirs.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert_same(other, theirs, x)


def test_parameters_replaced_after_wrapping_are_the_ones_used():
    layer = models.MoE()
    ours = wrapped(layer)
    ours.load_state_dict(models.MoE().state_dict(), assign=True)
    expected = layer(tokens(5, 16))
    torch.testing.assert_close(ours(tokens(5, 16)), expected)
    ours.double()
    assert ours(tokens(5, 16, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_made_before_steps_the_same(make):
    theirs = models.model(models.MoE(num_experts=8), models.Unnormalized(num_experts=8)).double()
    ours = copy.deepcopy(theirs)
    optimizers = [make(module.parameters(), lr=0.01, weight_decay=0.1) for module in (theirs, ours)]
    wrap(ours)
    for step in range(3):
        x = tokens(2, 16, dtype=torch.float64, seed=step)  # few tokens: most experts get none
        for module, optimizer in zip((theirs, ours), optimizers):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    # AdamW divides by no less than its eps of 1e-8: the last bit of a vanishing gradient, 1e-16, becomes lr * 1e-8.
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-9, atol=1e-9)


def test_unwrap_gives_back_the_very_modules():
    model = two_layers()
    layers = [block.moe for block in model]
    children = [dict(layer.named_modules()) for layer in layers]
    assert unwrap(wrap(model).eval()) is model
    assert replaced(model) == []
    for block, layer, names in zip(model, layers, children):
        assert block.moe is layer
        assert not layer.training
        assert dict(layer.named_modules()) == names
    layer = models.MoE()
    assert unwrap(wrap(layer)) is layer
    assert unwrap(layer) is layer


def test_wrapping_twice_changes_nothing(caplog):
    model = wrap(two_layers())
    layers = [block.moe for block in model]
    with caplog.at_level(logging.INFO, logger="tutelx"):
        assert wrap(model) is model
    assert [block.moe for block in model] == layers
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert wrap(layers[0]) is layers[0]
    assert all(report.already and report.recognised for report in explain(model))


def test_a_layer_in_two_places_becomes_one():
    layer = models.MoE()
    model = wrap(models.model(layer, layer))
    assert isinstance(model[0].moe, WrappedMoE)
    assert model[0].moe is model[1].moe
    unwrap(model)
    assert model[0].moe is model[1].moe is layer


def test_experts_that_are_one_module():
    written = models.MoE(num_experts=4)
    written.experts = nn.ModuleList([*written.experts[:2], *written.experts[:2]])
    layer = wrapped(copy.deepcopy(written), verify=True)
    assert all(type(parameter) is nn.Parameter for parameter in layer.parameters())
    assert_same(layer, written, tokens(9, 16))


@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_copies_are_whole(how):
    model = wrap(two_layers())
    model(tokens(4, 16)).sum().backward()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert replaced(twin) == ["0.moe", "1.moe"]
    assert_same(twin, model, tokens(4, 16))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    shared = {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    assert not shared
    ours, expected = twin(tokens(4, 16)), unwrap(twin)(tokens(4, 16))
    torch.testing.assert_close(ours, expected)
    assert replaced(twin) == []


def test_modes_and_moves_reach_the_children():
    layer = wrapped(models.MoE().eval())
    assert not layer.training
    assert layer.train().experts[0].training
    assert unwrap(layer).training


def test_attributes_of_the_original():
    layer = wrapped(models.MoE(top_k=2))
    assert layer.args.num_experts_per_tok == 2
    assert layer.gate is layer.original.gate
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = layer.nothing
    layer.something_new = 1
    with pytest.raises(AttributeError, match="'args' belongs to the wrapped MoE: unwrap it"):
        layer.args = None


def test_last_call_is_shown():
    layer = wrapped(models.MoE())
    layer(tokens(10, 16))
    assert int(layer.stats.tokens_per_expert.sum()) == 20
    assert layer.last_decision.source == "rule"
    assert float(layer.aux_loss) == 0.0
    assert "top-2 of softmax, normalized" in repr(layer)


def test_capacity_and_planner_are_handed_on():
    planner = tutelx.planner.FixedPlanner(tutelx.Plan(layout="padded"))
    layer = wrapped(models.MoE(), capacity=tutelx.Capacity.fixed(0.5), planner=planner)
    layer(tokens(40, 16))
    assert layer.stats.dropped > 0
    assert layer.last_decision.source == "fixed"


def test_a_child_replaced_after_wrapping_is_replaced_in_both():
    layer = wrapped(models.MoE())
    layer.gate = nn.Linear(16, 4)
    assert layer.original.gate is layer.gate
    x = tokens(7, 16)
    torch.testing.assert_close(layer(x), unwrap(layer)(x))


class Adapter(nn.Module):
    """What a LoRA library puts in the place of a Linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("style", [models.MoE, models.Unnormalized])
@pytest.mark.parametrize("what", ["adapter", "hook", "prune"])
def test_experts_changed_after_wrapping(style, what):
    layer = wrapped(style(num_experts=6, top_k=2))
    expert = layer.experts[3]
    if what == "adapter":
        expert.w1 = Adapter(expert.w1)
    elif what == "hook":
        expert.w2.register_forward_hook(lambda module, args, out: out * 2)
    else:
        torch.nn.utils.parametrizations.weight_norm(expert.w3)
    for count in (1, 40):
        x = tokens(count, 16)
        (y, grads), (expected, expected_grads) = run(layer, x), run(layer.original, x)
        torch.testing.assert_close(y, expected)
        for name, theirs in expected_grads.items():
            assert (grads[name] is None) == (theirs is None), name
            if theirs is not None:
                torch.testing.assert_close(grads[name], theirs, rtol=1e-4, atol=1e-6)


def test_frozen_parameters_stay_frozen():
    layer = models.MoE()
    layer.experts[0].w1.weight.requires_grad_(False)
    layer.gate.weight.requires_grad_(False)
    ours = wrapped(copy.deepcopy(layer))
    assert_same(ours, layer, tokens(20, 16))
    assert ours.gate.weight.grad is None


class BigBatchesDiffer(models.MoE):
    """What no small probe can see."""

    def forward(self, x):
        return super().forward(x) * (1.01 if x.numel() > 32 * 16 else 1.0)


def test_verify_runs_both():
    for style in (models.MoE, models.Unnormalized):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            wrapped(style(num_experts=8).to(dtype), verify=True)
    model = models.model(models.MoE(), BigBatchesDiffer())
    message = (
        r"1\.moe \(BigBatchesDiffer\): the .* differs by a relative error of 9\.9.e-03, tolerance 1e-05 \(torch.float"
    )
    with pytest.raises(tutelx.errors.ParityError, match=message):
        wrap(model, verify=True)
    assert replaced(model) == []
    wrap(model)
    assert replaced(model) == ["0.moe", "1.moe"]


class Detached(models.MoE):
    def choose(self, logits, k):
        return super().choose(logits.detach(), k)


def test_gradients_are_part_of_the_numbers():
    (report,) = explain(Detached())
    assert report.attribute == "gate.weight"
    assert "has another gradient" in report.reason


class Drawing(models.MoE):
    """Draws random numbers that do not matter."""

    def forward(self, x):
        return super().forward(x) + 0 * (torch.rand_like(x) + random.random())


@pytest.mark.parametrize("declined", [False, True])
def test_probing_leaves_no_trace(declined):
    layer = Drawing().train()
    layer.experts[1].eval()
    layer.history = [1]
    if declined:
        layer.register_forward_hook(print)
    run(layer.requires_grad_(), tokens(5, 16))
    state = {module: dict(vars(module)) for module in layer.modules()}
    tensors = {name: (p, p.detach().clone(), p.grad.clone(), p._version) for name, p in layer.named_parameters()}
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    explain(layer)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert {module: dict(vars(module)) for module in layer.modules()} == state
    for name, parameter in layer.named_parameters():
        own, value, grad, version = tensors[name]
        assert parameter is own
        assert parameter._version == version
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.grad, grad)


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_any_surroundings(context):
    layer = models.MoE()
    with context():
        ours = wrapped(layer, verify=True)
    assert_same(ours, layer, tokens(6, 16))


@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16)])
def test_layers_of_one_rank(shape):
    class OneRank(models.MoE):
        def forward(self, x):
            assert x.dim() == len(shape)
            return super().forward(x)

    layer = OneRank()
    assert_same(wrapped(copy.deepcopy(layer), verify=True), layer, tokens(*shape))


def test_wrong_arguments_are_named():
    with pytest.raises(tutelx.errors.InvalidTypeError, match="module is int"):
        wrap(3)
    with pytest.raises(tutelx.errors.InvalidTypeError, match="module is dict"):
        unwrap({})
    with pytest.raises(tutelx.errors.InvalidTypeError, match=r"capacity is float, expected tutelx.Capacity"):
        wrap(models.MoE(), capacity=1.25)


def test_a_model_without_moe_layers(caplog):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    assert wrap(model) is model
    assert "nothing in this Sequential was recognised" in caplog.text
    assert explain(model) == []
