"""The commands of the tutorial and of the README's sections run, shortened."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from tests.integration.helpers import ROOT, execute, overrides

FOLDER = ROOT / "docs" / "tutorial"
CHAPTERS = ("first_run", "depths", "drafting", "sweep", "your_head")
PAGES = {name: (FOLDER / f"{name}.md").read_text(encoding="utf-8") for name in CHAPTERS}
COMMANDS = {
    name: [
        shlex.split(line.split(" #")[0])
        for block in re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
        for line in block.splitlines()
    ]
    for name, page in PAGES.items()
}
# The chapter that a chapter continues.
BEFORE = {"drafting": "first_run", "depths": "first_run"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_chapters_are_in_order() -> None:
    links = re.findall(r"^\d\. \[.*\]\((\w+)\.md\)", (FOLDER / "index.md").read_text(), re.M)
    assert tuple(links) == CHAPTERS
    assert all(COMMANDS.values())
    for name, page in PAGES.items():
        assert page.startswith(f"# {CHAPTERS.index(name) + 1}. ")


def short(words: list[str], cache: Path) -> list[str]:
    """A shortened training of the tutorial: its keys, with little data and few steps."""
    typed = [word for word in words if "=" in word]
    keys = {word.split("=")[0] for word in typed}
    groups = {key for key in keys if "." not in key}
    small = [
        override
        for override in overrides(cache, {"logger": "csv"})
        if (key := override.split("=")[0]) not in keys
        and key.split(".")[0] not in groups - {"mtp"}
        and not (key == "mtp" and "mtp" in groups)
        and not (key.startswith("mtp.") and "mtp=none" in typed)
    ]
    steps = [word for word in small if word.startswith("trainer.")]
    typed = [re.sub(r"^seed=0,.*", "seed=0", word) for word in typed]
    typed = [word for word in typed if not word.startswith("trainer.max_steps=")]
    typed += ["trainer.max_steps=10"] if "trainer.max_steps" in keys else []
    return [*small, *typed, *steps]


def type_in(words: list[str], folder: Path, cache: Path) -> str:
    """Execute one command of a page; what it printed."""
    program, *rest = words[1:]
    if program == "-m":
        command = ["-m", *rest]
    elif program == "train.py":
        options = [word for word in rest if "=" not in word]  # -m, --config-dir and its folder
        command = [str(ROOT / program), *options, *short(rest, cache)]
    else:
        smaller = {
            "generate.py": ["max_new_tokens=6", "num_threads=1"],
            "evaluate.py": ["decode.n_prompts=0", "num_threads=1"],
        }
        others = [word for word in rest if not word.startswith(("max_new_tokens=", "decode."))]
        command = [str(ROOT / program), *others, *smaller.get(program, [])]
    env = {"PYTHONPATH": str(folder), "MTP_LIGHTNING_CACHE": str(cache)}
    return execute([sys.executable, *command], folder, code=0, seconds=600, **env).stdout


def write_files(page: str, folder: Path) -> None:
    """The files of a page: each name in backticks above its block."""
    found = re.findall(r"^`([\w/.]+)`\n\n```(?:python|yaml)\n(.*?)^```", page, re.M | re.S)
    for name, content in found:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "first_run" else pytest.mark.long)
        for name in CHAPTERS
    ],
)
def test_a_chapter_runs(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chapters = [*([BEFORE[name]] if name in BEFORE else []), name]
    for chapter in chapters:
        write_files(PAGES[chapter], tmp_path)
        for words in COMMANDS[chapter]:
            if words[0] == "python":
                type_in(words, tmp_path, tmp_path / "cache")
    if name == "first_run":
        assert (tmp_path / "runs" / "mine" / "summary.json").is_file()
    if name == "sweep":
        assert (tmp_path / "runs" / "two" / "report.html").is_file()
    if name == "your_head":
        assert (tmp_path / "runs" / "stretches" / "report.html").is_file()
        last = tmp_path / "runs" / "stretch" / "checkpoints" / "last.ckpt"
        weights = torch.load(last, weights_only=True)["state_dict"]
        assert weights["model.mtp.depths.0.bias"].abs().max() < 0.5, "starts at 0, as it is written"


@pytest.mark.slow
def test_the_head_of_the_readme_trains(tmp_path: Path) -> None:
    section = README.partition("## Your own idea")[2]
    python, yaml = re.findall(r"^`{3}(?:python|yaml)\n(.*?)^`{3}", section, re.M | re.S)
    names = re.findall(r"`mine/([\w/.]+)`", section)
    assert len([*python.splitlines(), *yaml.splitlines()]) <= 25
    for name, content in zip(names[:2], (python, yaml), strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (command,) = re.findall(r"^PYTHONPATH=mine (python .*)$", section, re.M)
    words = [word.removeprefix("mine/") for word in shlex.split(command)]
    assert "bits per byte" in type_in([*words, "run_dir=run"], tmp_path, tmp_path / "cache")


@pytest.mark.slow
def test_the_commands_of_the_readmes_engineer_run(tmp_path: Path) -> None:
    (row,) = re.findall(r"^\| \*\*engineer\*\*.*$", README, re.M)
    commands = [shlex.split(command) for command in re.findall(r"`(python [^`]+)`", row)]
    assert len(commands) == 3
    (tmp_path / "docs").mkdir()
    for name in ("docs/one.md", "README.md"):
        lines = (f"the {i} of {name} is {i * i % 97} of them\n" for i in range(1500))
        (tmp_path / name).write_text("".join(lines))
    # Fewer texts than the command's default.
    commands[1] += ["data.n_prompts=24", "data.new_tokens=40"]
    for words in commands:
        output = type_in(words, tmp_path, tmp_path / "cache")
    assert "exported" in output
    assert (tmp_path / "exported" / "config.json").is_file()
