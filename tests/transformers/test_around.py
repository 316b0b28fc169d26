"""What people do with a model: generate, checkpointing, adapters, compile, autocast, FSDP, a training loop."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="transformers is not installed")

import tutelx
from tests.transformers.families import build, experts_of, families
from tests.transformers.test_families import assert_same, run, tokens
from tests.transformers.test_wrap import Counting
from tutelx.planner import RulePlanner
from tutelx.types import Decision, Plan

BY_NAME = {family.name: family for family in families()}


def pair(name: str = "qwen3_moe", dtype: torch.dtype = torch.float64, **changes):
    """The same model wrapped, and as written."""
    written = build(BY_NAME[name], dtype=dtype, **changes)
    return tutelx.wrap(copy.deepcopy(written), strict=True), written


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_generate(name):
    """The same tokens as written, and bit by bit the same scores a second time."""
    model, written = pair(name)
    options = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    options |= {"use_cache": True, "pad_token_id": 0, "eos_token_id": None}
    first, second = model.generate(tokens(), **options), model.generate(tokens(), **options)
    assert torch.equal(first.sequences, second.sequences)
    assert all(torch.equal(one, other) for one, other in zip(first.scores, second.scores))
    theirs = written.generate(tokens(), **options)
    assert torch.equal(first.sequences, theirs.sequences)
    for one, other in zip(first.scores, theirs.scores):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


class Restless(RulePlanner):
    """Another plan on every call."""

    calls = 0

    def plan(self, workload) -> Decision:
        self.calls += 1
        plan = Plan(tile_rows=1 + self.calls, tile_columns=3 * self.calls)
        return Decision(plan=plan, source="test", reason="", workload=workload)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_gradient_checkpointing(name, reentrant):
    """A planner that changes its mind before the recomputation changes no shape in it."""
    model, written = pair(name)
    expected = run(written.train(), tokens())
    planner = Restless()
    tutelx.wrap(tutelx.unwrap(model), planner=planner)
    model.train().activation_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(run(model, tokens()), expected, 1e-10)
    assert planner.calls == 2 * len(experts_of(model)), "nothing was computed again"


def test_adapters_on_other_weights():
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def adapted(model):
        torch.manual_seed(7)
        found = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        with torch.no_grad():
            for name, parameter in found.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        return found

    model, written = (adapted(each) for each in pair())

    def gradients(model):
        ids = tokens()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    (logits, grads), (expected, expected_grads) = gradients(model), gradients(written)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-10)
    assert len(grads) == 8
    for name, theirs in expected_grads.items():
        torch.testing.assert_close(grads[name], theirs, rtol=1e-8, atol=1e-9)
    assert all(p.grad is None for module in experts_of(model).values() for p in module.parameters())
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens()).logits, expected, rtol=1e-9, atol=1e-10)


def test_compiled_as_a_whole():
    model, _ = pair(dtype=torch.float32)
    expected = model(tokens()).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens()).logits, expected)


@pytest.mark.slow
def test_compiled_by_inductor():
    model, _ = pair(dtype=torch.float32)
    expected = run(model, tokens())
    compiled = torch.compile(model, fullgraph=True)
    ids = tokens()
    model.zero_grad(set_to_none=True)
    out = compiled(ids, labels=ids)
    out.loss.backward()
    torch.testing.assert_close(out.logits, expected[0]["main"], rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[1][name], rtol=1e-3, atol=1e-5)


def test_autocast():
    """Both are equally far from the model without autocast."""
    model, written = pair(dtype=torch.float32)
    exact = run(written, tokens())[0]["main"]
    with torch.autocast("cpu", torch.bfloat16):
        (ours, grads), (theirs, _) = run(model, tokens()), run(written, tokens())
    assert ours["main"].dtype == theirs["main"].dtype
    errors = [float((each["main"].float() - exact).norm()) for each in (ours, theirs)]
    assert errors[0] <= 1.5 * errors[1]
    assert {grad.dtype for grad in grads.values() if grad is not None} == {torch.float32}


def test_fully_sharded():
    from torch.distributed.fsdp import fully_shard

    model, written = pair(dtype=torch.float32)
    expected = run(written, tokens())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        outputs, grads = run(model, tokens())
        whole = {name: grad if grad is None else grad.full_tensor() for name, grad in grads.items()}
        assert_same((outputs, whole), expected, 1e-5)
    finally:
        dist.destroy_process_group()


def test_export_of_the_evaluation_path():
    model, _ = pair(dtype=torch.float32)
    ids = tokens()
    with torch.no_grad():
        program = torch.export.export(model.eval(), (), {"input_ids": ids, "use_cache": False}).module()
        torch.testing.assert_close(program(input_ids=ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def trained(group) -> list[torch.Tensor]:
    """Parameters after two steps on this rank's own sequence."""
    model = pair(dtype=torch.float32)[0].train()
    parallel = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    return steps(parallel, lambda ids: ids[dist.get_rank(group) :][:1])


def steps(model, share) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        ids = share(tokens())
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.slow
def test_distributed_data_parallel(ranks):
    """Two ranks with one sequence each take the steps that one process takes with both."""
    expected = steps(pair(dtype=torch.float32)[1].train(), lambda ids: ids[:2])
    for given in ranks(2).run(trained):
        for ours, theirs in zip(given, expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_loop_of_accelerate():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    planner = Counting()
    losses = []
    for model in pair(dtype=torch.float32):
        if not losses:
            tutelx.wrap(tutelx.unwrap(model), planner=planner)
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        data = torch.utils.data.DataLoader(torch.randint(3, 60, (6, 5), generator=torch.Generator().manual_seed(0)), 2)
        model, optimizer, data = accelerator.prepare(model.train(), optimizer, data)
        losses.append([])
        for ids in data:
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) == 3
    assert planner.calls == 6
