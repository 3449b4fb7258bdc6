"""Stored compiled programs: their keys, how they are loaded again, and new weights."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mtp_lightning.decoding import programs
from mtp_lightning.decoding.compiled import _DepthPass, _TrunkPass
from mtp_lightning.decoding.programs import program
from mtp_lightning.model import MTPModel
from tests.decoding.models import small_model

needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")


class Scaled(nn.Module):
    """Writes to an input, and returns a product with its weight."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))

    def forward(self, x, counter):
        counter.add_(1.0)
        return (x @ self.weight.t(),)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and no loaded programs."""
    monkeypatch.setenv("MTP_LIGHTNING_CACHE", str(tmp_path))
    monkeypatch.setattr(programs, "_loaded", {})
    return tmp_path / "programs"


def trunk_pass(**changes) -> _TrunkPass:
    model = small_model(0, 2)
    if changes:
        config = replace(model.config, trunk=replace(model.config.trunk, **changes))
        model = MTPModel(config).eval()
    return _TrunkPass(model, drafts=True)


def test_the_key_changes_with_everything_that_a_program_depends_on(monkeypatch):
    inputs = (torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 4))
    function = trunk_pass()
    key = programs._key(function, inputs)
    assert programs._key(trunk_pass(), inputs) == key
    keys = [
        key,
        programs._key(trunk_pass(d_ff=64), inputs),  # a weight's shape
        programs._key(trunk_pass(rope_theta=5e4), inputs),
        programs._key(_TrunkPass(function.model, drafts=False), inputs),
        programs._key(_DepthPass(function.model, 1), inputs),
        programs._key(_DepthPass(function.model, 2), inputs),
        programs._key(function, (inputs[0][:, :2], inputs[1])),
        programs._key(function, (inputs[0], inputs[1].double())),
    ]
    for module, name, value in (
        (torch, "__version__", "9.9.9"),
        (programs, "_machine", lambda: "another processor"),
        (torch, "get_num_threads", lambda: 7),
        (programs, "_source", lambda classes: "other code"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            keys.append(programs._key(function, inputs))
    assert len(set(keys)) == len(keys)


def test_the_key_changes_with_the_code_of_the_package_and_of_a_users_class(tmp_path, monkeypatch):
    package = programs._source(frozenset({nn.Linear}))
    assert programs._source(frozenset({Scaled})) != package
    shutil.copytree(programs._PACKAGE / "nn", tmp_path / "nn")
    for name in ("mtp", "decoding"):
        shutil.copytree(programs._PACKAGE / name, tmp_path / name)
    shutil.copy(programs._PACKAGE / "model.py", tmp_path)
    monkeypatch.setattr(programs, "_PACKAGE", tmp_path)
    source = programs._source.__wrapped__
    assert source(frozenset({nn.Linear})) == package
    with (tmp_path / "nn" / "kv_cache.py").open("a") as file:
        file.write("\n")
    assert source(frozenset({nn.Linear})) != package


def test_a_missing_compiler_is_named(cache, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler, and none is on the PATH"):
        program(Scaled(), (torch.ones(2, 8), torch.zeros(3)))
    assert not cache.exists()


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_program_is_built_once_reads_new_weights_and_is_repaired(cache, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    function, x, counter = Scaled(), torch.randn(2, 8), torch.zeros(3)

    def check(function):
        (y,) = program(function, (x, counter))(x, counter)
        torch.testing.assert_close(y, x @ function.weight.detach().t())

    check(function)
    assert counter.tolist() == [1.0] * 3  # building did not run it
    with torch.no_grad():
        function.weight.mul_(-2.0)
    check(function)
    # Another model of the same shapes shares the program, with its own weights.
    calls = [(model, program(model, (x, counter))) for model in (function, Scaled())]
    for model, call in [*calls, calls[0]]:
        torch.testing.assert_close(call(x, counter)[0], x @ model.weight.detach().t())
    (folder,) = cache.iterdir()
    # Another process needs no compiler.
    monkeypatch.setattr(programs, "_loaded", {})
    monkeypatch.setattr(programs, "_build", None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    check(function)
    monkeypatch.undo()
    monkeypatch.setenv("MTP_LIGHTNING_CACHE", str(cache.parent))
    monkeypatch.setattr(programs, "_loaded", {})
    (folder / programs._FILE).write_bytes(b"no program")
    check(function)
    assert "is damaged; building it again" in caplog.text
    assert [path.name for path in cache.iterdir()] == [folder.name]


class SlowLoader:
    """Stands for PyTorch's loader, and gives other threads time between binding and running."""

    def __init__(self, *_):
        self.weight = None

    def get_constant_fqns(self):
        return ["weight"]

    def load_constants(self, weights, *_):
        self.weight = weights["weight"]
        time.sleep(0.1)

    def boxed_run(self, inputs):
        return [inputs[0] @ self.weight.t()]


def test_threads_that_share_a_program_do_not_mix_their_weights(monkeypatch):
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", SlowLoader)
    loaded, x, models = programs.LoadedProgram(Path("x")), torch.randn(2, 8), [Scaled(), Scaled()]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda model: loaded(model, x)[0], models))
    for model, result in zip(models, results, strict=True):
        torch.testing.assert_close(result, x @ model.weight.detach().t())


_DECODE = """
import sys, time, torch
torch.set_num_threads(1)
from mtp_lightning.decoding import generate
from tests.decoding.models import small_model
model = small_model(5, 2)
began = time.process_time()
(text,) = generate(model, [[1, 2, 3, 4]], max_new_tokens=12, compile=True)
print(time.process_time() - began, *text.token_ids, "torch._dynamo" in sys.modules)
"""


@needs_compiler
@pytest.mark.long  # the test above imitates another process
def test_a_second_process_compiles_nothing(cache):
    def decode() -> list[str]:
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _DECODE], capture_output=True, text=True
        )
        assert not run.returncode, run.stderr
        return run.stdout.split()

    first, second = decode(), decode()
    assert float(second[0]) < 2 < float(first[0])
    assert second[1:-1] == first[1:-1]
    assert second[-1] == "False"  # nothing is traced
