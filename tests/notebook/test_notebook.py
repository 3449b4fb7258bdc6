"""The functions for notebooks: runs, sweeps and texts as objects."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import mtp_lightning
from data_modules.tokenizers import ByteTokenizer
from mtp_lightning import Run, Sweep, Text, evaluate, generate, sweep, train
from mtp_lightning.decoding import Generation
from mtp_lightning.errors import UserError
from mtp_lightning.notebook import process
from mtp_lightning.notebook.curves import draw_overview
from mtp_lightning.paths import app
from mtp_lightning.system import STARTER
from tests.integration.helpers import QUICK, overrides, train_here, wait_for_step

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides of a quick run, with a cache for this file."""
    return overrides(tmp_path_factory.mktemp("cache"), {})


@pytest.fixture(scope="module")
def run(quick: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(*quick, f"run_dir={tmp_path_factory.mktemp('runs')}/a (b), c", quiet=True)


def test_a_run_equals_that_of_the_command_line(run: Run, tmp_path: Path) -> None:
    assert run.folder.name == "a (b), c"
    reference = train_here(tmp_path / "run", tmp_path / "cache")
    assert run.summary["val/loss_depth_0"] == reference["val/loss_depth_0"]
    metrics = run.metrics
    assert list(metrics.index) == list(range(1, QUICK["trainer.max_steps"] + 1))
    newest = metrics["val/loss_depth_1"].dropna()
    assert list(newest.index) == [5, 10]
    # Logged in single precision.
    assert newest.iloc[-1] == pytest.approx(run.summary["val/loss_depth_1"], rel=1e-6)


def test_a_run_draws_its_curves(run: Run) -> None:
    assert run.plot()._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
    (losses,) = run.plot().axes  # its windows are too short to draft in
    named = [text.get_text() for text in losses.get_legend().get_texts()]
    assert named == ["next token", "depth 1", "depth 2"]
    metrics = run.metrics.assign(**{"decode/acceptance_position_1": 0.5, "val/exact_match": 0.25})
    drafts = draw_overview(metrics.drop(columns="val/exact_match")).axes[1]
    assert drafts.get_ylim() == (0, 1) and "accepted" in drafts.get_ylabel()
    right = draw_overview(metrics).axes[1].get_lines()
    assert [set(line.get_ydata()) for line in right] == [{0.25}]
    (axes,) = run.plot("train/lr").axes
    (line,) = axes.get_lines()
    assert list(line.get_ydata()) == list(run.metrics["train/lr"])
    with pytest.raises(KeyError, match="train/nope is not logged; there are .*train/loss"):
        run.plot("train/nope")


def test_a_run_without_a_validation_has_nothing_to_draw_yet(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    for text in ("step\n", "step,train/loss\n1,5.5\n2,5.4\n"):
        file.write_text(text)
        with pytest.raises(UserError, match="has no validation to draw yet: wait, or"):
            Run(tmp_path).plot()
    assert list(Run(tmp_path).plot("train/loss").axes[0].get_lines()[0].get_ydata()) == [5.5, 5.4]


def test_a_run_evaluates_and_generates(run: Run) -> None:
    numbers = run.evaluate("long_range=false")
    assert numbers["val/loss_depth_0"] == run.summary["val/loss_depth_0"]
    text = run.generate("a [b] = 'c'", max_new_tokens=12, speculative=True, top_k=None)
    assert str(text).startswith("a [b] = 'c'") and text.generation.new_tokens == 12
    again = generate(f"checkpoint={run.folder}", "prompt=a [b] = 'c'", "max_new_tokens=12")
    assert str(again) == str(text)
    assert "".join(piece for piece, _ in text.pieces()) == text.generation.text
    stop = text.generation.text[4:6]
    stopped = run.generate("a [b] = 'c'", max_new_tokens=12, stop=["\n\n", stop])
    assert stopped.generation.text == text.generation.text.partition(stop)[0]
    assert str(run.generate('"a"', max_new_tokens=1)).startswith('"a"')
    with pytest.raises(ValueError, match="There is no prompt"):
        generate(f"checkpoint={run.folder}")
    with pytest.raises(UserError, match=r"output=json is what generate\.py prints: leave it out"):
        run.generate("a", output="json")
    assert "bits per byte" in run._repr_html_() and "a (b), c" in run._repr_html_()


@pytest.mark.parametrize(
    "option", ["top_k=5", "+nope=1", f"prompts={__file__}", "show_drafts=1", "verify=x"]
)
def test_options_are_refused_in_the_sentence_of_generate_py(run: Run, option: str) -> None:
    words = [f"checkpoint={run.folder}", "prompt=a", option]
    with pytest.raises(ValueError) as here:
        generate(*words)
    with pytest.raises(RuntimeError) as there:
        process.start([*app("generate"), *words], quiet=True)
    assert str(here.value) == str(there.value)


def test_drafted_tokens_are_colored_and_markup_is_escaped() -> None:
    """The text ends before the stop string."""
    mask = [False, True, True, False, True, True]
    generation = Generation(list(b"x<b>;;"), "x<b>", "stop", 1.0, 3, [3], [6], mask)
    text = Text("<i>", generation, ByteTokenizer())
    assert list(text.pieces()) == [("x", False), ("<", True), ("b", True), (">", False)]
    page = text._repr_html_()
    assert "&lt;i&gt;</span>x<span" in page and ">&lt;b</span>&gt;</pre>" in page
    assert "1.67 per pass" in page


def test_errors_are_one_sentence(quick: list[str], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^mtp.depth must .* not -1\.$"):
        train(*quick, "mtp.depth=-1", f"run_dir={tmp_path / 'run'}", quiet=True)
    with pytest.raises(RuntimeError, match="nothing does not exist"):
        evaluate(f"checkpoint={tmp_path / 'nothing'}")
    with pytest.raises(ValueError, match="give the path itself"):
        train("run_dir=runs/${now:%H}")
    with pytest.raises(FileNotFoundError, match="has not ended"):
        _ = Run(tmp_path).summary
    assert "not ended" in Run(tmp_path)._repr_html_()
    with pytest.raises(FileNotFoundError, match=r"sweep\.json"):
        _ = Sweep(tmp_path).runs
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mtp_lightning.nothing


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="(?s)Traceback.*ZeroDivisionError"):
        process.start(["-c", "1 / 0"], quiet=True)


def test_a_program_knows_the_notebook_that_it_ends_with(capsys) -> None:
    process.start(["-c", f"import os; print(os.environ['{STARTER}'])"])
    assert capsys.readouterr().out == f"{os.getpid()}\n"


def test_progress_takes_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = "print('begun'); print('step 1/2'); print('step 2/2'); "
    lines += "print('step 2  validation'); print('done')"
    process.start(["-c", lines])
    shown = capsys.readouterr().out
    assert shown == f"begun\n\r{'step 1/2':<100}\r{'step 2/2':<100}\nstep 2  validation\ndone\n"


@pytest.mark.long
def test_an_interrupted_run_saves_and_continues(quick: list[str], tmp_path: Path) -> None:
    """By Ctrl-C, as from the stop button of a notebook; the same call continues the run."""
    folder = tmp_path / "run"
    program = f"""
        from mtp_lightning import train
        train(*{quick!r}, "trainer.max_steps=100000", "run_dir={folder}")
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as notebook:
        wait_for_step(notebook, folder, 20)  # type: ignore[arg-type]
        notebook.send_signal(signal.SIGINT)
        output, _ = notebook.communicate(timeout=480)
    assert "KeyboardInterrupt" in output and "saved" in output
    step = int(Run(folder).metrics.index[-1])
    run = train(*quick, f"trainer.max_steps={step + 2}", f"run_dir={folder}", quiet=True)
    assert run.summary["step"] == step + 2


def test_a_sweep_has_a_table_and_a_report(quick: list[str], tmp_path: Path) -> None:
    other_overrides = [text for text in quick if not text.startswith("mtp.depth=")]
    depths = sweep(*other_overrides, "mtp.depth=0,1", f"sweep_dir={tmp_path / 'sweep'}", quiet=True)
    table = depths.table
    assert list(table["state"]) == ["done", "done"] and list(table["mtp.depth"]) == [0, 1]
    assert [run.folder.name for run in depths.runs] == list(table.index)
    assert table["val/loss_depth_0"].notna().all()
    assert depths.report().is_file() and "mtp.depth" in depths._repr_html_()
