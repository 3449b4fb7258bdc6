"""The README's commands are what a newcomer types first: they run, or at least compose."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL))
COMMANDS = [line.split(" #")[0].strip() for line in BLOCKS.splitlines() if line.strip()]
APPS = {
    app: [shlex.split(c)[2:] for c in COMMANDS if c.startswith(f"python {app}.py")]
    for app in ("train", "evaluate", "generate", "export")
}
SHORT = ["debug=fast", "trainer.max_steps=10", "logger=csv"]


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    app, *overrides = arguments
    command = [sys.executable, str(ROOT / app), *overrides]
    # From another directory, as the apps promise.
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)


def test_the_two_commands_are_there() -> None:
    assert "pip install -e . && python train.py" in COMMANDS
    assert "pip install -e '.[test]' && pytest" in COMMANDS


def test_the_main_job_shortened(tmp_path: Path) -> None:
    done = run(tmp_path, "train.py", "run_dir=runs/mine", *SHORT)
    assert done.returncode == 0, done.stderr
    for shown in ("next token (depth 0)", "depth 2", "bits per byte", "parameters", "Sample"):
        assert shown in done.stdout
    folder = tmp_path / "runs" / "mine"
    for file in ("config.yaml", "metrics.csv", "summary.json", "checkpoints/last.ckpt"):
        assert (folder / file).is_file(), file

    done = run(tmp_path, "evaluate.py", "checkpoint=runs/mine", "eval_bytes=1000")
    assert done.returncode == 0 and "bits per byte" in done.stdout, done.stderr
    done = run(tmp_path, "generate.py", "checkpoint=runs/mine", "prompt='def '", "max_new_tokens=5")
    assert done.returncode == 0 and done.stdout.startswith("def "), done.stderr


@pytest.mark.parametrize(
    ("app", "overrides"),
    [(app, overrides) for app, commands in APPS.items() for overrides in commands],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_every_other_command_composes(app: str, overrides: list[str]) -> None:
    name = "config" if app == "train" else app
    if "-m" in overrides:  # the first job of a sweep
        overrides = [re.sub(r"=([^\[,]*),.*", r"=\1", o) for o in overrides if o != "-m"]
    overrides = [o for o in overrides if not o.startswith("-")]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        compose(name, overrides)
