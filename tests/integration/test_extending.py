"""docs/extending.md: every recipe works as it stands, from a folder outside this repository.

The page types ``mtp-lightning APP``; the tests call the function that this command calls.
"""

from __future__ import annotations

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
def mine(once: Once) -> Path:
    """A user's folder with all files of the page."""

    def write(folder: Path) -> None:
        for name, content in FILES.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)

    return once("mine", write)


def quick(words: list[str], cache: Path) -> list[str]:
    """An app's command on the page, ``train --config-dir my_conf ..``, made short where it says
    nothing itself."""
    app, *given = words
    start = [sys.executable, "-c", "from mtp_lightning.console import main; main()", app]
    if app != "train":
        return [*start, *given, "num_threads=1"]
    options = [word for word in given if "=" not in word]
    chosen = [word for word in given if "=" in word]
    groups = {word.split("=")[0].split("/")[0] for word in chosen}
    if "data" in groups:  # a text says how it is read, and a task has symbols of its own
        groups.add("tokenizer")
    short = [
        override
        for override in overrides(cache, {"logger": None})
        if override.split("=")[0].split(".")[0] not in groups - {"mtp.depth"}
    ]
    if (config_dir := "--config-dir") in options:
        at = given.index(config_dir)
        options = [config_dir, given[at + 1], *(o for o in options if o not in given[at : at + 2])]
    return [*start, *options, *short, *chosen]


def run(command: list[str], folder: Path, cache: Path | None = None, *, code: int = 0) -> Done:
    kept = {} if cache is None else {"MTP_LIGHTNING_CACHE": str(cache)}
    return execute(command, folder, code=code, seconds=600, PYTHONPATH=str(folder), **kept)


def test_the_page_has_a_recipe_for_everything() -> None:
    wanted = (
        "a head", "loss of its own", "objective", "balance", "lambda", "text source", "task",
        "optimizer", "callback", "logger", "attention", "op on another device", "claim",
    )  # fmt: skip
    assert [w for w in wanted if not any(w in name.lower() for name in RECIPES)] == []
    assert all(RECIPES.values())
    for name, content in FILES.items():
        assert len(content.splitlines()) <= 60, f"{name} is too long for a recipe"


@pytest.mark.parametrize("name", [name for name in RECIPES if name != CLAIM])
def test_a_recipe(name: str, mine: Path, cache: Path) -> None:
    goes_on = any(word in name.lower() for word in ("a head", "balance", "optimizer", "callback"))
    for block in RECIPES[name]:
        for line in block.strip().splitlines():
            assert line.startswith("mtp-lightning ")
            command = quick(shlex.split(line)[1:], cache)
            run(command, mine)
            if goes_on and any(word.startswith("run_dir=") for word in command):
                done = run([*command, "trainer.max_steps=12"], mine)
                assert "from step 10" in done.stdout + done.stderr, "the run continues"


def test_a_claim(mine: Path, tmp_path: Path, cache: Path) -> None:
    """The page's claim as it stands is read; with fewer and smaller steps it is run and judged."""
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    claim = read_claim("one_gate", mine / "my_claims")
    assert list(claim.arms) == ["plain", "gated"] and len(claim.predictions) == 1

    content = yaml.safe_load(FILES["my_claims/one_gate.yaml"])
    content |= {"seeds": [0, 1], "minimum": 2}
    content["shared"] += [
        "data=synthetic", "data.source.size=60000", "data.seq_len=32", "data.eval_bytes=1000",
        "trainer.max_steps=4", "trainer.num_threads=1", "callbacks.throughput.measure_matmul=false",
        "~callbacks.speculative_eval",
    ]  # fmt: skip
    shutil.copytree(mine, tmp_path, dirs_exist_ok=True, ignore=lambda *_: ["runs"])
    file = tmp_path / "my_claims" / "one_gate.yaml"
    file.write_text(yaml.safe_dump(content))
    (commit,) = re.findall(r"^```\n(git .*?)^```", SECTIONS[CLAIM], re.M | re.S)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for line in commit.split("&&"):
        said = [*git, *shlex.split(line)[1:]]
        subprocess.run(said, cwd=tmp_path, check=True, capture_output=True)
    for line in "".join(RECIPES[CLAIM]).strip().splitlines():
        done = run([sys.executable, *shlex.split(line)[1:]], tmp_path, cache)
    assert "one_gate: " in done.stdout and "gated head − no MTP" in done.stdout
    result = json.loads((tmp_path / "results" / "one_gate.json").read_text())
    assert result["predicted_in"] and not result["unfinished"]
    done = run([sys.executable, *shlex.split(result["command"])[1:]], tmp_path, cache)
    assert "every run is done" in done.stdout


