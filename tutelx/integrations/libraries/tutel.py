"""Tutel: `tutel.impls.moe_layer.MOELayer` on one process, whose gates and experts stay the modules that they are.

A script can also be run whole with `tutelx.integrations.tutel`, over ranks too.
T tokens, M model dim, E experts, K choices, O output dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tutelx.dispatch import Dispatch
from tutelx.integrations.libraries.replacement import LibraryMoE
from tutelx.integrations.libraries.structure import batches, check_alone, child
from tutelx.integrations.llama import check_calls, check_hooks, dtype_and_device
from tutelx.integrations.spec import Declined, LibrarySpec
from tutelx.integrations.tutel import arguments, counts
from tutelx.integrations.tutel.activations import known_activation
from tutelx.integrations.tutel.custom import CustomExperts
from tutelx.integrations.tutel.experts import BuiltIn, FusedExpertsNetwork, LlamaFFNNetwork
from tutelx.integrations.tutel.gates import at_most
from tutelx.integrations.tutel.loading import COUNT
from tutelx.integrations.tutel.prescore import compute_prescored
from tutelx.integrations.tutel.router import Router
from tutelx.types import Plan

NAME = "Tutel"


def is_candidate(layer: nn.Module) -> bool:
    return COUNT in layer._buffers and isinstance(child(layer, "gates"), nn.ModuleList) and "experts" in layer._modules


def find_spec(layer: nn.Module) -> LibrarySpec:
    """Raises Declined for experts that are spread over ranks, a gate without K, a layer that gives back its input."""
    check_alone(int(getattr(layer, "world_size", 1)), "world_size")
    for n, gate in enumerate(layer.gates):  # type: ignore[union-attr, arg-type]
        for name in ("top_k", "gate_noise", "capacity_factor"):
            if not hasattr(gate, name):
                raise Declined(f"gates.{n}.{name}", "is missing")
    if getattr(layer, "skip_moe", False):
        raise Declined("skip_moe", "is on: the layer gives back its input")
    check_calls(layer, "")
    dtype_and_device(layer, mixed=True)
    model_dim = int(layer.model_dim)  # type: ignore[arg-type]
    experts: Any = layer.experts
    built, kind, network = _known(experts, model_dim), None, "called as they are"
    if built is not None:
        check_hooks(experts, "experts")
        kind = known_activation(experts.activation_fn)
        gated = isinstance(built, LlamaFFNNetwork)
        network = f"fc3({kind}(fc1(x)) * fc2(x))" if gated else f"fc2({kind}(fc1(x)))"
    return LibrarySpec(
        library=NAME,
        model_dim=model_dim,
        num_experts=int(layer.get_buffer(COUNT)),
        network=network,
        activation=kind,
    )


def _known(experts: Any, model_dim: int) -> BuiltIn | None:
    """The same network over the same parameters, if it is one of the library's own with a known activation."""
    kind = type(experts).__name__
    if known_activation(getattr(experts, "activation_fn", None)) is None or getattr(experts, "skip_expert", False):
        return None
    function = experts.activation_fn
    built: BuiltIn
    with torch.device("meta"):
        if kind == "FusedExpertsNetwork":
            num_local, hidden_dim, _ = experts.batched_fc1_w.shape
            out_dim = experts.batched_fc2_w.shape[2]
            built = FusedExpertsNetwork(model_dim, hidden_dim, num_local, 1, function, output_dim=out_dim)
        elif kind == "LlamaFFNNetwork":
            num_local, _, hidden_dim = experts.W_fc1_full_shape
            built = LlamaFFNNetwork(model_dim, hidden_dim, num_local, 1, function)
        else:
            return None
    if built._parameters.keys() != experts._parameters.keys() or not built.fused:
        return None
    built._parameters = experts._parameters  # one dictionary: what is exchanged later is exchanged here
    return built


class Layer(LibraryMoE):
    leaves = ("l_aux",)

    def __init__(self, original: nn.Module, *args: Any, **named: Any) -> None:
        super().__init__(original, *args, **named)
        # Not registered: the parameters would appear twice.
        self.__dict__["_built"] = None if self.spec.activation is None else _known(self.experts, self.model_dim)

    def examples(self, rows: int = 32) -> list[tuple]:
        return [(x,) for x in batches(self, next(self.experts.parameters()), rows)]

    def run(
        self,
        input: torch.Tensor,
        gate_index: int = 0,
        capacity_factor: float | None = None,
        top_k: int | None = None,
        a2a_ffn_overlap_degree: int | None = None,
        reserve_dims: int = 1,
        inequivalent_tokens: bool = False,
        adaptive_r: int | None = None,
        megablocks_size: int = 0,
        *,
        plan: Plan | None = None,
    ) -> Any:
        """As the original's forward: input [..., M] -> [..., O]."""
        original: Any = self.original
        weight = next(self.experts.parameters(), None)
        x_TM = arguments.tokens(input, reserve_dims, self.model_dim, weight)
        gate: Any = self.gates[gate_index]
        if a2a_ffn_overlap_degree is not None:
            self.leave("a2a_ffn_overlap_degree", a2a_ffn_overlap_degree)
        if adaptive_r is not None:
            self.leave("adaptive_degree", adaptive_r)
        sparse = original.num_local_experts > 1 and not torch.is_grad_enabled()
        self.leave("megablocks_size", 0)  # the kernels for it are the library's own
        factor = gate.capacity_factor if capacity_factor is None else capacity_factor
        router = Router(
            module=gate,
            num_experts=self.num_experts,
            noise=gate.gate_noise,
            normalize=original.normalize_gate,
            gshard=original.is_gshard_loss,
            training=self.training,
            factor=factor,
            alignment=counts.layer_alignment(
                slices=1, overlap=original.a2a_ffn_overlap_degree, megablocks=megablocks_size if sparse else 0
            ),
        )
        self.batch_prioritized = original.batch_prioritized_routing
        reserved = tuple(input.shape[-reserve_dims:])
        experts: Any = self._built or CustomExperts(self.experts, self, reserved)
        choices = at_most(top_k or gate.top_k, self.num_experts)
        y_TO = self._run(x_TM, router, experts, top_k=choices, capacity=counts.setting(factor), plan=plan)
        shape = experts.out_shape if isinstance(experts, CustomExperts) else (y_TO.shape[1],)
        y = y_TO.view(*input.shape[: input.dim() - len(reserved)], *shape).to(input.dtype)
        y.l_aux = self._last.aux_loss  # type: ignore[attr-defined]
        self.leave("l_aux", y.l_aux)  # type: ignore[attr-defined]
        return y if original.result_func is None else original.result_func(y)

    def _compute(self, x_TM: torch.Tensor, weights_TK: torch.Tensor, experts: Any, step: Dispatch) -> torch.Tensor:
        self.leave("dispatch_count", step.map.counts)
        if self.original.is_postscore:
            return super()._compute(x_TM, weights_TK, experts, step)
        return compute_prescored(x_TM, weights_TK, experts, step)

    def state_dict(self, *args: Any, **named: Any) -> Any:
        return self.original.state_dict(*args, **named)

    def _load_from_state_dict(self, *args: Any, **named: Any) -> None:
        self.original._load_from_state_dict(*args, **named)

    def _check_input(self, x: torch.Tensor) -> torch.Tensor:
        return x  # as `arguments.tokens` made it
