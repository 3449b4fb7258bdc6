"""What PyTorch's operators compute, to hold formulas against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopCount(TorchDispatchMode):
    """Adds up, with the formulas of PyTorch's own ``FlopCounterMode``. That one refuses
    ``autograd.grad`` within a pass, which heads side by side need.

    Attributes:
        total: so far. Use float64 models: they take PyTorch's own products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


@contextmanager
def counted_flops() -> Iterator[FlopCount]:
    """Inside, matrix products are counted, attention's too."""
    with sdpa_kernel(SDPBackend.MATH), FlopCount() as count:
        yield count
