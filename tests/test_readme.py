"""The commands of README.md and of the other pages run, or at least compose."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data_modules.tokenizers import IdTokenizer
from mtp_lightning.command_line.quote import literal
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective.balance.base import NoBalance
from mtp_lightning.objective.schedule.base import Progress
from mtp_lightning.objective.schedule.piecewise import Piecewise
from mtp_lightning.objective.step import OptimizerStep
from mtp_lightning.opening import open_model
from tests.integration.helpers import composed, execute, train_here
from tests.models import build, windows

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    "README.md": README,
    "README.zh-CN.md": (ROOT / "README.zh-CN.md").read_text(encoding="utf-8"),
    "docs/recipes.md": (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"),
    **{f"docs/zh/{p.name}": p.read_text(encoding="utf-8") for p in ROOT.glob("docs/zh/*.md")},
}


def commands(page: str) -> list[str]:
    """The commands in blocks of bash, in tables and in sentences."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL))
    blocks = re.sub(r" *\\\n *", " ", blocks)
    lines = [line.split(" #")[0].strip() for line in blocks.splitlines() if line.strip()]
    return [*lines, *re.findall(r"`((?:python|pip) [^`]+)`", page)]


def python_of(page: str) -> list[str]:
    """The blocks of Python."""
    return re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)


COMMANDS = commands(README)
_ALL = [README, *(page.read_text(encoding="utf-8") for page in sorted(ROOT.glob("docs/**/*.md")))]
_TYPED = dict.fromkeys(tuple(shlex.split(c)) for page in _ALL for c in commands(page))
# Words of commands that need the reader's files, or that stand for many commands.
_OTHER = {"--help", "-sc", "...", "--config-dir", "experiment=NAME", "seed=range(N)"}
APPS = {
    app: [
        words[2:]
        for words in _TYPED
        if words[:2] == ("python", f"{app}.py") and not _OTHER & set(words)
    ]
    for app in ("train", "evaluate", "generate", "export", "serve")
}
SHORT = ["debug=fast", "trainer.max_steps=10", "logger=csv"]


def run(folder: Path, app: str, *overrides: str) -> str:
    """The output of an app in another folder than the checkout."""
    return execute([sys.executable, str(ROOT / app), *overrides], folder, code=0).stdout


def test_the_readme_has_the_install_and_test_commands() -> None:
    assert "pip install -e . && python train.py" in COMMANDS
    assert "pip install -e '.[test]' && pytest" in COMMANDS


@pytest.mark.slow
def test_the_main_job_trains_evaluates_and_generates(tmp_path: Path) -> None:
    output = run(tmp_path, "train.py", "run_dir=runs/mine", *SHORT)
    for words in ("bits per byte", "tokens per pass", "tokens per second", "time", "Samples"):
        assert words in output
    folder = tmp_path / "runs" / "mine"
    for file in ("config.yaml", "metrics.csv", "summary.json", "checkpoints/last.ckpt"):
        assert (folder / file).is_file(), file

    run_dir = "checkpoint=runs/mine"
    assert "bits per byte" in run(tmp_path, "evaluate.py", run_dir, "eval_bytes=1000")
    text = run(tmp_path, "generate.py", run_dir, "prompt='def '", "max_new_tokens=5")
    assert text.startswith("def ")


def test_the_pages_python_code_runs_on_a_run(tmp_path, monkeypatch, capsys):
    train_here(tmp_path / "runs" / "mine", tmp_path / "cache", {"data.seq_len": 96})
    monkeypatch.chdir(tmp_path)
    blocks = [block for page in _ALL for block in python_of(page)]
    opened = [block for block in blocks if 'open_model("runs/mine")' in block]
    assert len(opened) == 2  # of docs/recipes.md and docs/decoding.md
    for block in opened:
        capsys.readouterr()
        exec(block, {})
        assert capsys.readouterr().out


def test_the_training_loops_of_the_recipes_lower_the_loss_of_every_depth(capsys) -> None:
    loops = [
        block
        for block in python_of(PAGES["docs/recipes.md"])
        if "for done in range(steps)" in block
    ]
    assert len(loops) == 2
    for block in loops:
        exec(block.replace(", 300\n", ", 20\n"), {})
        lines = [line for line in capsys.readouterr().out.splitlines() if line[0].isdigit()]
        first, last = ([*map(float, re.findall(r"\d\.\d+", line))] for line in lines[0::19][:2])
        assert len(lines) == 20 and len(first) == 3
        assert all(after < before - 1 for before, after in zip(first, last, strict=True))


