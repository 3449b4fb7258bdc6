"""Compiled CPU programs, stored on disk (AOTInductor): built once, then loaded in milliseconds.

A program is a function of tensors with static shapes, compiled ahead of time. It stores no weights:
it is bound to the memory of the model's weights, so that a change in place changes its results. Its
folder in the cache is named by a hash of everything that it depends on: PyTorch, the processor,
the number of threads, the shapes of weights and inputs, the model's config and the source that it
was compiled from. The cache may be deleted at any time.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import os
import platform
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_modules.cache import build_once, cache_folder
from mtp_lightning.errors import UserError

log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parents[1]
# Source files that the passes of decoding are compiled from.
_SOURCES = ("nn", "mtp", "model.py", "decoding/compiled.py")
_COMPILERS = ("c++", "g++", "clang++", "cl")
_FILE = "program.pt2"


class LoadedProgram:
    """A program that this process has loaded from its file.

    Raises:
        RuntimeError: the file is damaged.
    """

    def __init__(self, file: Path) -> None:
        # One runner is enough: the lock lets one call run at a time.
        self._loader = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", True, 1, -1)
        self._function: nn.Module | None = None
        self._weights: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def __call__(self, function: nn.Module, *inputs: Tensor) -> list[Tensor]:
        """The program's outputs with the weights of ``function``: the compiled module, or one of
        the same structure."""
        with self._lock:  # another thread may run the program with the weights of another module
            if function is not self._function:
                tensors = dict(_weights(function))
                # Kept alive while the program uses their memory.
                self._weights = {name: tensors[name] for name in self._loader.get_constant_fqns()}
                self._loader.load_constants(self._weights, False, True, True)
                self._function = function
            return self._loader.boxed_run(list(inputs))


_loaded: dict[str, LoadedProgram] = {}


def program(function: nn.Module, inputs: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
    """The program of ``function(*inputs)``, with its weights; built if it is not in the cache.

    Args:
        function: returns a tuple of tensors. Its ``extra_repr`` must show anything that its result
            depends on besides its config and its classes' source, such as a switch of its own.
        inputs: of the shapes that it will be called with; it may write to them in place.

    Raises:
        UserError: the program must be built, and there is no C++ compiler.
        OSError: the cache folder cannot be written.
    """
    key = _key(function, inputs)
    if key not in _loaded:
        folder = cache_folder() / "programs" / key
        try:
            _loaded[key] = LoadedProgram(_built(folder, function, inputs))
        except RuntimeError as error:
            if not folder.exists():
                raise
            log.info("%s is damaged; building it again: %s", folder, str(error).partition("\n")[0])
            shutil.rmtree(folder)
            _loaded[key] = LoadedProgram(_built(folder, function, inputs))
    return functools.partial(_loaded[key], function)


def _built(folder: Path, function: nn.Module, inputs: Sequence[Tensor]) -> Path:
    if not folder.is_dir():
        require_compiler()
        log.info("building a compiled pass, once for this model and machine: %s", folder)
        build_once(folder, lambda path: _build(path / _FILE, function, inputs))
    return folder / _FILE


def require_compiler() -> None:
    """Raise a UserError if there is no C++ compiler, which ``torch.compile`` needs."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), *_COMPILERS)):
        raise UserError(
            "compile=true needs a C++ compiler, and none is on the PATH: install g++ or clang++, "
            "or decode with compile=false."
        )


def _build(file: Path, function: nn.Module, inputs: Sequence[Tensor]) -> None:
    import torch._inductor

    # Trace with tensors of our own: tracing writes to them, and inference tensors cannot be traced.
    with torch.inference_mode(False), torch.no_grad():
        examples = tuple(torch.zeros_like(x) for x in inputs)
        exported = torch.export.export(function, examples, strict=False)
        lifted = exported.constants.keys() - dict(_weights(function)).keys()
        assert not lifted, f"{sorted(lifted)} are neither parameters nor buffers"
        torch._inductor.aoti_compile_and_package(
            exported,
            package_path=str(file),
            inductor_configs={"aot_inductor.package_constants_in_so": False},
        )


def _weights(function: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under all of their names; a tied weight has several."""
    for name, parameter in function.named_parameters(remove_duplicate=False):
        yield name, parameter.detach()
    yield from function.named_buffers(remove_duplicate=False)


def _key(function: nn.Module, inputs: Sequence[Tensor]) -> str:
    """A hash of everything that a program depends on."""
    facts = {
        "torch": torch.__version__,
        "machine": _machine(),
        "threads": torch.get_num_threads(),
        "function": repr(function),
        "config": getattr(getattr(function, "model", None), "config", None),
        "weights": [(n, x.shape, x.dtype, x.stride()) for n, x in _weights(function)],
        "inputs": [(x.shape, x.dtype, x.stride()) for x in inputs],
        "source": _source(frozenset(type(m) for m in function.modules())),
    }
    text = json.dumps({name: repr(fact) for name, fact in facts.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def _machine() -> str:
    """The processor and its instruction sets, as far as the system reports them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    facts = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return "\n".join((platform.machine(), torch.backends.cpu.get_cpu_capability(), *facts))


@functools.cache
def _source(classes: frozenset[type[Any]]) -> str:
    """A digest of the project's own passes and of the files that define other classes."""
    paths = [_PACKAGE / name for name in _SOURCES]
    files = {file for p in paths for file in ([p] if p.is_file() else p.rglob("*.py"))}
    others = (kind for kind in classes if not kind.__module__.startswith("torch."))
    files |= {Path(source) for source in map(inspect.getsourcefile, others) if source}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()
