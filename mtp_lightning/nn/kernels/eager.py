"""When the layers' own CPU implementations apply."""

from __future__ import annotations

import torch
from torch import Tensor


def eager_cpu(x: Tensor) -> bool:
    """Whether ``x`` is on a CPU and nothing is being compiled.

    The hand-written passes pay where PyTorch runs one operator after another. ``torch.compile``
    fuses the plain compositions itself, and cannot look into oneDNN's kernels.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
