"""Any optimizer with its state dealt out over ranks (ZeRO, stage 1: https://arxiv.org/abs/1910.02054)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.integrations.tutel.net.calls import others
from tutelx.integrations.tutel.net.differentiable import zero_scatter
from tutelx.integrations.tutel.net.simple import (
    Group,
    simple_all_gather,
    simple_all_reduce,
    simple_reduce_scatter,
    simple_split,
)


class TutelDistributedOptimizer:
    """Each rank keeps the optimizer's state of its part of every shared parameter, and updates that part.

    Experts' parameters, those with the attribute `_tutel_expert`, are this rank's own and updated where they are.

    Args:
        params: tensors; all ranks hold the same shared ones.
        group: the ranks among which the shared ones are dealt out.
        average_shared: their gradients are averaged over ranks, otherwise added up.

    Raises:
        InvalidTypeError: something in `params` is no tensor.
    """

    def __init__(self, params: Iterable[torch.Tensor], group: Group = None, average_shared: bool = False) -> None:
        params = list(params)
        for param in params:
            if not isinstance(param, torch.Tensor):
                raise InvalidTypeError(f"params holds a {type(param).__name__}, expected tensors")
        self.params = [param for param in params if not hasattr(param, "_tutel_expert")]
        self.expert_params = [param for param in params if hasattr(param, "_tutel_expert")]
        self.shapes = [param.shape for param in self.params]
        self.group, self.average_shared = group, average_shared
        self.virt_params: list[torch.Tensor] = []
        self.local_optim: torch.optim.Optimizer | None = None

    def warp_local(self, local_optim: Callable[..., torch.optim.Optimizer], *args, **kwargs):
        """Makes the optimizer, `local_optim(parameters, *args, **kwargs)`, over this rank's parts; returns itself."""
        self.chunk_param()
        self.local_optim = local_optim([*self.virt_params, *self.expert_params], *args, **kwargs)
        return self

    def zero_grad(self) -> None:
        """Sets all gradients to zero, in place."""
        for param in [*self.params, *self.expert_params]:
            if param.grad is not None:
                param.grad.detach_().zero_()

    def step(self) -> None:
        """One step on every rank, all of which must call; a gradient that only some ranks have is zero on the others.

        Raises:
            InvalidValueError: `warp_local` has not been called.
        """
        if self.local_optim is None:
            raise InvalidValueError("step() without an optimizer: call warp_local(torch.optim.SGD, lr=...) first")
        with torch.no_grad():
            # A checkpoint may have been loaded since.
            for param, part in zip(self.params, self.virt_params):
                part.copy_(self._part(param))
        self.chunk_grad()
        self.local_optim.step()
        self.restore()

    def chunk_param(self) -> None:
        """Makes `virt_params`: this rank's part of each shared parameter, flat."""
        self.virt_params = [self._part(param).clone() for param in self.params]

    def chunk_grad(self) -> None:
        """Gives `virt_params` their gradients, reduced over ranks; None where no rank has one."""
        mesh = others(self.group)
        own = [param.grad is not None for param in self.params]
        found = own
        if mesh is not None and self.params:
            flags = torch.tensor(own, dtype=torch.int32, device=self.params[0].device)
            found = simple_all_reduce(flags, self.group, dist.ReduceOp.MAX).bool().tolist()
        scale = 1 if mesh is None or not self.average_shared else mesh.world
        for param, part, wanted in zip(self.params, self.virt_params, found):
            part.grad = None
            if wanted:
                grad = torch.zeros_like(param.data) if param.grad is None else param.grad.detach() / scale
                part.grad = zero_scatter(grad, simple_reduce_scatter, group=self.group)[0]

    def restore(self) -> None:
        """Writes all ranks' parts into the parameters, where they are."""
        with torch.no_grad():
            for param, part, shape in zip(self.params, self.virt_params, self.shapes):
                param.copy_(simple_all_gather(part, self.group).view(-1)[: shape.numel()].view(shape))

    def _part(self, param: torch.Tensor) -> torch.Tensor:
        return zero_scatter(param.detach(), simple_split, group=self.group)[0]
