"""docs/extending.md: every recipe works as it stands, from a folder outside this repository.

The page types ``mtp-lightning APP``; the tests call the function that this command calls.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mtp_lightning.objective.schedule.base import Progress
from sweeps.claims.read import read_claim
from tests.integration.conftest import Once
from tests.integration.helpers import ROOT, execute, overrides, rows
from tests.warm import Done

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
FILES = dict(re.findall(r"^`([\w/.]+)`\n\n```(?:python|yaml)\n(.*?)^```", PAGE, re.M | re.DOTALL))
RECIPES = {
    name: re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S) for name, text in SECTIONS.items()
}
CLAIM = "A claim"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def user_folder(once: Once) -> Path:
    """A user's folder with all files of the page."""

    def write(folder: Path) -> None:
        for name, content in FILES.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)

    return once("user-folder", write)


def quick(words: list[str], cache: Path) -> list[str]:
    """A command of the page, such as ``train --config-dir my_conf ..``, with the quick run's
    settings where it sets none."""
    app, *arguments = words
    start = [sys.executable, "-c", "from mtp_lightning.console import main; main()", app]
    if app != "train":
        return [*start, *arguments, "num_threads=1"]
    options = [word for word in arguments if "=" not in word]
    chosen = [word for word in arguments if "=" in word]
    groups = {word.split("=")[0].split("/")[0] for word in chosen}
    if "data" in groups:  # tasks have their own symbols
        groups.add("tokenizer")
    short = [
        override
        for override in overrides(cache, {"logger": None})
        if override.split("=")[0].split(".")[0] not in groups - {"mtp.depth"}
    ]
    if (config_dir := "--config-dir") in options:
        at = arguments.index(config_dir)
        pair = arguments[at : at + 2]
        options = [*pair, *(option for option in options if option not in pair)]
    return [*start, *options, *short, *chosen]


def run(command: list[str], folder: Path, cache: Path | None = None, *, code: int = 0) -> Done:
    environment = {} if cache is None else {"MTP_LIGHTNING_CACHE": str(cache)}
    return execute(command, folder, code=code, seconds=600, PYTHONPATH=str(folder), **environment)


def test_the_page_has_a_short_recipe_for_every_extension_point() -> None:
    extension_points = (
        "a head", "loss of its own", "objective", "balance", "lambda", "text source", "task",
        "optimizer", "callback", "logger", "attention", "op on another device", "claim",
    )  # fmt: skip
    names = " ".join(RECIPES).lower()
    assert [point for point in extension_points if point not in names] == []
    assert all(RECIPES.values())
    for name, content in FILES.items():
        assert len(content.splitlines()) <= 60, f"{name} is too long for a recipe"


@pytest.mark.parametrize("name", [name for name in RECIPES if name != CLAIM])
def test_a_recipe_runs_and_its_run_resumes(name: str, user_folder: Path, cache: Path) -> None:
    resumes = any(word in name.lower() for word in ("a head", "balance", "optimizer", "callback"))
    for block in RECIPES[name]:
        for line in block.strip().splitlines():
            assert line.startswith("mtp-lightning ")
            command = quick(shlex.split(line)[1:], cache)
            run(command, user_folder)
            if resumes and any(word.startswith("run_dir=") for word in command):
                done = run([*command, "trainer.max_steps=12"], user_folder)
                assert "from step 10" in done.stdout + done.stderr, "the run continues"
                # Only the model's own classes need it, to generate.
                assert ("'allow=[my_ideas]'" in done.stdout) == ("A head" in name)


