"""Whether oneDNN's AVX-512 code is there, inside PyTorch."""

from __future__ import annotations

import torch


def _available() -> bool:
    # A rule of the machine alone, never of a timing: the processes of a run must agree.
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


ONEDNN = _available()
