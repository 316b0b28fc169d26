"""How the tensors of experts lie on ranks.

Symbols: E experts, W ranks, s = W/E slices of each expert where there are more ranks than experts, else 1. An expert
tensor is [E, ...]; with s > 1 a rank has one slice [1, ...] of one expert. A vector holds all numbers of all experts of
a rank one after another, and an expert's are padded with zeros at the end so that s divides them.

Tutel's own scatter writes slices squeezed: the same numbers, without the dimension of one expert, and shaped as if the
last dimension had been cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from tutelx.errors import InvalidTypeError, InvalidValueError

OUT_BIAS, OUT_WEIGHT = "batched_fc2_bias", "batched_fc2_w"


def slices_of(num_experts: int, world: int) -> int:
    """s. Raises InvalidValueError where neither of the two divides the other."""
    if num_experts < 1 or world < 1:
        raise InvalidValueError(f"num_experts={num_experts} and {world} ranks, expected at least 1 of each")
    if num_experts % world == 0:
        return 1
    if world % num_experts == 0:
        return world // num_experts
    raise InvalidValueError(f"neither of {num_experts} experts and {world} ranks divides the other")


def is_squeezed(part: torch.Tensor, slices: int) -> bool:
    """Whether a slice can only be one that Tutel's scatter wrote; then all of its layer are."""
    return slices > 1 and part.dim() > 1 and part.shape[0] != 1


def join(name: str, parts: Sequence[torch.Tensor], num_experts: int, *, squeezed: bool = False) -> torch.Tensor:
    """The tensor of all experts, of all ranks' parts in their order.

    squeezed: the parts are slices as :func:`is_squeezed`.

    Raises:
        InvalidTypeError: a part is no tensor.
        InvalidValueError: parts of different shapes or dtypes, or that do not make up E experts.
    """
    for part in parts:
        if not isinstance(part, torch.Tensor):
            raise InvalidTypeError(f"{name} is a {type(part).__name__}, expected torch.Tensor")
    found = {(tuple(part.shape), str(part.dtype).removeprefix("torch.")) for part in parts}
    if len(found) > 1:
        raise InvalidValueError(f"{name} differs from rank to rank: {' and '.join(map(str, sorted(found)))}")
    slices = slices_of(num_experts, len(parts))
    shape = tuple(parts[0].shape)
    if squeezed and shape:
        flat = torch.cat([part.reshape(-1) for part in parts])
        return flat.view(num_experts, *shape[:-1], shape[-1] * slices)
    is_vector = _is_flat(shape)
    if not is_vector and (not shape or shape[0] * len(parts) != num_experts * slices):
        raise InvalidValueError(
            f"{name} has shape {shape} on each of {len(parts)} ranks, which is not {num_experts} experts"
        )
    if is_vector or slices == 1:
        return torch.cat(list(parts))
    dim = _sliced_dim(name, shape)
    experts = [torch.cat(list(parts[e * slices : (e + 1) * slices]), dim) for e in range(num_experts)]
    return torch.cat(experts)


def split(name: str, whole: torch.Tensor, num_experts: int, world: int) -> list[torch.Tensor]:
    """Each rank's part, with memory of its own.

    Raises:
        InvalidTypeError: `whole` is no tensor.
        InvalidValueError: it does not hold E experts, or an expert does not divide among s ranks.
    """
    if not isinstance(whole, torch.Tensor):
        raise InvalidTypeError(f"{name} is a {type(whole).__name__}, expected torch.Tensor")
    slices, shape = slices_of(num_experts, world), tuple(whole.shape)
    is_vector = _is_flat(shape)
    if not shape or (shape[0] % num_experts if is_vector else shape[0] != num_experts):
        raise InvalidValueError(f"{name} has shape {shape}, which is not {num_experts} experts")
    if slices == 1:
        return [part.clone() for part in whole.chunk(world)]
    if is_vector:
        return _padded(whole.view(num_experts, -1), slices)
    dim = _sliced_dim(name, shape)
    if whole.dim() == 2 and name.endswith(OUT_BIAS):
        return [part.unsqueeze(0) for part in _padded(whole, slices)]
    if shape[dim] % slices:
        raise InvalidValueError(f"{name} has shape {shape}, whose dimension {dim} does not divide among {slices} ranks")
    return [part.clone() for expert in whole.split(1) for part in expert.chunk(slices, dim)]


def without_padding(state: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A joined bias of the output, as long as the weight beside it says."""
    value = state[name]
    weight = state.get(f"{name.removesuffix(OUT_BIAS)}{OUT_WEIGHT}") if name.endswith(OUT_BIAS) else None
    if weight is None or weight.dim() != 3 or value.dim() != 2:
        return value
    return value[:, : weight.shape[2]].contiguous()


def _is_flat(shape: tuple[int, ...]) -> bool:
    return len(shape) == 1


def _sliced_dim(name: str, shape: tuple[int, ...]) -> int:
    """The hidden dimension, by which experts are sliced: the first that is none of one element, as [E, 1, H] has.

    A slice of a weight [E, H, M] may itself have but one.
    """
    if len(shape) > 2 and not name.endswith("_w"):
        return next((dim for dim in range(1, len(shape)) if shape[dim] > 1), len(shape) - 1)
    return 1


def _padded(experts: torch.Tensor, slices: int) -> list[torch.Tensor]:
    """[E, n] -> E * s vectors of ceil(n / s)."""
    missing = -experts.shape[1] % slices
    return [part.clone() for expert in F.pad(experts, (0, missing)) for part in expert.chunk(slices)]
