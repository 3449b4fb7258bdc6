"""FLOP/s of a device: the vendor's published peak, if known, and the rate measured here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

# TFLOP/s of dense matrix products with fp32 accumulation, from the vendors' data sheets (which
# print twice as much, for sparse matrices), by the words of the device's name. fp16 equals bf16.
_PEAKS: dict[str, dict[str, float]] = {
    "V100 SXM2": {"fp16": 125.0, "fp32": 15.7},
    "T4": {"fp16": 65.0, "fp32": 8.1},
    "A10": {"bf16": 125.0, "tf32": 62.5, "fp32": 31.2},
    "A100": {"bf16": 312.0, "tf32": 156.0, "fp32": 19.5, "fp64": 19.5},
    "H100 HBM3": {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9, "fp64": 66.9},
    "H100 PCIE": {"bf16": 756.0, "tf32": 378.0, "fp32": 51.2, "fp64": 51.2},
    "H100 NVL": {"bf16": 835.5, "tf32": 417.5, "fp32": 60.0, "fp64": 60.0},
    "H200": {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9, "fp64": 66.9},
    "H200 NVL": {"bf16": 835.5, "tf32": 417.5, "fp32": 60.0, "fp64": 60.0},
    "L4": {"bf16": 121.0, "tf32": 60.0, "fp32": 30.3},
    "L40S": {"bf16": 362.0, "tf32": 183.0, "fp32": 91.6},
    "RTX 3090": {"bf16": 71.0, "tf32": 35.6, "fp32": 35.6},
    "RTX 4090": {"bf16": 165.2, "tf32": 82.6, "fp32": 82.6},
    "MI300X": {"bf16": 1307.4, "fp32": 163.4, "fp64": 163.4},
}
# Parts of these devices, and slower ones with the same name.
_OTHERS = {"MIG", "LAPTOP", "MAX", "TI", "D"}
_KINDS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


@dataclass(frozen=True)
class MatmulRate:
    """FLOP/s of plain matrix products in this process."""

    fastest: float  # of the measured products: other processes hardly lower it
    typical: float  # the median: other processes lower it


def published_peak(name: str, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
    """FLOP/s that a device's vendor states for dense matrix products; None if unknown. ``name`` is
    the driver's (``NVIDIA H100 80GB HBM3``); with ``tf32``, fp32 products may be rounded to TF32.
    """
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    fitting = [key for key in _PEAKS if words >= set(key.split())]
    if not fitting or words & _OTHERS:
        return None
    rates = _PEAKS[max(fitting, key=lambda key: len(key.split()))]
    kind = _KINDS.get(dtype, "fp32")
    if kind == "fp16":
        tera = rates.get("fp16", rates.get("bf16"))
    elif kind == "fp32" and tf32:
        tera = rates.get("tf32", rates["fp32"])
    else:
        tera = rates.get(kind)
    return None if tera is None else tera * 1e12


def peak_of(device: torch.device, dtype: torch.dtype) -> float | None:
    """:func:`published_peak` of a device of this machine; None for a CPU."""
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return published_peak(torch.cuda.get_device_name(device), dtype, tf32=tf32)


def run_dtype(precision: str) -> torch.dtype:
    """The dtype of the products in a run with Lightning's `trainer.precision`."""
    kinds = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    return kinds.get(precision.partition("-")[0], torch.float32)


def measure_matmul_rate(
    device: torch.device, dtype: torch.dtype, *, seconds: float = 0.3
) -> MatmulRate:
    """Times matrix products, 1024^3 on a CPU and 8192^3 on a GPU, for about `seconds`, without a
    random number from the run's generators."""
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype, generator=generator)
    out = torch.empty_like(a)
    times: list[float] = []
    # Not torch.utils.benchmark: its import loads setuptools, and warns of CUDA without a GPU.
    while sum(times[1:]) < seconds:  # the first product prepares the others
        began = perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(perf_counter() - began)
    flops = 2.0 * size**3
    return MatmulRate(fastest=flops / min(times[1:]), typical=flops / median(times[1:]))
