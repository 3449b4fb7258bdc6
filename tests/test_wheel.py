"""The project installed from its wheel: the console command works from another folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.integration import helpers

pytestmark = pytest.mark.slow

NOT_SOURCE = (".*", "build", "dist", "runs", "outputs", "multirun", "*.egg-info", "__pycache__")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the project's wheel, and this environment's packages."""
    base = tmp_path_factory.mktemp("wheel")
    # The environment lies in a user's repository, whose commits are not the project's.
    git = ["git", "-C", str(base), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "theirs"], check=True)
    # From a copy, since building leaves folders next to the sources.
    shutil.copytree(helpers.ROOT, base / "src", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", base, base / "src"], check=True)
    (wheel,) = base.glob("*.whl")
    shutil.rmtree(base / "src")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", base / "env"], check=True)
    python = base / "env" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    # A line of a .pth file is searched last, and the .pth files there are not read: an editable
    # install of the project stays invisible.
    (site_packages(base / "env") / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return base / "env"


def site_packages(environment: Path) -> Path:
    (folder,) = environment.glob("lib/python*/site-packages")
    return folder


def command(environment: Path, *arguments: str, cwd: Path) -> str:
    variables = {k: v for k, v in helpers.environment().items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [environment / "bin" / "mtp-lightning", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=cwd,
        env=variables,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_installs_its_packages_with_all_their_files(environment: Path) -> None:
    folder = site_packages(environment)
    left = {path.name for path in folder.iterdir() if path.suffix not in (".pth", ".dist-info")}
    assert left == {"mtp_lightning", "data_modules", "sweeps", "hydra_plugins"}
    for name in ("conf", "mtp_lightning", "data_modules", "sweeps", "hydra_plugins"):
        installed = folder / ("mtp_lightning/conf" if name == "conf" else name)
        for file in (helpers.ROOT / name).rglob("*"):
            if file.suffix in (".py", ".yaml", ".jinja", ".html"):
                assert (installed / file.relative_to(helpers.ROOT / name)).is_file(), file


def test_the_installed_copy_is_imported(environment: Path, tmp_path: Path) -> None:
    program = "import mtp_lightning.paths as p; print(p.CONF, *p.app('train'))"
    python = environment / "bin" / "python"
    conf, *app = subprocess.check_output([python, "-c", program], text=True, cwd=tmp_path).split()
    assert Path(conf) == site_packages(environment) / "mtp_lightning" / "conf"
    assert app == ["-m", "mtp_lightning.apps.train"]


def test_the_installed_commands_train_generate_and_serve(environment: Path, tmp_path: Path) -> None:
    arguments = helpers.overrides(
        tmp_path / "cache", {"trainer.max_steps": 20, "trainer.val_check_interval": 20}
    )
    output = command(environment, "train", *arguments, "run_dir=运行 1", cwd=tmp_path)
    assert "mtp-lightning generate checkpoint='运行 1'" in output
    summary = json.loads((tmp_path / "运行 1" / "summary.json").read_text())
    assert summary["step"] == 20 and summary["git_commit"] is None
    # The name of a log is the app's, however it was started.
    assert (tmp_path / "运行 1" / "train.log").is_file()
    run = "checkpoint=运行 1"
    text = command(
        environment, "generate", run, "prompt=def main(", "max_new_tokens=5", cwd=tmp_path
    )
    assert text.startswith("def main(")
    if find_spec("fastapi") and find_spec("uvicorn"):
        assert "def main(" + served(environment, run, cwd=tmp_path) == text.rstrip("\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "运行 1"]


def served(environment: Path, run: str, *, cwd: Path) -> str:
    """The same five tokens from ``mtp-lightning serve``."""
    with subprocess.Popen(
        [environment / "bin" / "mtp-lightning", "serve", run, "port=0", "num_threads=1"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={k: v for k, v in helpers.environment().items() if k != "PYTHONPATH"},
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[-1]
            fields = {"prompt": "def main(", "max_tokens": 5, "temperature": 0}
            request = urllib.request.Request(
                f"{address}/completions",
                data=json.dumps(fields).encode(),
                headers={"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)["choices"][0]["text"]
        finally:
            process.terminate()


def test_the_installed_commands_run_a_sweep_and_report_it(environment, tmp_path):
    arguments = helpers.overrides(tmp_path / "cache", {"seed": "0,1", "trainer.max_steps": 4})
    output = command(environment, "train", "-m", *arguments, "sweep_dir=sweep", cwd=tmp_path)
    assert "2 jobs done in sweep" in output
    stored = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert stored["command"][:2] == ["mtp-lightning train", "-m"]
    pytest.importorskip("jinja2", reason="the report needs it: pip install -e '.[report]'")
    assert "report.html" in command(environment, "report", "sweep", cwd=tmp_path)


def test_the_ranks_of_a_run_use_the_installed_copy(environment: Path, tmp_path: Path) -> None:
    # A module in the working directory must not be imported.
    (tmp_path / "mtp_lightning.py").write_text("raise SystemExit('the wrong one')")
    settings = {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.max_steps": 2}
    arguments = helpers.overrides(tmp_path / "cache", settings)
    command(environment, "train", *arguments, "run_dir=run", cwd=tmp_path)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2


def test_the_prepared_sweeps_are_installed(environment: Path, tmp_path: Path) -> None:
    shown = command(environment, "train", "+sweeps=depth", "--cfg", "hydra", cwd=tmp_path)
    assert "mtp.depth: 0,1,2,4" in shown