def test_the_claim_is_read_run_and_judged(user_folder: Path, tmp_path: Path, cache: Path) -> None:
    """The page's claim as it stands is read; with fewer and smaller steps it is run and judged."""
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    claim = read_claim("one_gate", user_folder / "my_claims")
    assert list(claim.arms) == ["plain", "gated"] and len(claim.predictions) == 1

    content = yaml.safe_load(FILES["my_claims/one_gate.yaml"])
    content |= {"seeds": [0, 1], "minimum": 2}
    content["shared"] += [
        "data=synthetic", "data.source.size=60000", "data.seq_len=32", "data.eval_bytes=1000",
        "trainer.max_steps=4", "trainer.num_threads=1", "callbacks.throughput.measure_matmul=false",
        "~callbacks.speculative_eval",
    ]  # fmt: skip
    shutil.copytree(user_folder, tmp_path, dirs_exist_ok=True, ignore=lambda *_: ["runs"])
    file = tmp_path / "my_claims" / "one_gate.yaml"
    file.write_text(yaml.safe_dump(content))
    (commit,) = re.findall(r"^```\n(git .*?)^```", SECTIONS[CLAIM], re.M | re.S)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for line in commit.split("&&"):
        arguments = [*git, *shlex.split(line)[1:]]
        subprocess.run(arguments, cwd=tmp_path, check=True, capture_output=True)
    for line in "".join(RECIPES[CLAIM]).strip().splitlines():
        done = run([sys.executable, *shlex.split(line)[1:]], tmp_path, cache)
    assert "one_gate: " in done.stdout and "gated head − no MTP" in done.stdout
    result = json.loads((tmp_path / "results" / "one_gate.json").read_text())
    assert result["predicted_in"] and not result["unfinished"]
    done = run([sys.executable, *shlex.split(result["command"])[1:]], tmp_path, cache)
    assert "every run is done" in done.stdout


def test_a_head_that_reads_the_future_is_refused(
    user_folder: Path, tmp_path: Path, cache: Path
) -> None:
    shutil.copytree(user_folder / "my_ideas", tmp_path / "my_ideas")
    shutil.copytree(user_folder / "my_conf", tmp_path / "my_conf")
    file, step = tmp_path / "my_ideas" / "heads.py", "(1 - gate) * embedded_BTC"
    assert step in file.read_text()
    file.write_text(file.read_text().replace(step, f"{step}.roll(-1, dims=1)"))
    words = ["train", "--config-dir", "my_conf", "mtp=gated", "run_dir=leaks"]
    refused = run(quick(words, cache), tmp_path, code=1)
    assert "error: depth 1 of mtp=gated at position" in refused.stderr


def test_the_pages_schedule_and_rule_serve_a_control_without_depths() -> None:
    names: dict = {}
    for file in ("my_ideas/schedules.py", "my_ideas/balancing.py"):
        exec(FILES[file], names)
    start = Progress(step=0, max_steps=4)
    for depth, lambdas in ((0, []), (2, [0.15, 0.15])):
        assert names["Breathing"](depth, 0.3, 1).lambdas(start) == lambdas
        assert names["InverseLoss"](depth).factors([1.0, *lambdas], start) == [1.0, *lambdas]


def test_a_sweep_combines_the_extensions(user_folder: Path, cache: Path) -> None:
    words = "train --config-dir my_conf -m objective=ce,focal mtp=gated balance=inverse_loss "
    words += "optimizer=slow_trunk lambda_schedule=breathing data=sums tokenizer=byte"
    folder = user_folder / f"sweep-{os.getpid()}"
    done = run(quick([*words.split(), f"sweep_dir={folder}"], cache), user_folder)
    assert "2 jobs done" in done.stdout
    assert len(list(folder.glob("*/summary.json"))) == 2


def first_run(name: str, once: Once, user_folder: Path, cache: Path) -> Path:
    """The run of a recipe's first command, made once."""
    line = RECIPES[name][0].strip().splitlines()[0]
    words = [w for w in shlex.split(line)[1:] if not w.startswith("run_dir=")]

    def make(folder: Path) -> None:
        run([*quick(words, cache), f"run_dir={folder}"], user_folder)

    return once("recipe-" + re.sub(r"\W+", "-", name), make)


