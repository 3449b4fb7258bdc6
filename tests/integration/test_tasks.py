"""Runs on a task: what they log, how they resume and are evaluated, and what they learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mtp_lightning.experiment.evaluating import validation_data
from mtp_lightning.opening import open_model
from tests.integration import helpers
from tests.integration.conftest import Once
from tests.integration.helpers import TASK, command, composed, evaluated, execute, rows, train_here
from tests.integration.several import run_all


def task(name: str, **of_task: int) -> dict[str, Any]:
    """The changes for another task than copying."""
    changes = {"letters": None, "periods": None, **of_task}
    return {"data": name} | {f"data.task.{key}": value for key, value in changes.items()}


TASKS: dict[str, dict[str, Any]] = {
    "copy": {}, "star_graph": task("star_graph"), "mqar": task("mqar"),
    "packed": {"data.seq_len": 30}, "prompts": {"data.train_prompt": "true"},
    "sibling": task("sibling", parents=2, children=3, hash=2) | {"data.examples": 16},
    "hmm": task("hmm", length=6), "navigation": task("navigation", nodes=12),
}  # fmt: skip
# The window that each task chooses.
WINDOWS = {
    "copy": 8, "prompts": 8, "star_graph": 24, "mqar": 48, "packed": 30, "sibling": 5, "hmm": 6,
    "navigation": 12,
}  # fmt: skip
# Metrics of one task only.
FURTHER = {
    "sibling": {"val/sampled_coherent", "val/sampled_distinct", "val/creativity"},
    "hmm": {"val/belief_r2", "val/surprisal", "val/excess_loss", "val/longer/belief_r2"},
    "navigation": {
        "val/legality", "val/legality_chance", "val/arrival", "val/surprisal", "val/excess_loss",
        "val/shortcut_mass", "val/shortcut_mass_chance", "val/legal_mass", "val/belief_cosine",
        "val/belief_cosine_others",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def copying(once: Once, cache: Path) -> Path:
    """A run on the copy task."""
    return once("copying", lambda folder: train_here(folder, cache, TASK))


@pytest.mark.slow
@pytest.mark.parametrize("case", TASKS)
def test_a_run_logs_its_answers_and_evaluate_agrees(tmp_path: Path, cache: Path, case: str) -> None:
    summary = train_here(tmp_path, cache, TASK | TASKS[case])
    measured = {tag: value for tag, value in summary.items() if tag.startswith("val/")}
    always = "exact_match chance seen trivial accuracy_position_1 forced_accuracy_position_2"
    assert {f"val/{tag}" for tag in [*always.split(), "loss_depth_2"]} <= measured.keys()
    variant = "more" if case == "mqar" else "longer"
    assert (f"val/{variant}/exact_match" in measured) == (case not in ("sibling", "navigation"))
    assert "val/bits_per_byte" not in measured and FURTHER.get(case, set()) <= measured.keys()
    # An answer of one token, or a question of one, leaves nothing to draft.
    assert ("decode/tokens_per_step" in summary) == (case not in ("mqar", "hmm"))
    assert [row["step"] for row in rows(tmp_path) if "val/exact_match" in row] == [5, 10]
    assert summary["evaluation"]["examples"] == 30
    # The run's config stores the window that the data chose.
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["seq_len"]
    assert stored == WINDOWS[case]
    if "val/surprisal" in measured:  # loss and floor are of the same tokens
        above = measured["val/loss_depth_0"] - measured["val/surprisal"]
        assert measured["val/excess_loss"] == pytest.approx(above, abs=1e-5) and above > 0
    again = evaluated(tmp_path / "checkpoints" / "last.ckpt")
    assert {tag: again[tag] for tag in measured} == measured
    assert again["evaluation"] == summary["evaluation"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"data.examples": 14, "data.num_workers": 2},  # three batches an epoch
        {**TASKS["star_graph"], "data.seq_len": 60},
        {**TASKS["navigation"], "objective": "anchor"},
    ],
    ids=["fresh", "fixed", "packed", "navigation"],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.filterwarnings("ignore:.*num_workers")
def test_a_run_on_a_task_resumes_exactly(tmp_path, cache, settings):
    settings = TASK | settings | {"callbacks.checkpoints.every_n_steps": 5}
    train_here(tmp_path / "whole", cache, settings)
    helpers.resume_from_previous(tmp_path / "whole", tmp_path / "again", cache, settings)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, cache: Path) -> None:
    more, half = {"trainer.precision": "64-true", "data.eval_examples": 31}, {"data.batch_size": 2}
    cases = {case: TASK | TASKS[case] | more for case in ("copy", "sibling", "hmm")}
    runs = {case: common | helpers.DDP | half for case, common in cases.items()}
    run_all(tmp_path, cache, runs, processes=2)
    for case, common in cases.items():
        train_here(tmp_path / f"{case}_alone", cache, common)
        helpers.assert_near_rows(tmp_path / case, tmp_path / f"{case}_alone", rel=1e-9)
        alone = rows(tmp_path / f"{case}_alone")
        fewer = common | {"callbacks.exact_match.batch_size": 7}
        few = train_here(tmp_path / f"{case}_few", cache, fewer)
        answers = {tag: v for tag, v in alone[-1].items() if tag.startswith("val/") and tag in few}
        assert FURTHER.get(case, set()) <= answers.keys()
        assert {tag: few[tag] for tag in answers} == pytest.approx(answers, rel=1e-6), case


@pytest.mark.slow
def test_a_run_starts_from_and_is_evaluated_on_another_size(tmp_path, cache, copying):
    longer = {"data.task.periods": 6, "init_from": copying}
    summary = train_here(tmp_path / "longer", cache, TASK | longer)
    assert "val/exact_match" in summary
    metrics = evaluated(copying, "data=copy", "data.task.letters=4", "data.task.periods=9")
    assert metrics["data"]["longest"] == 19 and "val/accuracy_position_9" in metrics
    with pytest.raises(ValueError, match="data=copy with its 18 symbols cannot be read"):
        evaluated(copying, "data=copy")
    with pytest.raises(ValueError, match="eval_bytes=9 has no meaning"):
        evaluated(copying, "eval_bytes=9")
    with pytest.raises(ValueError, match="symbols cannot be read by a model"):
        train_here(tmp_path / "other", cache, TASK | longer | {"data.task.letters": 9})


def test_a_text_model_refuses_a_task(finished: Path) -> None:
    with pytest.raises(ValueError, match="257 ids of the kind byte: take a model that was trained"):
        evaluated(finished, "data=star_graph")


def test_long_range_warns_that_it_needs_text(tmp_path, cache, caplog):
    summary = train_here(tmp_path, cache, TASK | {"callbacks": "long_range"})
    assert caplog.text.count("needs text in bytes") == 1
    assert not any("loss_position" in tag for tag in summary)


@pytest.mark.slow
def test_the_command_line_refuses_a_tokenizer_and_generates_symbols(tmp_path, cache, copying):
    refused = execute(command(tmp_path / "run", cache, TASK | {"tokenizer": "byte"}), code=1)
    assert "error: tokenizer=byte has no meaning for a task" in refused.stderr
    program = command(tmp_path, cache, app="generate.py")[:2]
    arguments = [f"checkpoint={copying}", "max_new_tokens=2", "num_threads=1"]
    done = execute([*program, *arguments, "prompt=s0 s3 ="], code=0)
    assert done.stdout.startswith("s0 s3 = ")
    done = execute([*program, *arguments, "prompt=hello"], code=1)
    assert "error: 'hello' is not a symbol" in done.stderr


def test_teacherless_heads_learn_from_the_question_alone(tmp_path: Path, cache: Path) -> None:
    settings = TASK | helpers.typed(
        "data.task.letters=3 data.task.shortest=2 data.task.periods=2 data.task.held_out=null "
        "data.batch_size=32 mtp=teacherless mtp.depth lambda_schedule=constant optimizer.lr=0.01 "
        "trainer.max_steps=250 trainer.val_check_interval=250"
    )
    summary = train_here(tmp_path, cache, settings)
    assert summary["val/exact_match"] > 0.9 > 4 * summary["val/chance"]


@pytest.mark.parametrize("debug", ["fast", "profile"])
def test_debug_evaluates_few_examples_or_bytes(debug: str) -> None:
    """Only the key that the data read is set."""
    star, short = ["data=star_graph"], [f"debug={debug}"]
    seven = [*star, *short, "data.eval_examples=7"]
    task, text, chosen, plain_task, plain_text = (
        composed("config", words).data for words in ([*star, *short], short, seven, star, [])
    )
    assert task.eval_examples == 64 and "eval_bytes" not in task
    assert text.eval_bytes == 10_000 and "eval_examples" not in text
    assert chosen.eval_examples == 7
    assert plain_task.eval_examples == 512 and plain_text.eval_bytes == 300_000


@pytest.mark.extras  # transformers
def test_an_exported_model_reads_its_task(tmp_path: Path, cache: Path, copying: Path) -> None:
    program = command(tmp_path, cache, app="export.py")[:2]
    folder = tmp_path / "folder"
    last = copying / "checkpoints" / "last.ckpt"
    done = execute([*program, f"checkpoint={last}", f"output={folder}"], code=0)
    assert "verified" in done.stdout
    options = ["data.task.letters=4", "data.task.periods=4", "data.eval_examples=30"]
    metrics = evaluated(folder, "data=copy", *options)
    assert metrics["val/exact_match"] == evaluated(last)["val/exact_match"]


@pytest.mark.long
def test_copying_is_learned(tmp_path: Path, cache: Path) -> None:
    """In about a minute of one thread; answers shuffled among questions are right by chance."""
    from mtp_lightning.decoding.answers import generate_scored
    from mtp_lightning.experiment.training import train

    overrides = (
        "experiment=copy trainer.num_threads=1 trainer.accelerator=cpu logger=csv "
        "callbacks=[default,stop_when_solved] callbacks.stop_when_solved.level=0.955 "
        "callbacks.stop_when_solved.validations=1"
    )
    summary = train(composed("config", [*overrides.split(), f"paths.output_dir={tmp_path}"]))
    assert summary["val/exact_match"] > 0.95 > 0.1 > summary["val/chance"]
    run = open_model(tmp_path)
    questions = validation_data(run).answer_sets[""]
    numbers = np.arange(len(questions))
    answers_BW = generate_scored(run.model, questions.batch(numbers))
    assert float(questions.right(numbers, answers_BW).float().mean()) > 0.95
    # Answers of the same length, shuffled among their questions.
    lengths = np.array([len(example.answer) for example in questions.examples])
    shuffled_BW = answers_BW.clone()
    for length in np.unique(lengths):
        same_length = np.flatnonzero(lengths == length)
        place = slice(length + 1, 2 * length + 1)
        shuffled_BW[same_length, place] = answers_BW[np.roll(same_length, 1), place]
    share = float(questions.right(numbers, shuffled_BW).float().mean())
    assert abs(share - summary["val/chance"]) < 0.02
