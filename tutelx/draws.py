"""Random numbers of a layer, from a generator that is saved and restored with it."""

from __future__ import annotations

import torch
from torch import nn

from tutelx.errors import InvalidTypeError, InvalidValueError


class Draws(nn.Module):
    """Draws from torch's own generator of the device."""

    generator: torch.Generator | None = None

    def uniform(self, shape: torch.Size | tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """In [0, 1), float32 (float64 where `like` is), on the device of `like`."""
        self._check(like)
        return torch.rand(shape, generator=self.generator, device=like.device, dtype=_wide(like))

    def normal(self, shape: torch.Size | tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """Of mean 0 and variance 1, float32 (float64 where `like` is), on the device of `like`."""
        self._check(like)
        return torch.randn(shape, generator=self.generator, device=like.device, dtype=_wide(like))

    def _check(self, like: torch.Tensor) -> None:
        pass


class SavedDraws(Draws):
    """Draws from a generator of its own, whose state is part of the state dict: a resumed run goes on with the same
    numbers. Ranks that hold different tokens want different seeds, ranks that hold the same tokens the same."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def get_extra_state(self) -> torch.Tensor:
        assert self.generator is not None
        return self.generator.get_state()

    def set_extra_state(self, state: torch.Tensor) -> None:
        assert self.generator is not None
        self.generator.set_state(state.cpu())

    def _check(self, like: torch.Tensor) -> None:
        assert self.generator is not None
        if self.generator.device.type != like.device.type:
            raise InvalidValueError(f"generator is on {self.generator.device}, but its input on {like.device}")
        # Activation checkpointing restores torch's own generators before it runs a layer again, and no other one.
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise InvalidValueError(
                "generator: the layer runs again inside backward (activation checkpointing) and would draw"
                " other numbers than before; use generator=None, whose state checkpointing restores"
            )


def draws_from(generator: torch.Generator | None) -> Draws:
    return Draws() if generator is None else SavedDraws(generator)


def check_generator(generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InvalidTypeError(f"generator is {type(generator).__name__}, expected torch.Generator or None")


def _wide(like: torch.Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32
