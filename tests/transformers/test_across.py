"""A wrapped model whose experts are shared among two ranks, each with its own tokens, against the whole model."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="transformers is not installed")

import tutelx
from tests.tolerance import relative_error
from tests.transformers.families import build, experts_of, families
from tests.transformers.test_families import tokens
from tutelx.errors import InvalidValueError
from tutelx.integrations.transformers import setting_of, whole_state_dict
from tutelx.wrapping import explain


def small(name: str):
    (family,) = [each for each in families() if each.name == name]
    return build(family, dtype=torch.float64)


def run(model, ids) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def shared(group, name, folder):
    """This rank's logits and gradients, the experts' whole, and what became of state and parameters."""
    rank = dist.get_rank(group)
    model = small(name)
    before = dict(model.named_parameters())
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    tutelx.wrap(model, mesh=group, strict=True)
    assert all(before[key] is parameter for key, parameter in model.named_parameters())
    assert all(report.already for report in explain(model))
    logits, grads = run(model, tokens()[rank : rank + 1, : 7 - 2 * rank])  # unequal token counts
    held = {}
    for path, module in experts_of(model).items():
        assert module.down_proj.shape[0] == 2, "half of the experts"
        assert setting_of(module).last_decision.plan.shard_degree == 1
        for key, shard in module._expert_shards.items():
            held[f"{path}.{key}"] = shard.whole(grads.pop(f"{path}.{key}")).full_tensor()
    state = whole_state_dict(model)
    assert all(torch.equal(state[key], value) for key, value in whole.items())
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
    model.load_state_dict({key: 2 * value for key, value in whole.items()})
    tutelx.unwrap(model)
    assert all(torch.equal(value, 2 * whole[key]) for key, value in model.state_dict().items())
    assert all(before[key] is parameter for key, parameter in model.named_parameters())
    return logits, grads, held


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_two_ranks_are_the_whole_model(ranks, name, tmp_path):
    results = ranks(2).run(shared, name, str(tmp_path))
    model = small(name)
    total: dict[str, torch.Tensor] = {}
    for rank, (logits, grads, held) in enumerate(results):
        expected, expected_grads = run(model, tokens()[rank : rank + 1, : 7 - 2 * rank])
        assert relative_error(logits, expected) <= 1e-6
        for key, grad in expected_grads.items():
            if key in held:
                total[key] = total.get(key, 0) + grad
            else:
                assert relative_error(grads[key], grad) <= 1e-6, key
    for key, grad in results[0][2].items():
        assert relative_error(grad, total[key]) <= 1e-6, key
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def refused(group):
    from tests import models

    with pytest.raises(InvalidValueError, match="only experts of transformers are shared by wrap"):
        tutelx.wrap(models.MoE(), mesh=group)
    model = tutelx.wrap(small("qwen3_moe"))
    with pytest.raises(InvalidValueError, match=r"is wrapped already: .* unwrap it first"):
        tutelx.wrap(model, mesh=group)
    tutelx.unwrap(model)
    experts = model.model.layers[1].mlp.experts
    experts.scale = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    with pytest.raises(InvalidValueError, match=r"scale of shape \(3,\) belongs to all experts together"):
        tutelx.wrap(model, mesh=group)
    assert model.config._experts_implementation == "eager", "nothing is switched"
    assert experts.down_proj.shape[0] == 4


def test_what_cannot_be_shared(ranks):
    ranks(2).run(refused)