def test_ideas_meet_in_a_sweep(mine: Path, cache: Path) -> None:
    words = "train --config-dir my_conf -m objective=ce,focal mtp=gated balance=inverse_loss "
    words += "optimizer=slow_trunk lambda_schedule=breathing data=sums tokenizer=byte"
    folder = mine / f"sweep-{os.getpid()}"
    done = run(quick([*words.split(), f"sweep_dir={folder}"], cache), mine)
    assert "all 2 jobs done" in done.stdout
    assert len(list(folder.glob("*/summary.json"))) == 2


def trained(name: str, once: Once, mine: Path, cache: Path) -> Path:
    """The run of a recipe's first command, made once."""
    line = RECIPES[name][0].strip().splitlines()[0]
    words = [w for w in shlex.split(line)[1:] if not w.startswith("run_dir=")]

    def make(folder: Path) -> None:
        run([*quick(words, cache), f"run_dir={folder}"], mine)

    return once("recipe-" + re.sub(r"\W+", "-", name), make)


def test_a_head_is_refused_by_name_where_nobody_allows_it(once, mine, cache):
    folder = trained("A head", once, mine, cache)
    asked = {"evaluate": [], "generate": ["prompt=a"], "export": [f"output={folder}/out"]}
    commands = {
        app: [sys.executable, str(ROOT / f"{app}.py"), f"checkpoint={folder}", *more]
        for app, more in asked.items()
    }
    for app, command in commands.items():
        error = run(command, mine, code=1).stderr
        assert "mtp=gated is code of the package my_ideas" in error, app
        assert "allow=[my_ideas]" in error, app
    # Where the package is not.
    elsewhere = run([*commands["generate"], "allow=[my_ideas]"], folder, code=1)
    assert "my_ideas" in elsewhere.stderr


def test_a_head_drafts_losslessly(once: Once, mine: Path, cache: Path) -> None:
    folder = trained("A head", once, mine, cache)
    texts = []
    command = [sys.executable, str(ROOT / "generate.py"), f"checkpoint={folder}", "prompt=ga"]
    command += ["allow=[my_ideas]", "output=json", "num_threads=1"]
    for speculative in ("true", "false"):
        done = run([*command, f"speculative={speculative}"], mine)
        texts.append(json.loads(done.stdout))
    assert texts[0]["text"] == texts[1]["text"]
    assert texts[0]["verify_passes"] <= texts[1]["verify_passes"]


def test_an_op_stands_in_on_its_device_alone(mine: Path) -> None:
    program = (
        "import torch; from mtp_lightning.nn import ops; from my_ideas.norms import ExactNorms;"
        "from mtp_lightning.nn.norm import RMSNorm; ExactNorms('cpu');"
        "norm = RMSNorm(3, 0.0); x = torch.tensor([[3e-30, 0.0, 0.0]]);"
        "found = norm(x); assert abs(float(found[0, 0]) - 3**0.5) < 1e-6, found;"
        "assert not torch.allclose(ops.rms_norm.plain(x, norm.weight, 0.0), found);"
        "norm.to('meta')(x.to('meta'))"
    )
    run([sys.executable, "-c", program], mine)


def test_what_the_recipes_leave(once: Once, mine: Path, cache: Path) -> None:
    drift = trained("A callback", once, mine, cache)
    assert any("drift/embedding" in row for row in rows(drift))
    logged = trained("A logger", once, mine, cache)
    lines = [json.loads(line) for line in (logged / "metrics.jsonl").read_text().splitlines()]
    assert any("train/loss" in line for line in lines) and any("params" in line for line in lines)
    varied = trained("A head with a loss of its own", once, mine, cache)
    losses = [row["val/loss_depth_1"] for row in rows(varied) if "val/loss_depth_1" in row]
    assert losses and losses[-1] < 1, "less than a rate of 1 everywhere would give"
    balanced = trained("A balance rule", once, mine, cache)
    assert all("balance/mean_loss_depth_1" in row for row in rows(balanced) if "train/loss" in row)
