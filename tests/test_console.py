"""``mtp-lightning COMMAND``: help, versions, and paths with special characters."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtp_lightning.console import APPS, TOOLS
from tests.integration import helpers
from tests.warm import LIGHT, Done

# A folder's name with the special characters of Hydra, YAML and shells.
ODD = "a [b], c='d' \"e\" #运行 $f \\ (g) {h} ~i"


def console(*arguments: str, imported: tuple[str, ...] = LIGHT) -> Done:
    """The command of this checkout; its last line of output lists the loaded slow packages."""
    program = (
        "import atexit, sys; sys.argv[0] = 'mtp-lightning';"
        "slow = ['torch', 'lightning', 'hydra', 'omegaconf', 'numpy', 'matplotlib'];"
        "atexit.register(lambda: print('LOADED', [m for m in slow if m in sys.modules]));"
        "from mtp_lightning.console import main; main()"
    )
    return helpers.execute([sys.executable, "-c", program, *arguments], imported=imported, code=0)


@pytest.mark.parametrize("arguments", [(), ("help",)])
def test_help_lists_the_commands_at_once(arguments: tuple[str, ...]) -> None:
    done = console(*arguments, imported=())
    assert done.stdout.endswith("LOADED []\n")
    for command in (*APPS, *TOOLS):
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("arguments", [(), ("train",), ("doctor",), ("doctor", "graft")])
def test_version_is_printed_by_every_command(arguments: tuple[str, ...]) -> None:
    done = console(*arguments, "--version")
    assert done.stdout.startswith(f"mtp-lightning {metadata.version('mtp-lightning')}\n")


@pytest.mark.parametrize("command", ["train", "serve"])
def test_an_apps_help_names_the_console_command(command: str) -> None:
    done = console(command, "--help")
    assert f"  mtp-lightning {command}" in done.stdout and "python " not in done.stdout
    assert "LOADED ['hydra', 'omegaconf']" in done.stdout


@pytest.mark.parametrize("command", TOOLS)
def test_a_tools_help_names_the_console_command(command: str) -> None:
    done = console(command, "--help")
    assert done.stdout.startswith(f"usage: mtp-lightning {command} ")
    assert "python -m" not in done.stdout


def test_hydras_own_flags_work(tmp_path: Path) -> None:
    (tmp_path / "mtp").mkdir()
    mine = "_target_: mtp_lightning.mtp.linear.LinearConfig\ndepth: 5\n"
    (tmp_path / "mtp" / "mine.yaml").write_text(mine)
    done = console("train", "--config-dir", str(tmp_path), "mtp=mine", "--cfg", "job")
    assert "  depth: 5\n" in done.stdout


def app(name: str, *arguments: str, cwd: Path) -> str:
    program = [sys.executable, str(helpers.ROOT / f"{name}.py")]
    return helpers.execute([*program, *arguments], cwd, code=0).stdout


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an oddly named one in it, which has texts and a run on one of them."""
    base = tmp_path_factory.mktemp("typed")
    odd = base / ODD
    odd.mkdir()
    for name in ("文本, 1.txt", "文本, 2.txt"):
        (odd / name).write_text(f"one line of {name}, and another line of it\n" * 400)
    output = app("train", *settings(odd), f"run_dir={ODD}/运行", cwd=base)
    (odd / "output").write_text(output)
    return base


def settings(odd: Path, **more: Any) -> list[str]:
    data = {"data": "text", "data.paths": f"{ODD}/文本, 1.txt", "mtp.depth": 1}
    steps = {"trainer.max_steps": 4, "trainer.val_check_interval": 4}
    return helpers.overrides(odd / "cache", {**data, **steps, **more})


RUN = f"checkpoint={ODD}/运行/checkpoints/last.ckpt"
SHORT = ("max_new_tokens=3", "num_threads=1")


