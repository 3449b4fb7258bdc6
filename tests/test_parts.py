"""The optional parts: the core works without each of them, and without all of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_lightning import parts
from mtp_lightning.errors import UserError
from mtp_lightning.parts import PARTS
from tests.integration.helpers import ROOT, environment, execute
from tests.layout import imports, sources, takes
from tests.warm import Done

PACKAGES = ("mtp_lightning", "data_modules", "sweeps", "hydra_plugins")
HERE = [name for name in PARTS if parts.is_there(name)]

# In a copy of the tree; the installed one is hidden.
ALONE = """
import importlib, json, os, runpy, sys
def enter(root):
    hidden = lambda finder: str(getattr(finder, "__module__", "")).startswith("__editable")
    sys.meta_path = [finder for finder in sys.meta_path if not hidden(finder)]
    sys.path = [root, *(p for p in sys.path if os.path.realpath(p) != ROOT)]
""".replace("ROOT", repr(str(ROOT)))
ENTER = f"{ALONE}root, *sys.argv = sys.argv[1:]\nenter(root)\n"
RUN = f"{ENTER}runpy.run_path(sys.argv[0], run_name='__main__')"
# The modules that are imported before a copy's program starts: none of the checkout.
LIBRARIES = ("hydra", "lightning.pytorch", "numpy", "tokenizers", "torch", "torchmetrics")
# Imports the modules of each copy in a fork; a package of others may be missing. Files are compiled
# once, for all copies.
IMPORT = f"""{ALONE}
from importlib.machinery import SourceFileLoader
codes = {{name: compile(open(path).read(), path, "exec") for name, path in json.loads(sys.argv[2])}}
compiled = SourceFileLoader.get_code
SourceFileLoader.get_code = lambda self, name: codes.get(name) or compiled(self, name)
for root, names in json.loads(sys.argv[1]).items():
    sys.stderr.flush()
    if (child := os.fork()) == 0:
        enter(root)
        for name in names:
            try:
                found = importlib.import_module(name)
            except ImportError as error:
                if (error.name or "").split(".")[0] in {PACKAGES!r}:
                    raise
                continue
            assert (found.__file__ or root).startswith(root), found.__file__
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"in {{root}}")
"""

# Parts that need others. Claims count the FLOPs of what is left to run by a plan.
USES = {"heads": {"certify", "interop"}, "notebook": {"report"}, "claims": {"report", "plan"}}


def without(folder: Path, *taken: str) -> Path:
    """A copy of the tree without some parts."""
    for name in (*PACKAGES, "conf"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("train.py", "generate.py", "export.py", "serve.py", "doctor.py"):
        shutil.copy(ROOT / name, folder / name)
    for part in taken:
        path = folder.joinpath(*PARTS[part].module.split("."))
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.with_suffix(".py").unlink()
    return folder


def run(root: Path, *arguments: str, code: int = 0) -> Done:
    """A program of a copy."""
    command = [sys.executable, "-c", RUN, str(root), *arguments]
    return execute(command, root, code=code, imported=LIBRARIES)


def module(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def modules(*taken: str) -> list[str]:
    """The modules that must import without some parts and without the parts that use these."""
    gone = {*taken, *(name for name in PARTS if USES.get(name, set()) & set(taken))}
    homes = [PARTS[name].module for name in gone]
    names = []
    for file in sources(*PACKAGES):
        name = module(file)
        if not takes(name, *homes) and not name.endswith("__main__"):
            names.append(name)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("each", [False, pytest.param(True, marks=pytest.mark.long)])
def test_every_module_imports_without_all_parts_and_without_each(tmp_path, each):
    taken = {part: (part,) for part in HERE} if each else {"all": tuple(HERE)}
    todo = {str(without(tmp_path / name, *gone)): modules(*gone) for name, gone in taken.items()}
    files = [(module(file), str(ROOT / file)) for file in sources(*PACKAGES)]
    program = [sys.executable, "-c", IMPORT, json.dumps(todo), json.dumps(files)]
    execute(program, tmp_path, code=0, imported=LIBRARIES, seconds=600)


@pytest.mark.slow
def test_the_core_trains_and_generates_without_any_part(tmp_path: Path) -> None:
    root, folder = without(tmp_path / "tree", *HERE), tmp_path / "run"
    (tmp_path / "text").write_text("a line of text, and another one\n" * 3000)
    small = ("data=text", f"data.paths={tmp_path / 'text'}", "tokenizer=byte", "model=pico")
    cache = f"paths.cache_dir={tmp_path / 'cache'}"
    run(root, "train.py", "debug=fast", *small, f"run_dir={folder}", cache)
    assert json.loads((folder / "summary.json").read_text())["step"] == 20
    done = run(root, "generate.py", f"checkpoint={folder}", "prompt=a line", "max_new_tokens=8")
    assert done.stdout.startswith("a line")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}")
    other, hub = f"run_dir={tmp_path / 'other'}", tmp_path / "hub"
    for words, module in (
        (("train.py", "trainer.strategy=fsdp", other), "mtp_lightning/distributed"),
        (("train.py", "data=packages", other), "data_modules/corpora"),
        (("generate.py", f"checkpoint={hub}", "prompt=a"), "mtp_lightning/interop"),
        (("export.py", f"checkpoint={folder}", f"output={hub}/x"), "mtp_lightning/interop"),
        (("serve.py", f"checkpoint={folder}"), "mtp_lightning/serving"),
    ):
        error = run(root, *words, code=1).stderr
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert f"needs {module} (" in error


def test_no_file_of_the_core_imports_a_part() -> None:
    for file in sources(*PACKAGES):
        name = module(file)
        homes = {part for part, entry in PARTS.items() if takes(name, entry.module)}
        if name == "mtp_lightning.parts":
            continue
        allowed = {*homes, *(use for part in homes for use in USES.get(part, ()))}
        for part in PARTS.keys() - allowed:
            for imported in imports(file):
                assert not takes(imported, PARTS[part].module), f"{part} is named by {file}"


def test_a_missing_part_is_named_with_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "is_there", lambda name: False)
    with pytest.raises(UserError, match="trainer.strategy=fsdp needs mtp_lightning/distributed"):
        parts.need("distributed", "trainer.strategy=fsdp")
    assert parts.absent("sweeps.report.__main__") == "report"
    assert parts.absent("mtp_lightning.mtp.none.NoMTPConfig") is None


CORE = [f"tests/{n}" for n in ("nn", "mtp", "objective", "decoding", "run", "data_modules")]


@pytest.mark.long
@pytest.mark.parametrize("part", HERE)
def test_the_cores_tests_pass_without_a_part(part: str, tmp_path: Path) -> None:
    root = without(tmp_path, part)
    for name in ("docs", "tests"):
        shutil.copytree(ROOT / name, root / name)
    for name in ("pyproject.toml", "setup.py"):  # with their times: tests/kernels.py compares them
        shutil.copy2(ROOT / name, root / name)
    program = f"{ENTER}import pytest; sys.exit(pytest.main(sys.argv))"
    skipped = [f"--deselect={file}" for file in _of_part(part)]
    # In a new process and without workers: forks of tests/warm.py have the checkout's `tests`, and
    # workers would import the parts of the checkout.
    args = [sys.executable, "-c", program, str(root), "-n", "0", "-x", *CORE, *skipped]
    run = {"cwd": root, "env": environment(), "capture_output": True, "text": True}
    done = subprocess.run(args, timeout=1800, **run)
    assert done.returncode == 0, done.stdout + done.stderr


def _of_part(part: str) -> list[str]:
    """Test files that import a part."""
    return [
        file
        for file in sources("tests")
        if any(takes(name, PARTS[part].module) for name in imports(file))
    ]
