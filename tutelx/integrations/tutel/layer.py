"""The layer of a Tutel script, over this runtime.

T tokens, M model dim, E experts in all, K choices a token, W ranks, s ranks that share an expert.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tutelx import env
from tutelx.base import MoEBase
from tutelx.dispatch import Dispatch
from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.integrations.tutel import arguments, counts, loading
from tutelx.integrations.tutel.custom import CustomExperts, build_experts
from tutelx.integrations.tutel.experts import BuiltIn
from tutelx.integrations.tutel.gates import at_most, build_gates
from tutelx.integrations.tutel.planner import AsWritten
from tutelx.integrations.tutel.prescore import compute_prescored
from tutelx.integrations.tutel.ranks import SharedGroup, world_group, world_size
from tutelx.integrations.tutel.router import Router
from tutelx.scheduler import default_planner
from tutelx.types import AllToAll, Capacity, Planner

if TYPE_CHECKING:
    import torch.distributed as dist

_log = logging.getLogger("tutelx")

ScanFn = Callable[[str, nn.Parameter], object]
ResultFn = Callable[[torch.Tensor], Any]


class MOELayer(MoEBase):
    """Tutel's `moe_layer`: its arguments, attributes, numbers at the start and state-dict keys.

    Args:
        gate_type: {'type': 'top' | 'cosine_top' | 'custom', ...}, 'TopKGate' with a number for K, or a list of them,
            of which a call takes one. Options: k, fp32_gate, capacity_factor, gate_noise; proj_dim and init_t of
            cosine_top; module and whatever it takes of custom.
        model_dim: M.
        experts: {'type': 'ffn' | 'llama_ffn' | 'custom', 'num_experts_per_device' or 'count_per_node': n, ...}; n > 0
            experts on each rank, n < 0 has -n ranks share each expert.
        scan_expert_func: called with the name and the parameter of all that the experts have.
        result_func: called with what forward would give back; its result is given back.
        group: the ranks that share the experts; default all.
        seeds: for torch before the gates, before the experts, and at the end; None leaves it as it is.
        a2a_ffn_overlap_degree: chunks, of which one is computed while another travels.
        is_postscore: weights come after the experts, else before.
        batch_prioritized_routing: a full expert keeps the tokens with the greatest weights.
        normalize_gate: the weights of a token are divided by their sum, for two choices or more.
        is_gshard_loss: else the loss is that of importance and load, which needs gate_noise.
        parallel_type: 'adaptive:r' with r among `valid_rs`, 'data' for 1, 'model' for s; 'auto' leaves it, chunks and
            steps to `tutelx.scheduler.default_planner`.
        use_2dh: rows travel in two steps, inside of a node and between nodes.
        planner: chooses the plan of each call, whatever other arguments say of degrees, chunks and steps.

    The gradients of the experts are those of the sum of the losses of all ranks.

    Raises:
        InvalidValueError, InvalidTypeError: sizes that do not fit together, an unknown type or option.
    """

    def __init__(
        self,
        gate_type: str | dict[str, Any] | Sequence[dict[str, Any]],
        model_dim: int,
        experts: Mapping[str, Any] | None = None,
        scan_expert_func: ScanFn | None = None,
        result_func: ResultFn | None = None,
        group: dist.ProcessGroup | None = None,
        seeds: Sequence[int | None] | None = None,
        a2a_ffn_overlap_degree: int = 1,
        is_postscore: bool = True,
        batch_prioritized_routing: bool = False,
        normalize_gate: bool = True,
        is_gshard_loss: bool = True,
        parallel_type: str = "adaptive:1",
        use_2dh: bool = False,
        *,
        planner: Planner | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("pad_samples", None)  # of early versions; nothing is ever padded
        if unknown:
            raise InvalidTypeError(f"moe_layer has no argument {next(iter(unknown))!r}")
        if not isinstance(experts, Mapping):
            raise InvalidTypeError(f"experts is {type(experts).__name__}, expected a dict")
        if isinstance(model_dim, bool) or not isinstance(model_dim, int) or model_dim < 1:
            raise InvalidValueError(f"model_dim={model_dim!r} must be an int of at least 1")
        options = dict(experts)
        world = world_size(group)
        num_local = counts.local_count(options)
        num_experts = counts.global_count(num_local, world)
        super().__init__(
            model_dim=model_dim,
            num_experts=num_experts,
            capacity=Capacity.dropless(),
            planner=planner,
            batch_prioritized=batch_prioritized_routing or env.is_batch_prioritized(),
        )
        self._written = None if planner is not None else self.planner
        self._group = SharedGroup(world_group(group))
        self.world_size = world
        self.num_global_experts, self.num_local_experts = num_experts, max(1, num_experts // world)
        self.register_buffer(loading.COUNT, torch.tensor(num_experts))
        self.sharded_count = max(1, world // num_experts)
        self.valid_rs = [0, *(r for r in range(1, self.sharded_count + 1) if self.sharded_count % r == 0)]
        self.adaptive_degree, self._auto = arguments.degree(parallel_type, self.valid_rs)
        self.a2a_ffn_overlap_degree = arguments.at_least_1("a2a_ffn_overlap_degree", a2a_ffn_overlap_degree)
        self.is_postscore, self.result_func, self.use_2dh = is_postscore, result_func, use_2dh
        self.normalize_gate, self.is_gshard_loss = normalize_gate, is_gshard_loss
        self.skip_moe = env.skips_moe()
        self.megablocks_size = 0
        self.dispatch_count: torch.Tensor | None = None
        gate_seed, expert_seed, last_seed = (*(seeds or ()), None, None, None)[:3]

        if expert_seed is not None:
            torch.manual_seed(expert_seed)
        self.experts = build_experts(
            options, model_dim=model_dim, num_local=self.num_local_experts, slices=self.sharded_count
        )
        for name, parameter in self.experts.named_parameters():
            if scan_expert_func is not None:
                scan_expert_func(name, parameter)
            parameter._tutel_expert = True  # type: ignore[attr-defined]  # what a distributed optimizer looks for
        self.gates = build_gates(gate_type, model_dim=model_dim, num_experts=num_experts, seed=gate_seed)
        if last_seed is not None:
            torch.manual_seed(last_seed)
        if world > 1:
            self._share()

    def _share(self) -> None:
        from tutelx.comm import join

        hidden_dim = self.experts.hidden_dim if isinstance(self.experts, BuiltIn) else self.sharded_count
        self.ranks, _ = join(
            self.group, num_experts=self.num_experts, hidden_dim=hidden_dim, ranks_per_node=None, tp_group=None
        )
        assert self.ranks is not None
        self.ranks.hold_modules(self.experts)
        if isinstance(self.experts, BuiltIn):
            self.experts.ranks = self.ranks
        if self.use_2dh and self.ranks.mesh.ranks_per_node is None:
            _log.warning(
                "use_2dh: rows travel in one step, as nothing says how many ranks a node has: %s",
                self.ranks.mesh.origin,
            )

    @staticmethod
    def global_expert_count(num_local_experts: int | float, group: dist.ProcessGroup | None = None) -> int:
        """E, of a count for each rank as `experts` takes it."""
        return counts.global_count(num_local_experts, world_size(group))

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that share the experts; None where there is one process."""
        return self._group.group

    @property
    def l_aux(self) -> torch.Tensor | None:
        """The loss of the last call's routing, without a coefficient; None before the first call."""
        return self._last.aux_loss

    def get_parameter_iterator(self, param_type: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the 'gate' or the 'local_experts'."""
        parts: dict[str, nn.Module] = {"gate": self.gates, "local_experts": self.experts}
        if param_type not in parts:
            raise InvalidValueError(f"param_type={param_type!r} is none of {tuple(parts)}")
        return parts[param_type].named_parameters()

    def forward(
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
    ) -> Any:
        """input [..., M] -> [..., M or what the experts make of it], with the loss of the routing as `l_aux`.

        Args:
            gate_index: which of the gates.
            capacity_factor: > 0 gives an expert K * floor(f * T/E) rows of each rank, 0 all that it needs, < 0 that,
                but at most those of -f; default the gate's.
            top_k: K of this call; default the gate's.
            a2a_ffn_overlap_degree, adaptive_r: from this call on.
            reserve_dims: dimensions at the end that make up a token; custom experts get them as they are.
            inequivalent_tokens: changes nothing: ranks may always hold different numbers of tokens, none included.
            megablocks_size: without gradients on one rank, experts compute the rows that arrived and no others, in
                blocks of this size.

        Raises:
            InvalidValueError, InvalidTypeError: arguments or shapes that do not fit; RankMismatchError,
            RankFailedError: over many ranks, on each of them.
        """
        if self.skip_moe:
            result = input.view_as(input)
            result.l_aux = None  # type: ignore[attr-defined]
            return result if self.result_func is None else self.result_func(result)
        with self._prepared():
            x_TM = arguments.tokens(input, reserve_dims, self.model_dim, next(self.experts.parameters(), None))
            reserved = tuple(input.shape[-reserve_dims:])
            gate = self._gate(gate_index)
            if a2a_ffn_overlap_degree is not None:
                self.a2a_ffn_overlap_degree = arguments.at_least_1("a2a_ffn_overlap_degree", a2a_ffn_overlap_degree)
            if adaptive_r is not None:
                self.adaptive_degree, self._auto = arguments.valid_degree(adaptive_r, self.valid_rs), False
            sparse = self.num_local_experts > 1 and self.world_size == 1 and not torch.is_grad_enabled()
            self.megablocks_size = megablocks_size if sparse else 0
            factor = gate.capacity_factor if capacity_factor is None else capacity_factor
            router = self._router(gate, factor)
            setting = counts.setting(factor)
            choices = at_most(top_k or gate.top_k, self.num_experts)
            if self.planner is self._written:  # and nobody's own
                self.planner = self._written = self._as_written()
            experts: Any = self.experts
            if not isinstance(experts, BuiltIn):
                experts = CustomExperts(self.experts, self, reserved)
        y_TO = self._run(x_TM, router, experts, top_k=choices, capacity=setting)
        shape = experts.out_shape if isinstance(experts, CustomExperts) else (y_TO.shape[1],)
        y = y_TO.view(*input.shape[: input.dim() - len(reserved)], *shape).to(input.dtype)
        y.l_aux = self.l_aux  # type: ignore[attr-defined]
        return y if self.result_func is None else self.result_func(y)

    def _gate(self, index: int) -> Any:
        if not -len(self.gates) <= index < len(self.gates):
            raise InvalidValueError(f"gate_index={index} of {len(self.gates)} gates")
        gate = self.gates[index]
        if not hasattr(gate, "top_k"):
            raise InvalidValueError(f"the gate {type(gate).__name__} has no attribute top_k, which says K")
        return gate

    def _router(self, gate: Any, factor: float) -> Router:
        return Router(
            module=gate,
            num_experts=self.num_experts,
            noise=gate.gate_noise,
            normalize=self.normalize_gate,
            gshard=self.is_gshard_loss,
            training=self.training,
            factor=factor,
            alignment=counts.layer_alignment(
                slices=self.sharded_count, overlap=self.a2a_ffn_overlap_degree, megablocks=self.megablocks_size
            ),
        )

    def _as_written(self) -> Planner:
        if self.megablocks_size > 0:
            return AsWritten(ragged=True)
        if self.ranks is None or self._auto:
            return default_planner()
        hierarchical = self.use_2dh and self.ranks is not None and self.ranks.mesh.ranks_per_node is not None
        all_to_all: AllToAll = "2dh" if hierarchical else "linear"
        return AsWritten(
            shard_degree=self.adaptive_degree,
            pipeline_degree=self.a2a_ffn_overlap_degree,
            all_to_all=all_to_all,
        )

    def _compute(self, x_TM: torch.Tensor, weights_TK: torch.Tensor, experts: Any, step: Dispatch) -> torch.Tensor:
        self.dispatch_count = step.map.counts  # experts may look at both
        if step.call is not None:
            self.adaptive_degree = step.decision.plan.shard_degree
        if self.is_postscore:
            return super()._compute(x_TM, weights_TK, experts, step)
        return compute_prescored(x_TM, weights_TK, experts, step)

    def _check_input(self, x: torch.Tensor) -> torch.Tensor:
        return x  # as `arguments.tokens` made it

    def _prepared(self) -> AbstractContextManager[None]:
        if self.ranks is None:
            return nullcontext()
        return self.ranks.announced_failure(self.get_buffer(loading.COUNT).device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loading.fit(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        gates = ", ".join(f"k={gate.top_k}, noise={gate.gate_noise}" for gate in self.gates)
        return f"Top-K(s) = [{gates}], Total-Experts = {self.num_experts} [managed by {self.world_size} device(s)]"
