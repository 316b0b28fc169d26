"""Every MoE family of the installed transformers: a tiny random model as the library runs it, and wrapped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")

import tutelx
from tests.tolerance import relative_error
from tests.transformers.families import Family, build, experts_of, families, narrowed
from tutelx.integrations.transformers import setting_of

FAMILIES = families()
# Their routers work in float32 whatever the model does.
SINGLE = {"inkling2"}


@pytest.fixture(params=FAMILIES, ids=str)
def family(request) -> Family:
    return request.param


def dtype_of(family: Family) -> torch.dtype:
    return torch.float32 if family.name in SINGLE else torch.float64


# Routers and gates that work in float32 turn the last bit of a float64 into one of a float32.
LIMIT = {torch.float64: 1e-5, torch.float32: 1e-4}


def run(model: nn.Module, ids: torch.Tensor, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Outputs (logits, loss, router logits), and every gradient of the loss; of a sum where the model has no loss."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)  # dropout and jitter
    options = {name: value for name, value in options.items() if hasattr(model.config, name)}
    labels = {"labels": ids % 2} if type(model).__name__.endswith("ForTokenClassification") else {}
    if type(model).__name__.endswith("ForCausalLM"):
        labels = {"labels": ids}
    out = model(input_ids=ids, **labels, **options)
    main = out.logits if "logits" in out else out.last_hidden_state
    weigh = torch.randn(main.shape, generator=torch.Generator().manual_seed(4)).to(main)
    loss = out.loss if out.get("loss") is not None else (main * weigh).sum()
    loss.backward()
    outputs = {"main": main, "loss": loss}
    for i, logits in enumerate(out.get("router_logits") or ()):
        outputs[f"router {i}"] = logits
    return {name: value.detach() for name, value in outputs.items()}, {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


def tokens() -> torch.Tensor:
    return torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(2))


def assert_same(given: tuple, expected: tuple, limit: float) -> None:
    (outputs, grads), (expected_outputs, expected_grads) = given, expected
    assert outputs.keys() == expected_outputs.keys()
    for name, theirs in expected_outputs.items():
        assert relative_error(outputs[name], theirs) <= limit, name
    floor = 1e-2 * max(float(g.abs().max()) for g in expected_grads.values() if g is not None)
    for name, theirs in expected_grads.items():
        ours = grads[name]
        assert (ours is None) == (theirs is None), name
        if theirs is not None:
            error = float((ours - theirs).abs().max()) / max(floor, float(theirs.abs().max()))
            assert error <= limit, f"gradient of {name}: relative error {error:.2e}"


def test_the_scan_finds_the_families():
    names = {family.name for family in FAMILIES}
    assert {"mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe"} <= names


def test_wrapped_as_written(family, tmp_path):
    model = build(family, dtype=dtype_of(family))
    experts = experts_of(model)
    assert experts, "the tiny model has no experts"
    assert {type(module).__name__ for module in experts.values()} <= set(family.experts)
    keys, ids, limit = list(model.state_dict()), tokens(), LIMIT[dtype_of(family)]
    expected = {mode: run(model.train(mode), ids, output_router_logits=True) for mode in (False, True)}

    assert tutelx.wrap(model, strict=True) is model
    assert list(model.state_dict()) == keys
    for mode, theirs in expected.items():
        assert_same(run(model.train(mode), ids, output_router_logits=True), theirs, limit)
    seen = [setting_of(module).stats for module in experts.values()]
    assert any(stats is not None and int(stats.tokens_per_expert.sum()) > 0 for stats in seen)

    model.eval().save_pretrained(tmp_path)
    assert "tutelx" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="tutelx", dtype=dtype_of(family))
    assert list(loaded.state_dict()) == keys
    assert_same(run(loaded.eval(), ids, output_router_logits=True), expected[False], limit)

    tutelx.unwrap(model)
    assert model.config._experts_implementation == "eager"


def pinned(model: nn.Module, routing: list[tuple[torch.Tensor, torch.Tensor]], *, record: bool) -> list:
    """Hooks on the experts that record what the router chose, or put what was recorded in its place."""
    given = iter(list(routing))

    def hook(module, args):
        hidden, index, weights = args
        if record:
            routing.append((index.clone(), weights.detach().clone()))
            return args
        index, recorded = next(given)
        return hidden, index, recorded.to(weights.dtype)

    return [module.register_forward_pre_hook(hook) for module in experts_of(model).values()]


# Where a rounding in the experts moves one behind them, the errors of both come out anywhere around each other.
NOISE = 2.0


def test_bfloat16_with_the_routing_pinned(family):
    """Both against the model in float64: tutelx is no further from it than the library's eager experts."""
    wide = build(family, dtype=dtype_of(family))
    narrow = narrowed(copy.deepcopy(wide))
    wide = copy.deepcopy(narrow).to(dtype_of(family))  # the very same weights
    routing: list = []
    pinned(wide, routing, record=True)
    ids = tokens()
    exact, exact_grads = run(wide, ids)
    hooks = pinned(narrow, routing, record=False)
    eager, eager_grads = run(narrow, ids)
    for hook in hooks:
        hook.remove()
    tutelx.wrap(narrow, strict=True)
    pinned(narrow, routing, record=False)
    ours, our_grads = run(narrow, ids)
    assert deviation(ours["main"], exact["main"]) <= NOISE * deviation(eager["main"], exact["main"])
    trained = [name for name, grad in exact_grads.items() if ".experts." in name and grad is not None]
    assert trained
    given, expected = (
        sum(deviation(grads[name], exact_grads[name]) for name in trained) for grads in (our_grads, eager_grads)
    )
    assert given <= NOISE * expected


def deviation(given: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of the difference over the norm; 0 where both are nothing."""
    difference = float((given.double() - exact.double()).norm())
    return difference / float(exact.double().norm()) if difference else 0.0
