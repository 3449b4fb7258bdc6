"""Measures the memory of tensors during a pass."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveMemory(TorchDispatchMode):
    """Records the sizes of the tensors of a pass.

    Attributes:
        least: a tensor of at least so many elements is recorded.
        largest: elements of the largest tensor.
        peak: the most bytes of recorded tensors that exist at once.
    """

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.largest, self.peak = least, 0, 0
        self._live: list[tuple[weakref.ref[Tensor], int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.numel() >= self.least:
                self.largest = max(self.largest, tensor.numel())
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._live = [entry for entry in self._live if entry[0]() is not None]
        self._live.append((weakref.ref(tensor), storage.data_ptr(), storage.nbytes()))
        storages = {address: size for _, address, size in self._live}
        self.peak = max(self.peak, sum(storages.values()))
