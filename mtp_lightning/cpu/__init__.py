"""Fast code for CPUs: C++ for AVX-512 and AVX2, oneDNN's products, and fused decode steps.

This part can be deleted as a whole. Importing it registers its functions with the core's ops
(``nn/ops.py``) and fused passes (``decoding/fused.py``); no file of the core except ``parts.py``
names it.
"""

from mtp_lightning.cpu import attention, experts, layers, library, linear, sampling
from mtp_lightning.cpu.packed_cache import CPUWeightPacker
from mtp_lightning.cpu.prepared import CPUPasses, multiply_integers
from mtp_lightning.decoding import fused
from mtp_lightning.nn import ops

ops.register_code(library.code)
fused.register(
    "cpu",
    fused.DecodingCode(
        passes=CPUPasses,
        rounded_weights_need=lambda: library.NEEDED if library.library is None else None,
        packer_for=lambda *given: None if library.library is None else CPUWeightPacker(*given),
        multiply_integers=multiply_integers,
        version=library.version(),
    ),
)

__all__ = ["attention", "experts", "layers", "linear", "sampling"]
