"""Which packages a wheel holds, and the C++ of layers and words, built where there is a compiler
for it; everything else about the project is in pyproject.toml.

conf/ is installed as mtp_lightning/conf, and benchmarks/ and tests/ are not: packages of such
common names would be everybody's in site-packages.
"""

import platform
import sys

from setuptools import Extension, find_namespace_packages, setup

_INSTALLED = ["mtp_lightning*", "data_modules*", "sweeps*", "hydra_plugins*"]

_CPP = "mtp_lightning/nn/kernels/cpp"

# AVX-512; a CPU without it is asked before the library is loaded. OpenMP is PyTorch's, found when
# it is loaded, and so not linked.
_NATIVE = Extension(
    "mtp_lightning.nn.kernels._native",
    sources=[f"{_CPP}/{name}.cpp" for name in ("attention", "experts", "layers", "narrow", "pack")],
    depends=[f"{_CPP}/{name}.h" for name in ("vector", "few", "rows")],
    extra_compile_args=[
        *("-std=c++17", "-O3", "-fopenmp", "-march=x86-64-v4", "-mprefer-vector-width=512"),
        *("-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-g0"),
    ],
    # Without a compiler the layers do with PyTorch's operators.
    optional=True,
)

# Words of a text, on any CPU; without it Python's re splits them.
_WORDS = Extension(
    "data_modules.tokenizers._words",
    sources=["data_modules/tokenizers/cpp/words.cpp"],
    extra_compile_args=["-std=c++17", "-O3", "-g0"],
    optional=True,
)

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
        *([_NATIVE] if _LINUX and platform.machine() == "x86_64" else []),
    ],
)