def test_a_checkpoint_by_the_recipe_is_opened(tiny_trunk, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = build(tiny_trunk, "sequential", depth=2), IdTokenizer(37, eot_id=0)
    (code,) = [
        block for block in python_of(PAGES["docs/recipes.md"]) if "checkpoints.save" in block
    ]
    exec(code, page := {"model": model, "tokenizer": tokenizer, "T": 8, "steps": 3})
    run = open_model("mine.ckpt")
    assert (run.seq_len, run.step, run.tokenizer.state()) == (8, 3, tokenizer.state())
    for name, weight in model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], weight)
    del page["content"]["global_step"]
    torch.save(page["content"], "mine.ckpt")
    with pytest.raises(
        ValueError, match="not a checkpoint of this platform: it has no global_step"
    ):
        open_model("mine.ckpt")


def test_a_step_by_the_recipes_data_parallelism_is_the_same_step(tiny_trunk: TrunkConfig) -> None:
    (code,) = [
        block for block in python_of(PAGES["docs/recipes.md"]) if "DistributedDataParallel" in block
    ]
    exec(code, page := {})  # type: ignore[var-annotated]

    def step(further: Callable[[MTPModel], dict[str, Any]]) -> dict[str, Tensor]:
        model = build(tiny_trunk, "sequential", depth=2).train()
        one = OptimizerStep(model, schedule=Piecewise(2, 0.3), balance=NoBalance(2), accumulate=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        one(windows(4, 8, 2), Progress(0, 1), optimizer, **further(model))
        return model.state_dict()

    expected = step(lambda model: {})
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        found = step(page["in_parallel"])
    finally:
        dist.destroy_process_group()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, msg=name)


@pytest.mark.parametrize(
    ("app", "overrides"),
    [(app, overrides) for app, commands in APPS.items() for overrides in commands],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_every_other_command_composes(app: str, overrides: Sequence[str]) -> None:
    name = "config" if app == "train" else app
    if "-m" in overrides:  # the first job of a sweep
        overrides = [re.sub(r"=([^\[,]*),.*", r"=\1", o) for o in overrides if o != "-m"]
        overrides = [re.sub(r"=range\(.*\)$", "=0", o) for o in overrides]
    overrides = literal([o for o in overrides if not o.startswith("-")])
    composed(name, overrides)


def test_the_readme_has_at_most_150_lines() -> None:
    assert len(README.splitlines()) <= 150


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)


TRANSLATED = {
    "README.zh-CN.md": "README.md",
    "docs/zh/index.md": "docs/index.md",
    **{
        f"docs/zh/{chapter}.md": f"docs/tutorial/{chapter}.md"
        for chapter in ("first_run", "depths", "drafting")
    },
}


@pytest.mark.parametrize("page", TRANSLATED)
def test_both_languages_have_the_same_commands_links_and_numbers(page: str) -> None:
    """Commands and code in the same order; links, pictures and numbers, which a sentence of another
    language may have in another."""
    english, chinese = ((ROOT / p).read_text(encoding="utf-8") for p in (TRANSLATED[page], page))
    assert commands(english) == commands(chinese)
    blocks = [
        re.findall(r"^```.*?^```$", page, re.DOTALL | re.MULTILINE) for page in (english, chinese)
    ]
    assert blocks[0] == blocks[1]
    for what in (
        r"\]\((?!README)([^)]+)\)",
        r'(?:src|srcset)="([^"]+)"',
        r"^(#+) ",
        r"\d[\d.,]*\d|\d",
    ):
        # The tutorial's first page is there in both.
        pages = english, chinese.replace("](docs/zh/index.md)", "](docs/tutorial/index.md)")
        both = [re.findall(what, prose(page), re.MULTILINE) for page in pages]
        if not (page.startswith("docs/") and "]" in what):  # a chapter may lead back to English
            assert sorted(both[0]) == sorted(both[1]), what
    assert set(re.findall(r"[\u4e00-\u9fff]", english)) <= {"中", "文"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_existing_files_and_sections(page: str) -> None:
    """Files, and sections of them."""
    links = r"\]\(([^)\s]+)\)|(?:srcset|src)=\"([^\"]+)\""
    for target in map("".join, re.findall(links, prose(PAGES[page]))):
        path, _, anchor = target.partition("#")
        if path.startswith(("http:", "https:", "reference/", "../reference/")):
            continue  # the last is a page of the site, made when it is built
        file = (ROOT / page).parent / path
        assert file.exists(), path
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, f"{path}#{anchor}"