def test_apps_refuse_a_head_of_a_package_that_is_not_allowed(once, user_folder, cache):
    folder = first_run("A head", once, user_folder, cache)
    arguments = {"evaluate": [], "generate": ["prompt=a"], "export": [f"output={folder}/out"]}
    commands = {
        app: [sys.executable, str(ROOT / f"{app}.py"), f"checkpoint={folder}", *more]
        for app, more in arguments.items()
    }
    for app, command in commands.items():
        error = run(command, user_folder, code=1).stderr
        assert "mtp=gated is code of the package my_ideas" in error, app
        assert "'allow=[my_ideas]'" in error, app
    run([*commands["export"], "allow=[my_ideas]", "verify=false"], user_folder)
    doctor = [sys.executable, str(ROOT / "doctor.py"), f"{folder}/out", "--new-tokens=8"]
    assert "doctor: --allow my_ideas" in run(doctor, user_folder, code=1).stderr
    assert (
        "(mtp=gated)" in execute([*doctor, "--allow=my_ideas"], PYTHONPATH=str(user_folder)).stdout
    )
    check = [sys.executable, "-m", "mtp_lightning.interop.check", f"{folder}/out", "--allow"]
    assert "my_ideas" in run([*check, "other"], user_folder, code=1).stderr
    if importlib.util.find_spec("transformers"):
        assert "all equal" in run([*check, "my_ideas"], user_folder).stdout
    # In a folder without the package:
    missing = run([*commands["generate"], "allow=[my_ideas]"], folder, code=1)
    assert "my_ideas" in missing.stderr


def test_the_pages_head_drafts_losslessly(once: Once, user_folder: Path, cache: Path) -> None:
    folder = first_run("A head", once, user_folder, cache)
    generations = []
    command = [sys.executable, str(ROOT / "generate.py"), f"checkpoint={folder}", "prompt=ga"]
    command += ["allow=[my_ideas]", "output=json", "num_threads=1"]
    for speculative in ("true", "false"):
        done = run([*command, f"speculative={speculative}"], user_folder)
        generations.append(json.loads(done.stdout))
    assert generations[0]["text"] == generations[1]["text"]
    assert generations[0]["verify_passes"] <= generations[1]["verify_passes"]


def test_an_op_replaces_the_plain_one_on_its_device_alone(user_folder: Path) -> None:
    program = (
        "import torch; from mtp_lightning.nn import ops; from my_ideas.norms import ExactNorms;"
        "from mtp_lightning.nn.norm import RMSNorm; ExactNorms('cpu');"
        "norm = RMSNorm(3, 0.0); x = torch.tensor([[3e-30, 0.0, 0.0]]);"
        "found = norm(x); assert abs(float(found[0, 0]) - 3**0.5) < 1e-6, found;"
        "assert not torch.allclose(ops.rms_norm.plain(x, norm.weight, 0.0), found);"
        "norm.to('meta')(x.to('meta'))"
    )
    run([sys.executable, "-c", program], user_folder)


def test_the_recipes_runs_log_their_values(once: Once, user_folder: Path, cache: Path) -> None:
    drift = first_run("A callback", once, user_folder, cache)
    assert any("drift/embedding" in row for row in rows(drift))
    logged = first_run("A logger", once, user_folder, cache)
    lines = [json.loads(line) for line in (logged / "metrics.jsonl").read_text().splitlines()]
    assert any("train/loss" in line for line in lines) and any("params" in line for line in lines)
    varied = first_run("A head with a loss of its own", once, user_folder, cache)
    losses = [row["val/loss_depth_1"] for row in rows(varied) if "val/loss_depth_1" in row]
    assert losses and losses[-1] < 1, "a rate of 1 everywhere would give 1"
    balanced = first_run("A balance rule", once, user_folder, cache)
    assert all("balance/mean_loss_depth_1" in row for row in rows(balanced) if "train/loss" in row)
