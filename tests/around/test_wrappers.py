"""What people put around a model with MoE layers: checkpointing, autocast, DDP, FSDP2, training loops, safetensors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import tutelx
from tests.around.layers import LAYERS, M, Model, build, gradients, pair, tokens
from tutelx.planner import RulePlanner


class Counting(RulePlanner):
    def __init__(self) -> None:
        self.calls = 0

    def plan(self, workload):
        self.calls += 1
        return super().plan(workload)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_activation_checkpointing(name, reentrant):
    layer, twin = build(name), build(name)
    layer.planner = planner = Counting()
    for each, run in ((twin, twin), (layer, partial(checkpoint, layer, use_reentrant=reentrant))):
        run(tokens(12).requires_grad_()).square().sum().backward()
        assert each.stats is not None
    assert planner.calls == 2, "nothing was computed again"
    for key, parameter in twin.named_parameters():
        ours = layer.get_parameter(key).grad
        assert (ours is None) == (parameter.grad is None), key
        if ours is not None:
            assert torch.equal(ours, parameter.grad), key


@pytest.mark.parametrize("name", LAYERS)
def test_autocast(name):
    layer = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        given = gradients(layer, tokens(12))
    expected = gradients(layer, tokens(12))
    for key, theirs in expected.items():
        if theirs is None or not theirs.any():
            continue
        # A hand-written layer adds into zeros of its input's dtype.
        assert given[key].dtype == (torch.bfloat16 if key == "y" and "MoE" in name else torch.float32), key
        assert float((given[key].float() - theirs).norm() / theirs.norm()) < 0.05, key


def test_autocast_is_as_far_off_as_the_layer_as_written():
    ours, written = pair()
    exact = gradients(written, tokens(40))
    with torch.autocast("cpu", torch.bfloat16):
        given, expected = gradients(ours, tokens(40)), gradients(written, tokens(40))
    for key, theirs in expected.items():
        assert given[key].dtype == theirs.dtype, key
        errors = [float((each[key].float() - exact[key]).norm()) for each in (given, expected)]
        assert errors[0] <= 1.5 * errors[1] + 1e-6, key


def step(model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def trained(group, how: str, name: str | None) -> dict[str, torch.Tensor]:
    """Parameters after three steps on this rank's tokens; `name` None: a model of hand-written layers."""
    torch.manual_seed(0)
    model = pair()[0] if name is None else Model(partial(build, name))
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if how == "ddp":
        model = DistributedDataParallel(model, process_group=group)
    else:
        mesh = dist.device_mesh.DeviceMesh.from_group(group, "cpu")
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for seed in range(3):
        step(model, tokens(8 * world, seed=seed)[rank::world], optimizer)
    whole = {key.removeprefix("module."): p.detach() for key, p in model.named_parameters()}
    return {key: p.full_tensor() if how == "fsdp" else p for key, p in whole.items()}


@pytest.mark.parametrize("name", [None, "MoE", "MoE of modules"])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_data_parallel(ranks, how, name):
    """Two ranks with half of the tokens each take the steps that one process takes with all."""
    torch.manual_seed(0)
    model = pair()[1] if name is None else Model(partial(build, name))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for seed in range(3):
        step(model, tokens(16, seed=seed), optimizer)
    for given in ranks(2).run(trained, how, name):
        assert given.keys() == dict(model.named_parameters()).keys()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(given[key], parameter.detach(), rtol=1e-4, atol=1e-5)


def batches() -> list[torch.Tensor]:
    return [tokens(6, seed=seed) for seed in range(3)]


def test_a_loop_of_lightning(tmp_path, monkeypatch):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    monkeypatch.chdir(tmp_path)
    losses = []

    class Task(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, x, index):
            loss = self.model(x).square().mean()
            losses[-1].append(float(loss.detach()))
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.3)

    models = pair()
    for model in models:
        losses.append([])
        data = torch.utils.data.DataLoader(batches(), batch_size=None)
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
        )
        trainer.fit(Task(model), data)
        trainer.save_checkpoint(tmp_path / f"{len(losses)}.ckpt")
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    saved, written = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True)["state_dict"] for n in (1, 2))
    assert saved.keys() == written.keys()
    # What the one saved the other loads.
    Task(models[1]).load_state_dict(saved)
    torch.testing.assert_close(models[1](tokens(5)), models[0](tokens(5)))


def test_a_loop_of_accelerate():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    losses = []
    for model in pair():
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        data = torch.utils.data.DataLoader(batches(), batch_size=None)
        model, optimizer, data = accelerator.prepare(model, optimizer, data)
        losses.append([])
        for x in data:
            loss = model(x).square().mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_safetensors(tmp_path):
    """Saved wrapped, loaded as written, and the other way round, bit for bit."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    ours, written = pair()
    for number, (giver, taker) in enumerate([(ours, written), (written, ours)]):
        with torch.no_grad():
            for parameter in giver.parameters():
                parameter.mul_(1.5)
        file = tmp_path / f"{number}.safetensors"
        safetensors.save_model(giver, file)
        assert safetensors.load_model(taker, file) == (set(), [])
        assert all(torch.equal(p, giver.get_parameter(key)) for key, p in taker.named_parameters())
        torch.testing.assert_close(ours(tokens(5)), written(tokens(5)))


def test_safetensors_of_a_layer(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    layer, other = build("MoE"), tutelx.MoE(M, 24, 4, gate=tutelx.gates.TopK(k=2, balance_coef=0.1))
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other(tokens(9)), layer(tokens(9)))
