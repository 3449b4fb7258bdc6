"""What makes a CPU fast: C++ for AVX-512, oneDNN's products, and fused passes of decoding.

A part that comes off: importing it registers it with the core's ops (``nn/ops.py``) and fused
passes (``decoding/fused.py``), and no file of the core but ``parts.py`` names it.
"""

from mtp_lightning.cpu import attention, experts, library, linear, rms_norm, rotary, softmax, swiglu
from mtp_lightning.cpu.fused import CPUPasses
from mtp_lightning.decoding import fused
from mtp_lightning.nn import ops

ops.register_code("cpu", library.code)
fused.register("cpu", CPUPasses, lambda: library.NEEDED if library.library is None else None)

__all__ = ["attention", "experts", "linear", "rms_norm", "rotary", "softmax", "swiglu"]