def test_train_and_generate_take_odd_paths_and_prompts_literally(base: Path) -> None:
    config = yaml.safe_load((base / ODD / "运行" / "config.yaml").read_text())
    assert config["data"]["paths"] == f"{ODD}/文本, 1.txt"
    prompt = "def main(\"${x}\", 'é', [多任务]) = {a: b}, \\ #"
    shown = app("generate", RUN, *SHORT, f"prompt={prompt}", "stop=ab, c(", cwd=base)
    assert shown.startswith(prompt)


@pytest.mark.slow
def test_the_command_that_a_run_prints_at_its_end_works(base: Path) -> None:
    output = (base / ODD / "output").read_text().splitlines()
    (line,) = [line for line in output if line.startswith("text ")]
    typed = f"{sys.executable} {helpers.ROOT}/{line.split('python ', 1)[1]} {' '.join(SHORT)}"
    done = subprocess.run(
        ["sh", "-c", typed], capture_output=True, text=True, cwd=base, env=helpers.environment()
    )
    assert done.returncode == 0 and done.stdout.startswith("..."), done.stderr


@pytest.mark.slow
def test_prompts_and_output_may_have_odd_paths(base: Path) -> None:
    (base / ODD / "prompts, 1").write_text("Hello, world\n")
    shown = app("generate", RUN, *SHORT, f"prompts={ODD}/prompts, 1", cwd=base)
    assert shown.startswith("Hello, world")
    out = f"{ODD}/数, 1.json"
    app("evaluate", RUN, f"output={out}", "decode.n_prompts=0", cwd=base)
    assert json.loads((base / out).read_text())["step"] == 4


@pytest.mark.slow
def test_a_run_is_exported_to_an_odd_path_and_evaluated(base: Path) -> None:
    pytest.importorskip("safetensors", reason="export needs it")
    folder = f"checkpoint={ODD}/[出]"
    app("export", RUN, f"output={ODD}/[出]", "verify=false", cwd=base)
    evaluate = [sys.executable, str(helpers.ROOT / "evaluate.py"), folder]
    error = helpers.execute(evaluate, base, code=1).stderr
    assert "[出] has no validation text of its own: give one" in error
    # The same text through either gives the same numbers.
    text = ["data=text", f"data.paths={ODD}/文本, 2.txt", "data.seq_len=16", "decode.n_prompts=0"]
    metrics = []
    for checkpoint in (folder, RUN):
        app("evaluate", checkpoint, *text, "data.val_fraction=0.5", "output=x.json", cwd=base)
        metrics.append(json.loads((base / "x.json").read_text()))
    values = [tag for tag in metrics[0] if tag.startswith("val/")]
    assert {"val/loss_depth_1", "val/bits_per_byte", "val/context_score"} <= set(values)
    for tag in values:
        assert metrics[0][tag] == pytest.approx(metrics[1][tag], rel=1e-6), tag


@pytest.mark.slow
def test_the_jobs_of_a_sweep_get_odd_paths_literally(base: Path) -> None:
    arguments = [*settings(base / ODD, seed="0,1"), f"sweep_dir={ODD}/扫, 1"]
    assert "2 jobs done" in app("train", "-m", *arguments, cwd=base)
    configs = sorted((base / ODD / "扫, 1").glob("*/config.yaml"))
    stored = [yaml.safe_load(file.read_text())["data"]["paths"] for file in configs]
    assert stored == [f"{ODD}/文本, 1.txt"] * 2
    assert "2 done before" in app("train", "-m", *arguments, cwd=base)


@pytest.mark.parametrize("used", [False, True])
def test_what_imports_made_is_unfrozen_at_the_end_where_triton_would_call_it_leaked(used: bool):
    program = (
        "import atexit, gc, sys, types\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 0))\n"
        "from mtp_lightning.apps import imports\n"
        "with imports(): pass\n"
        f"{used} and sys.modules.update(triton=types.ModuleType('triton'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == [str(not used)]
