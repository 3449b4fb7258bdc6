"""The library that ``pip install`` builds from ``cpp/`` if there is a compiler (setup.py).

It is used for fp32 on CPUs with AVX-512 or AVX2; there is a library for each. The machine and the
installation decide that, never a timing, so that the processes of a run agree. It runs on PyTorch's
threads, and no result depends on their number. The last bits of a run do depend on which library is
there; ``MTP_LIGHTNING_NATIVE=0`` in the environment disables it. ``python -m benchmarks.kernels``
measures its speed.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.built import SUFFIX, Signature, open_built

# Requirements of the library and of integer products, for error messages.
NEEDED = (
    "a CPU with AVX2 or AVX-512 (/proc/cpuinfo), the layers' C++ that pip install builds where "
    "there is g++, and no MTP_LIGHTNING_NATIVE=0"
)
NEEDED_FOR_INTEGERS = "a CPU with AVX2, or with AVX-512 VNNI (avx512_vnni in /proc/cpuinfo)"

# The instructions that PyTorch finds on this machine, "AVX512" or "AVX2" or others.
INSTRUCTIONS = torch.backends.cpu.get_cpu_capability()
# Name of the code in checkpoints, and in messages.
_CODE = {"AVX512": ("native", "C++ for AVX-512"), "AVX2": ("native_avx2", "C++ for AVX2")}
# Whether oneDNN's AVX-512 code is available inside PyTorch; with AVX2, MKL's is faster.
ONEDNN = (
    torch.backends.mkldnn.is_available()
    and INSTRUCTIONS == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)

# Name -> argument types. See cpp/.
_FUNCTIONS = {
    "attention_forward": (*[c_void_p] * 7, c_void_p),
    "attention_backward": (*[c_void_p] * 10, c_void_p),
    "experts_sort": (*[c_void_p] * 3, c_int64, c_int64),
    "experts_forward": (*[c_void_p] * 4, c_void_p),
    "experts_backward": (*[c_void_p] * 10, c_void_p),
    "swiglu_forward": (*[c_void_p] * 2, c_int64, c_int64),
    "swiglu_backward": (*[c_void_p] * 3, c_int64, c_int64),
    "norm_forward": (*[c_void_p] * 4, c_int64, c_int64, c_double),
    "norm_backward": (*[c_void_p] * 6, c_int64, c_int64),
    "log_softmax": (c_void_p, c_int64, c_int64),
    "exponential": (c_void_p, c_int64),
    "draw_tokens": (*[c_void_p] * 3, c_int64, c_int64),
    "judge_drafts": (*[c_void_p] * 8, *[c_int64] * 4),
    "decode_blocks": (c_void_p, c_int64, *[c_void_p] * 4, c_double),
    "decode_join": (*[c_void_p] * 4, c_int64),
    "decode_draft": (c_void_p,) * 8,
    "decode_trunk": (c_void_p,) * 5,
    "decode_norm": (*[c_void_p] * 3, c_int64, c_int64, c_double),
    "decode_linear": (*[c_void_p] * 3, *[c_int64] * 4),
    "unpack_weight": (*[c_void_p] * 2, *[c_int64] * 3),
    "unpack_rows": (*[c_void_p] * 3, *[c_int64] * 4),
}
# The same for functions that return an int64.
_NUMBERS = {
    "attention_kept": (c_int64,),
    "multiplies_bytes": (),
    "packed_size": (c_int64,) * 3,
    "pack_weight": (*[c_void_p] * 2, *[c_int64] * 3),
    "pack_scaled": (*[c_void_p] * 4, *[c_int64] * 3),
}


def file_for(instructions: str) -> Path:
    """The library's file for some instructions."""
    return Path(__file__).with_name(f"_{instructions.lower()}{SUFFIX}")


def load(file: Path | None = None) -> tuple[ctypes.CDLL | None, str]:
    """The library in ``file``, by default this CPU's, or None and the reason."""
    if INSTRUCTIONS not in _CODE:
        return None, "this CPU has neither AVX2 nor AVX-512"
    signatures: dict[str, Signature] = {name: (types, None) for name, types in _FUNCTIONS.items()}
    signatures |= {name: (types, c_int64) for name, types in _NUMBERS.items()}
    # The library finds PyTorch's OpenMP and so runs on the same threads.
    sources = Path(__file__).with_name("cpp")
    return open_built(file or file_for(INSTRUCTIONS), sources, signatures)


library, _reason = load()


def code() -> tuple[str, str]:
    """The code that computes on a CPU, for ``nn.ops.code``."""
    if library is None:
        return "pytorch", f"PyTorch's operators ({_reason})"
    return _CODE[INSTRUCTIONS]


def version() -> str:
    """The digest of the library's sources; empty without a library."""
    return "" if library is None else str(library.built_from().decode())


def fits(*tensors: Tensor) -> bool:
    """Whether the library is there and supports these tensors: fp32 on a CPU, contiguous rows."""
    if library is None or torch.compiler.is_compiling():
        return False
    return all(x.is_cpu and x.dtype == torch.float32 and x.stride(-1) == 1 for x in tensors)


def lib() -> ctypes.CDLL:
    """The library; call only after :func:`fits`."""
    assert library is not None
    return library


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the library. Tensors stand for their addresses, and live until it returns.
    Products and norms of decoding take addresses themselves: this costs half a microsecond."""
    values = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    return getattr(lib(), name)(*values)
