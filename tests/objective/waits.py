"""Where a step would make the host wait for a GPU, found without one.

On the device "meta" tensors have shapes and no numbers, so every look at a number fails by itself
(``item``, ``tolist``, ``nonzero``, a mask as an index, ``bincount``). What remains is numbers on
their way from the host: copied from pageable memory, they stop the queue as well.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


class HostCopies(TorchFunctionMode):
    """Takes down every call that brings numbers of the host to the device.

    A number alone, without dimensions, goes along as an argument of the kernel.

    Attributes:
        found: function and the line of the project that called it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        on_device = any(tensor.device.type == "meta" for tensor in (*given, *made))
        of_host = any(tensor.device.type == "cpu" and tensor.dim() for tensor in given)
        written_out = func in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
        listed = func in _INDEXING and _has_list(args[1])
        waits = not kwargs.get("non_blocking", False)
        if on_device and waits and (of_host or written_out or listed):
            self.found.append(f"{getattr(func, '__name__', func)} in {_caller()}")
        return result


def _has_list(index: Any) -> bool:
    """Whether an index holds positions written out, which become a tensor of their own."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, (list, tuple, range)) for part in parts)


def _caller() -> str:
    frames = [frame for frame in traceback.extract_stack() if "mtp_lightning/" in frame.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "a test"


@contextlib.contextmanager
def no_autocast_on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch's autocast does not know the device "meta", where none is on."""
    enabled, autocast = torch.is_autocast_enabled, torch.autocast

    def is_enabled(device: str | None = None) -> bool:
        return device != "meta" and (enabled() if device is None else enabled(device))

    def cast(device: str, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if device == "meta" else autocast(device, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", is_enabled)
        patch.setattr(torch, "autocast", cast)
        yield
