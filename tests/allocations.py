"""Counts the bytes of tensors that live, and the most that lived at one time."""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Inside, every storage is counted once, from the operator that made it until it is freed.

    more: bytes alive beyond those of `module` before. most: the largest that `more` was.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._known: set[int] = set()
        self.more = self.most = 0
        for tensor in (*module.parameters(), *module.buffers()):
            self._see(tensor)
        self.held, self.more, self.most = self.more, 0, 0

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.more += storage.nbytes()
            self.most = max(self.most, self.more)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.more -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        return out
