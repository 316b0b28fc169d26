"""Tutel's layer on one process, wrapped in place.

Tutel builds from source only, so this is a stand-in with the attribute layout of Tutel 0.4's `MOELayer`, one token at
a time in plain torch.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tutelx
from tests.tolerance import assert_close
from tests.tutel import reference
from tutelx import Plan
from tutelx.errors import InvalidValueError
from tutelx.integrations.libraries import LibraryMoE

M, H, E = 6, 5, 4


class FusedExpertsNetwork(nn.Module):
    def __init__(self, activation_fn):
        super().__init__()
        self.skip_expert = False
        self.activation_fn = activation_fn
        for name, *shape in (("w", H, M), ("bias", H)):
            self.register_parameter(f"batched_fc1_{name}", nn.Parameter(torch.randn(E, *shape)))
        for name, *shape in (("w", H, M), ("bias", M)):
            self.register_parameter(f"batched_fc2_{name}", nn.Parameter(torch.randn(E, *shape)))

    def each(self):
        weights = self.batched_fc1_w, self.batched_fc2_w, self.batched_fc1_bias, self.batched_fc2_bias
        return reference.feed_forward(*weights, self.activation_fn)

    def forward(self, x, ctx):
        assert ctx.num_global_experts == E
        return torch.stack([torch.stack([run(row) for row in rows]) for run, rows in zip(self.each(), x)])


class LlamaFFNNetwork(nn.Module):
    def __init__(self, activation_fn):
        super().__init__()
        self.activation_fn = activation_fn
        for name, *shape in (("W_fc1", M, H), ("W_fc2", M, H), ("W_fc3", H, M)):
            setattr(self, f"{name}_full_shape", torch.Size([E, *shape]))
            self.register_parameter(name, nn.Parameter(torch.randn(E * M * H)))

    def each(self):
        names = ("W_fc1", "W_fc2", "W_fc3")
        weights = (getattr(self, name).view(getattr(self, f"{name}_full_shape")) for name in names)
        return reference.llama(*weights, self.activation_fn)


class Gate(nn.Module):
    def __init__(self, factor, noise):
        super().__init__()
        self.wg = nn.Linear(M, E, bias=False)
        self.top_k, self.gate_noise, self.capacity_factor = 2, noise, factor

    def forward(self, x):
        return self.wg(x)


class MOELayer(nn.Module):
    def __init__(self, experts, factor=0.7, noise=0.0, is_postscore=True, world_size=1):
        super().__init__()
        self.register_buffer("_num_global_experts", torch.tensor(E))
        self.num_global_experts = self.num_local_experts = E
        self.world_size, self.model_dim, self.a2a_ffn_overlap_degree = world_size, M, 1
        self.is_postscore, self.normalize_gate, self.is_gshard_loss = is_postscore, True, True
        self.batch_prioritized_routing, self.result_func, self.skip_moe = False, None, False
        self.experts, self.gates = experts, nn.ModuleList([Gate(factor, noise)])

    def state_dict(self, destination=None, prefix="", keep_vars=False):
        return super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.setdefault(prefix + "_num_global_experts", self._num_global_experts)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, input, gate_index=0, capacity_factor=None, top_k=None):
        gate, x = self.gates[gate_index], input.reshape(-1, M)
        logits = gate(x)
        if self.training and gate.gate_noise > 0:
            logits = logits + gate.gate_noise * torch.randn_like(logits) / E
        factor, top_k = gate.capacity_factor if capacity_factor is None else capacity_factor, top_k or gate.top_k
        capacity = reference.rows_allowed(factor, len(x), top_k, E) if factor else None
        y, self.l_aux = reference.layer(
            x, logits, self.experts.each(), top_k=top_k, capacity=capacity, before=not self.is_postscore
        )
        self.dispatch_count = torch.bincount(logits.topk(top_k, dim=1).indices.flatten(), minlength=E)
        y = y.view(input.shape)
        y.l_aux = self.l_aux
        return y if self.result_func is None else self.result_func(y)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


LAYERS = {
    "fused": lambda: MOELayer(FusedExpertsNetwork(F.relu)),
    "a lambda": lambda: MOELayer(FusedExpertsNetwork(lambda x: F.silu(x)), factor=0),
    "another activation": lambda: MOELayer(FusedExpertsNetwork(torch.tanh), factor=-0.5),
    "gated": lambda: MOELayer(LlamaFFNNetwork(F.silu)),
    "before": lambda: MOELayer(FusedExpertsNetwork(F.relu), is_postscore=False),
    "noise": lambda: MOELayer(FusedExpertsNetwork(F.relu), noise=1.0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_same_numbers(name):
    layer = LAYERS[name]()
    model = nn.Sequential(nn.Linear(M, M), layer)
    keys = list(model.state_dict())
    tutelx.wrap(model, strict=True)
    wrapped = model[1]
    assert isinstance(wrapped, LibraryMoE)
    assert wrapped.spec.activation == {"a lambda": "silu", "another activation": None, "gated": "silu"}.get(
        name, "relu"
    )
    assert list(model.state_dict()) == keys
    x = torch.randn(3, 5, M)
    for call in ({}, {"top_k": 1, "capacity_factor": 0}):
        found = []
        for each in (layer, wrapped):
            torch.manual_seed(4)
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            y = each(leaf, **call)
            (y.square().sum() + y.l_aux).backward()
            found.append(
                [y, y.l_aux, layer.l_aux, layer.dispatch_count, leaf.grad, *(p.grad for p in layer.parameters())]
            )
        for theirs, ours in zip(*found):
            assert_close(ours, theirs, torch.float64)
    wrapped.eval()
    assert_close(wrapped(x, plan=Plan(layout="padded")), wrapped(x))
    wrapped.load_state_dict({n: v for n, v in layer.state_dict().items() if n != "_num_global_experts"})
    assert tutelx.unwrap(model)[1] is layer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: setattr(layer, "world_size", 2), "`world_size` is 2"),
        (lambda layer: setattr(layer, "skip_moe", True), "`skip_moe` is on"),
        (lambda layer: delattr(layer.gates[0], "top_k"), r"`gates.0.top_k` is missing"),
        (lambda layer: layer.experts.register_forward_hook(print), "`experts._forward_hooks`"),
        (lambda layer: setattr(layer, "normalize_gate", False), "computes something else"),
    ],
)
def test_left_alone(change, message):
    layer = LAYERS["fused"]()
    change(layer)
    with pytest.raises(InvalidValueError, match=message):
        tutelx.wrap(layer, strict=True)
