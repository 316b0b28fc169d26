"""Experts whose weights live in somebody else's modules and stay there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tutelx import ops
from tutelx.experts.base import Network
from tutelx.experts.custom import call_each
from tutelx.experts.network import run_network
from tutelx.hooks import intercepted
from tutelx.ops.activation import Activation
from tutelx.ops.expert_products import groupable
from tutelx.ops.packing import pack
from tutelx.types import DispatchMap, ExpertKernel, Layout, Plan

Path = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ExpertFormula:
    """Where an expert module keeps its layers, and what it does with them.

    kind: the class of the expert modules.
    up, down, gate: paths of names from the expert to its `nn.Linear`; gate is None for a two-layer network.
    biased: the paths among them that have a bias.
    """

    kind: type[nn.Module]
    up: Path
    down: Path
    gate: Path | None
    biased: frozenset[Path]
    activation: Activation
    hidden_dim: int

    def __str__(self) -> str:
        up, down = ".".join(self.up), ".".join(self.down)
        hidden = f"{self.activation}({up}(x))"
        if self.gate is not None:
            hidden = f"{self.activation}({'.'.join(self.gate)}(x)) * {up}(x)"
        return f"{down}({hidden})"


class LinkedExperts:
    """Runs a list of expert modules through `ops.expert_ffn`, reading their weights on every call.

    Not an `nn.Module`: nothing is registered twice, and a parameter that was replaced since the last call
    (`load_state_dict(assign=True)`, FSDP) is simply the one that is read. Experts that no longer match the formula
    (an adapter in place of a Linear, a hook) are called one by one instead.
    """

    layouts: tuple[Layout, ...] = ("ragged", "padded")
    expert_kernels: tuple[ExpertKernel, ...] = ("tiled",)

    def __init__(
        self, modules: nn.ModuleList, formula: ExpertFormula, *, zero_unused: bool = True, plain: bool = False
    ) -> None:
        self.plain = plain
        self.modules = modules
        self.formula = formula
        self.zero_unused = zero_unused

    @property
    def hidden_dim(self) -> int:
        return self.formula.hidden_dim

    @property
    def numbers(self) -> int:
        """Parameters of one expert."""
        modules = self.modules._modules
        expert = next(iter(modules.values()), None)
        return 0 if expert is None else sum(p.numel() for p in expert.parameters())

    def kernels_for(self, x: torch.Tensor) -> tuple[ExpertKernel, ...]:
        """Grouped products want packed weights, or stack them, and give experts without rows a gradient of zeros."""
        num_experts, model_dim = len(self.modules), x.shape[-1]
        grouped = (self.zero_unused or not torch.is_grad_enabled()) and groupable(
            num_experts, model_dim, self.hidden_dim, x.dtype, x.device
        )
        return (*self.expert_kernels, "grouped") if grouped else self.expert_kernels

    def __call__(self, rows: torch.Tensor, map: DispatchMap, plan: Plan) -> torch.Tensor:
        """rows [R, M] -> [R, M]."""
        weights = self.weights()
        if weights is None:
            return call_each(self.modules, rows, map, skip_empty=not self.zero_unused)
        if rows.device.type == "cuda" and plan.expert_kernel != "tiled" and _may_move():
            pack_lists(weights)
        activation, zero_unused = self.formula.activation, self.zero_unused
        return run_network(rows, map, weights, plan, activation=activation, zero_unused=zero_unused, plain=self.plain)

    def network(self) -> Network | None:
        weights = None if self.plain else self.weights()
        return None if weights is None else Network(weights, self.formula.activation)

    def pack(self) -> bool:
        """Puts the weights of each role into one storage, as happens by itself on CUDA. False if some stay apart."""
        weights = self.weights()
        return weights is not None and pack_lists(weights)

    def weights(self) -> ops.ExpertWeights | None:
        """What the modules hold now; None if one of them no longer is what the formula says."""
        formula = self.formula
        found: dict[str, list[torch.Tensor]] = {}
        roles = [("up", formula.up), ("down", formula.down)]
        if formula.gate is not None:
            roles.append(("gate", formula.gate))
        slots = []
        for role, path in roles:
            bias = found.setdefault(f"{role}_bias", []) if path in formula.biased else None
            slots.append((path, found.setdefault(role, []), bias))
        # Look-ups in the modules' own dictionaries: `module.weight` costs several times as much, and E * 3 add up.
        for expert in self.modules._modules.values():
            if type(expert) is not formula.kind or intercepted(expert):
                return None
            for path, weights, biases in slots:
                linear: nn.Module | None = expert
                for name in path:
                    linear = linear._modules.get(name)  # type: ignore[union-attr]
                if type(linear) is not nn.Linear or intercepted(linear):
                    return None
                parameters = linear._parameters
                if (parameters["bias"] is None) != (biases is None):
                    return None
                weights.append(parameters["weight"])  # type: ignore[arg-type]
                if biases is not None:
                    biases.append(parameters["bias"])  # type: ignore[arg-type]
        return ops.ExpertWeights(**{role: tuple(tensors) for role, tensors in found.items()})


def pack_lists(weights: ops.ExpertWeights) -> bool:
    """One role after the other: while one moves, the others take no more room than before."""
    done = [pack(each) for each in weights.lists() if each]
    return all(done)


def _may_move() -> bool:
    return not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()
