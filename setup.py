"""Which packages a wheel holds, and the C++ of layers and words, built where there is a compiler
for it; everything else about the project is in pyproject.toml.

conf/ is installed as mtp_lightning/conf, and benchmarks/ and tests/ are not: packages of such
common names would be everybody's in site-packages.
"""

import platform
import runpy
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup

_INSTALLED = ["mtp_lightning*", "data_modules*", "sweeps*", "hydra_plugins*"]

_ROOT = Path(__file__).parent
_digest = runpy.run_path(str(_ROOT / "mtp_lightning" / "built.py"))["digest"]


def _extension(name: str, folder: str, *flags: str) -> Extension:
    """All C++ of a folder as one library that says what it was built from. Without a compiler for
    it, Python and PyTorch's operators do."""
    sources = sorted(str(file.relative_to(_ROOT)) for file in (_ROOT / folder).glob("*.cpp"))
    return Extension(
        name,
        sources=sources,
        depends=[str(file.relative_to(_ROOT)) for file in (_ROOT / folder).glob("*.h")],
        define_macros=[("BUILT_FROM", f'"{_digest(_ROOT / folder)}"')],
        extra_compile_args=["-std=c++17", "-O3", "-g0", *flags],
        optional=True,
    )


# One library for AVX-512 and one for AVX2; which a CPU has is asked before one is loaded. OpenMP is
# PyTorch's, found when it is loaded, and so not linked.
_NATIVE = [
    _extension(
        f"mtp_lightning.cpu._{name}",
        "mtp_lightning/cpu/cpp",
        *("-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", *machine),
    )
    for name, machine in {
        "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
        "avx2": ("-march=x86-64-v3",),
    }.items()
]

# Words of a text, on any CPU; without it Python's re splits them.
_WORDS = _extension("data_modules.tokenizers._words", "data_modules/tokenizers/cpp")

_LINUX = sys.platform == "linux"

setup(
    packages=[
        *find_namespace_packages(include=_INSTALLED, exclude=["*.cpp"]),
        "mtp_lightning.conf",
        *(f"mtp_lightning.conf.{name}" for name in find_namespace_packages("conf")),
    ],
    package_dir={"mtp_lightning.conf": "conf"},
    ext_modules=[
        *([_WORDS] if _LINUX else []),
        *(_NATIVE if _LINUX and platform.machine() == "x86_64" else []),
    ],
    # A file's time does not say of which sources a library is. Libraries are compiled side by side.
    options={"build_ext": {"force": True, "parallel": True}},
)
