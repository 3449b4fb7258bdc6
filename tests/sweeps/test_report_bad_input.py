"""Half-written, broken and different runs give a message or a gap in a report, no wrong mean."""

from __future__ import annotations

import json
import math
import os
import time
from html import unescape
from pathlib import Path

import pytest

from mtp_lightning.run.lock import Lock
from sweeps.lease import Leases
from sweeps.report.compare import compare
from sweeps.report.metrics import BITS, LOSS
from sweeps.report.read import RunRecord, read_run, read_sweep
from sweeps.status import main as status_of
from tests.sweeps.fixture_runs import (
    NO_MTP,
    VERSIONS,
    depth_sweep,
    trained_on,
    write_plan,
    write_run,
)
from tests.sweeps.reported import answer_of, notes_of, page_of, run_counts, settings_of


def run_states(folder: Path) -> dict[str, tuple[str, str]]:
    return {run.folder.name: (run.state, run.reason) for run in read_sweep(folder).runs}


def silent_jobs(folder: Path) -> None:
    """A sweep of two running jobs, a and b, that have written nothing for 15 minutes."""
    write_plan(folder, {"a": ["seed=0"], "b": ["seed=1"]})
    for name in "ab":
        run = write_run(folder / name, status={"state": "running"}, done=False)
        for file in run.iterdir():
            os.utime(file, (time.time() - 900,) * 2)


def test_folders_without_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no folder .*/nowhere"):
        read_sweep(tmp_path / "nowhere")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("nothing")
    with pytest.raises(FileNotFoundError, match="holds no runs: give the folder of a sweep"):
        read_sweep(tmp_path)
    write_plan(tmp_path / "sweep_a", {"x": ["seed=0"]})
    with pytest.raises(FileNotFoundError, match="holds sweeps, not runs.*sweep_a"):
        read_sweep(tmp_path)
    write_run(tmp_path / "run", done=False)
    assert read_sweep(tmp_path).notes == ["Sweeps in subfolders are left out: sweep_a."]
    text = answer_of(tmp_path)
    assert "1 run: 1 unfinished" in text and "No setting has a finished run" in text


def test_half_written_runs_are_unfinished_for_a_reason(tmp_path: Path) -> None:
    damages = {
        "torn": ("summary.json", '{"val/loss_depth_0": 2.', "summary.json is damaged"),
        "list": ("summary.json", "[1, 2]", "summary.json is damaged"),
        "lost": ("config.yaml", None, "config.yaml is missing or damaged"),
        "yaml": ("config.yaml", "a: [1, 2", "config.yaml is missing or damaged"),
        "late": ("summary.json", None, "summary.json is missing"),
    }
    for name, (file, content, _) in damages.items():
        damaged = write_run(tmp_path / name) / file
        damaged.unlink() if content is None else damaged.write_text(content)
    write_run(tmp_path / "more", {"trainer.max_steps": 40}, summary={"step": 20})
    reasons = {name: reason for name, (*_, reason) in damages.items()}
    reasons["more"] = "of step 20, its config asks for 40"
    for name, (state, reason) in run_states(tmp_path).items():
        assert state == "unfinished" and reasons.pop(name) in reason
    assert reasons == {}
    cut_file = tmp_path / "late" / "metrics.csv"
    cut_file.write_text("step,val/loss_depth_0\n10,3.0\n20,2.5\n30,2.")
    assert [row["step"] for row in read_run(tmp_path / "late").rows] == [10.0, 20.0]


def test_subfolders_of_a_run_are_not_runs(tmp_path: Path) -> None:
    """Hydra's own folder has a config.yaml, too."""
    run = write_run(tmp_path / "run")
    (run / ".hydra").mkdir()
    (run / ".hydra" / "config.yaml").write_text("seed: 1")
    assert [(r.folder, r.state) for r in read_sweep(run).runs] == [(run, "done")]
    assert [r.folder for r in read_sweep(tmp_path).runs] == [run]


def test_a_run_that_continued_with_other_settings_is_noted(tmp_path: Path) -> None:
    """Its config says what it ended with, so that it counts as a run of that setting."""
    file = depth_sweep(tmp_path, {0: (2.0, 2.1)})[0, 1] / "summary.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"changed": ["at step 50: mtp_lambda: 0.3 -> 1.0"]}))
    note = "it continued with other settings at step 50: mtp_lambda: 0.3 -> 1.0."
    assert note in notes_of(tmp_path)
    for damaged in ([1, {}], 5):
        file.write_text(json.dumps(content | {"changed": damaged}))
        assert "it continued with other settings" in notes_of(tmp_path)


@pytest.mark.parametrize("value", [{LOSS: v} for v in (math.nan, math.inf, "1.1", None)] + [{}])
def test_a_missing_number_is_a_gap_and_leaves_no_mean(tmp_path, value):
    """Runs write null, since JSON has no NaN; older runs have NaN."""
    runs = depth_sweep(tmp_path, {0: (2.0, 2.1, 2.2), 1: (1.0, 1.1, 1.2)})
    file = runs[1, 1] / "summary.json"
    content = json.loads(file.read_text())
    del content[LOSS]
    file.write_text(json.dumps(content | value))
    settings, notes = settings_of(tmp_path), notes_of(tmp_path)
    zero, one = settings.all
    assert zero.estimate(LOSS).interval is not None
    estimate = one.estimate(LOSS)
    assert estimate.interval is None and estimate.gap == "not a number in 1 of 3"
    assert one.estimate(BITS).interval is not None  # all three runs have this metric
    note = "There is no mean of val/loss_depth_0, not a number in 1 of 3 runs, with D = 1."
    assert note in notes
    (difference,) = compare(settings)
    assert difference.verdict == "no test: a mean is missing"
    assert difference.result is None and difference.adjusted is None


def test_failed_and_missing_jobs_are_named_and_not_averaged(tmp_path: Path) -> None:
    jobs = {f"seed-{i}": [f"mtp.depth={d}", f"seed={i}"] for i, d in enumerate([1, 1, 1, 1, 1, 2])}
    write_plan(tmp_path, jobs)
    write_run(tmp_path / "seed-0", {"seed": 0}, status={"state": "done"})
    failed = {"state": "failed", "reason": "the loss is not finite at step 10", "exit_code": 1}
    # A summary of an earlier, finished attempt does not count.
    write_run(tmp_path / "seed-1", {"seed": 1}, loss=100.0, status=failed)
    write_run(tmp_path / "seed-2", {"seed": 2}, status={"state": "running"}, done=False)
    write_run(tmp_path / "seed-3", {"seed": 3}, status={"state": "done"}, done=False)
    pending = tmp_path / "seed-4"
    pending.mkdir()
    (pending / "status.json").write_text('{"version": 1, "state": "pending"}')
    states = run_states(tmp_path)
    assert states["seed-1"] == ("failed", "the loss is not finite at step 10")
    assert states["seed-2"] == ("running", "")
    state, reason = states["seed-3"]
    assert state == "unfinished" and "though its job ended well" in reason
    assert states["seed-4"][0] == "pending" and states["seed-5"][0] == "missing"
    settings, notes = settings_of(tmp_path), notes_of(tmp_path)
    (setting,) = settings.all
    assert setting.estimate(LOSS).values == {0: 2.0}
    assert len(setting.runs) == 4, "the two jobs without a config count for no setting yet"
    assert "Means are of 1 of" in notes


def test_planned_jobs_without_a_config_count_for_their_setting(tmp_path: Path) -> None:
    depth_sweep(tmp_path, {0: (2.0, 2.1), 2: (1.9,)})
    jobs = {f"depth-{d}_seed-{s}": [f"mtp.depth={d}", f"seed={s}"] for d in (0, 2) for s in (0, 1)}
    write_plan(tmp_path, jobs)
    settings, notes = settings_of(tmp_path), notes_of(tmp_path)
    assert run_counts(settings) == [("mtp.depth=0", 2, 2), ("mtp.depth=2", 1, 2)]
    note = (
        "Means are of 1 of 2 runs, and too good if the others failed because of their seed, with "
    )
    assert f"{note}D = 2." in notes
    assert "Add seeds: with two, an interval reaches 6 times the distance" in notes
    assert "Settings with two seeds: D = 0." in notes
    depth_sweep(tmp_path / "all", {0: (2.0, 2.1), 2: (1.9, 2.2)})
    assert "All settings have two seeds." in notes_of(tmp_path / "all")
    assert "Holm's correction for all tests of this table." in unescape(page_of(tmp_path / "all"))


def test_planned_jobs_with_the_default_of_a_key_count_for_its_setting(tmp_path: Path) -> None:
    cells = [(o, s) for o in ("ce", "lk") for s in (0, 1)]
    jobs = {f"{o}_{s}": [f"seed={s}"] + [f"objective={o}"] * (o == "lk") for o, s in cells}
    write_plan(tmp_path, jobs)
    for o in ("ce", "lk"):
        write_run(tmp_path / f"{o}_0", {"objective": o})
    assert run_counts(settings_of(tmp_path)) == [("objective=ce", 1, 2), ("objective=lk", 1, 2)]


def test_of_many_pending_jobs_ten_are_listed(tmp_path: Path) -> None:
    depth_sweep(tmp_path, {0: (2.0, 2.1)})
    jobs = {f"depth-0_seed-{seed}": ["mtp.depth=0", f"seed={seed}"] for seed in range(20)}
    write_plan(tmp_path, jobs)
    for seed in range(2, 20):
        folder = tmp_path / f"depth-0_seed-{seed}"
        folder.mkdir()
        (folder / "status.json").write_text('{"version": 1, "state": "pending"}')
    listed = [f"depth-0_seed-{seed}" in page_of(tmp_path) for seed in range(2, 20)]
    assert listed == [True] * 10 + [False] * 8


def test_planned_jobs_count_for_plain_training_once_per_seed(tmp_path: Path) -> None:
    """Plain training has no lambda, so jobs at two of them are one run of a seed."""
    cells = [(d, x, s) for d in (0, 1) for x in (0.1, 0.3) for s in (0, 1)]
    names = {cell: "depth-{}_lambda-{}_seed-{}".format(*cell) for cell in cells}
    jobs = {names[d, x, s]: [f"mtp.depth={d}", f"mtp_lambda={x}", f"seed={s}"] for d, x, s in cells}
    write_plan(tmp_path, jobs)
    for d, x, s in cells:
        if (d, s) != (0, 1):
            config = {"mtp.depth": d, "mtp_lambda": x, "seed": s}
            write_run(tmp_path / names[d, x, s], config, loss=2.0)
    found = run_counts(settings_of(tmp_path))
    assert [counts for _, *counts in found] == [[1, 2], [2, 2], [2, 2]]


def test_a_diverged_seed_is_why_no_difference_is_tested(tmp_path: Path) -> None:
    depth_sweep(tmp_path, {0: (2.0, math.nan, 2.2), 1: (1.9, 2.0, 2.1)})
    assert "No difference can be tested: a mean is missing" in answer_of(tmp_path)


def test_booleans_of_the_plan_and_of_configs_are_one_setting(tmp_path: Path) -> None:
    jobs = {}
    for shared in ("true", "false"):
        for seed in (0, 1):
            name = f"{shared}_{seed}"
            # Hydra writes True and False into the overrides of jobs.
            jobs[name] = [f"mtp.share_layers={shared.title()}", f"seed={seed}"]
            if seed == 0:
                write_run(tmp_path / name, {"mtp.share_layers": shared == "true"})
    write_plan(tmp_path, jobs)
    settings = settings_of(tmp_path)
    assert [(s.label, s.name, s.planned) for s in settings.all] == [
        ("mtp.share_layers=false", "shared: false", 2),
        ("mtp.share_layers=true", "one for all depths", 2),
    ]


def test_a_running_job_whose_process_is_gone_is_interrupted(tmp_path, capsys):
    silent_jobs(tmp_path)
    lives, killed = (Lock(tmp_path / name / ".lock") for name in "ab")
    assert lives.acquire() and killed.acquire()
    killed.release()  # as the system does for a process that it kills
    silent = "nothing written for 15 minutes: is it alive?"
    gone = ("interrupted", "its process is gone")
    assert run_states(tmp_path) == {"a": ("running", silent), "b": gone}
    with pytest.raises(SystemExit):
        status_of([str(tmp_path)])
    assert "2 jobs: 1 running, 1 lost" in capsys.readouterr().out
    (tmp_path / "b" / "job.log").write_text("alive on a machine whose locks are not visible here")
    assert run_states(tmp_path)["b"] == ("running", "")
    lives.release()


def test_a_job_whose_worker_has_a_lease_is_running(tmp_path: Path) -> None:
    silent_jobs(tmp_path)
    worker = Leases(tmp_path, owner="elsewhere-1")
    assert worker.take("a", None) and worker.take("b", None)
    worker.release("b")
    assert [state for state, _ in run_states(tmp_path).values()] == ["running", "interrupted"]


def test_a_damaged_plan_and_a_damaged_status_are_noted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", status={"state": "done"})
    (tmp_path / "sweep.json").write_text("{")
    (folder / "status.json").write_text("")
    settings, notes = settings_of(tmp_path), notes_of(tmp_path)
    assert len(settings.all) == 1 and "sweep.json is damaged" in notes
    assert "a: status.json is damaged." in notes


def test_a_data_seed_other_than_the_seed_is_a_setting(tmp_path: Path) -> None:
    """Two runs of seed=1, one of them with data.seed=0."""
    write_run(tmp_path / "a", {"seed": 1})
    file = write_run(tmp_path / "b", {"seed": 1}) / "config.yaml"
    file.write_text(file.read_text().replace("  seed: 1", "  seed: 0"))
    assert [s.label for s in settings_of(tmp_path).all] == ["data.seed=0", "data.seed=1"]


# Configs of runs, and the number of runs by setting.
GROUPED = {
    "runs that differ in more than the seed": (
        [{"seed": 0}, {"seed": 1, "model.d_model": 256}, {"seed": 2, "data.split_seed": 7}],
        {
            "model.d_model=128, data.split_seed=0": 1,
            "model.d_model=128, data.split_seed=7": 1,
            "model.d_model=256, data.split_seed=0": 1,
        },
    ),
    "folders": (
        [{"seed": i, "logger.csv.folder": f"/{i}", "run_dir": f"/{i}"} for i in (0, 1)],
        {"all runs": 2},
    ),
    "no depth, typed in two ways": (
        [NO_MTP, {"seed": 1, "mtp.depth": 0, "mtp.concat": "hidden_first"}],
        {"all runs": 2},
    ),
    "a whole number, typed in two ways": (
        [{"seed": i, "mtp_lambda": x, "optimizer.betas": [x]} for i, x in enumerate((1, 1.0))],
        {"all runs": 2},
    ),
    "runs older than a key": ([{}, {"seed": 1, "data.train_windows": "all"}], {"all runs": 2}),
    "the class without a choice of mtp": ([{}, NO_MTP], {"mtp=none": 1, "mtp=sequential": 1}),
    "branches": (
        [
            {"seed": seed, "trainer.max_steps": steps, "branch_from": f"{seed}@{steps}"}
            for seed in (0, 1)
            for steps in (20, 40)
        ],
        {"trainer.max_steps=20": 2, "trainer.max_steps=40": 2},
    ),
}


@pytest.mark.parametrize("case", GROUPED)
def test_runs_are_grouped_by_the_keys_that_change_their_numbers(tmp_path: Path, case: str) -> None:
    configs, counts = GROUPED[case]
    for i, config in enumerate(configs):
        write_run(tmp_path / f"{i}", config)
    assert run_counts(settings_of(tmp_path)) == [(label, n, n) for label, n in counts.items()]


def test_a_repeated_seed_is_left_out(tmp_path: Path) -> None:
    old = write_run(tmp_path / "old", loss=9.0)
    new = write_run(tmp_path / "new", loss=2.0)
    write_run(tmp_path / "late", done=False)
    os.utime(old / "summary.json", (1, 1))
    os.utime(new / "summary.json", (2, 2))
    settings, notes = settings_of(tmp_path), notes_of(tmp_path)
    assert settings.all[0].estimate(LOSS).values == {0: 2.0}
    assert "old repeats a seed of its setting and is left out" in notes
    assert "late repeats a seed" in notes and "new repeats" not in notes


def test_versions_commits_and_machines_that_differ_are_noted(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    other = {"versions": {**VERSIONS, "torch": "2.11.0"}, "git_commit": "b" * 40, "world_size": 2}
    other["machine"] = "Linux x86_64, 64 cores"
    write_run(tmp_path / "b", {"seed": 1}, summary=other)
    write_run(tmp_path / "c", {"seed": 2}, summary={"versions": None, "git_commit": None})
    notes = notes_of(tmp_path)
    assert "version of torch: 2.13.0 (1), 2.11.0 (1), unknown (1)" in notes
    assert f"git commit: {'a' * 40} (1); {'b' * 40} (1); unknown (1)." in notes
    assert "64 cores (1). Seconds and speeds do not compare." in notes
    assert "world size: 1 (2); 2 (1)" in notes


def test_other_data_is_another_setting(tmp_path: Path) -> None:
    """The text file was changed between two runs of equal configs."""
    write_run(tmp_path / "a", loss=2.0)
    write_run(tmp_path / "b", {"seed": 1}, loss=3.0, summary=trained_on("e"))
    write_run(tmp_path / "c", {"seed": 2}, done=False)
    settings, notes = settings_of(tmp_path), notes_of(tmp_path)
    done = {"dddddddd": 1, "eeeeeeee": 1, "unknown": 0}
    assert run_counts(settings) == [(f"data.fingerprint={key}", n, 1) for key, n in done.items()]
    assert "2 different data fingerprints" in notes and "tokenizer" not in notes
    assert settings.headline.tag == LOSS


def test_data_that_follow_from_the_config_split_no_setting(tmp_path: Path) -> None:
    """Each vocabulary size has its own token store; unfinished runs have no fingerprint yet."""
    for size, summary in ((300, {}), (999, trained_on("e", "u"))):
        vocabulary = {"tokenizer.vocab_size": size}
        write_run(tmp_path / f"{size}_a", {**vocabulary, "seed": 0}, summary=summary)
        write_run(tmp_path / f"{size}_b", {**vocabulary, "seed": 1}, done=False)
    sizes = [(f"tokenizer.vocab_size={size}", 1, 2) for size in (300, 999)]
    assert run_counts(settings_of(tmp_path)) == sizes


def test_other_tokenizers_are_compared_in_bits_per_byte(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"tokenizer.vocab_size": 300})
    other = {"tokenizer.vocab_size": 999}
    write_run(tmp_path / "b", other, loss=1.9, summary=trained_on("e", "u"))
    settings, notes = settings_of(tmp_path), notes_of(tmp_path)
    assert settings.headline.tag == BITS
    assert "compare bits per byte" in notes
    text = answer_of(settings)
    assert "0.9500 bits per byte" in text and "nats" not in text


def test_two_folders_are_compared_setting_by_setting(tmp_path: Path) -> None:
    depth_sweep(tmp_path / "before", {0: (2.0, 2.1), 1: (1.9, 2.0)})
    depth_sweep(tmp_path / "after", {0: (2.0, 2.1), 1: (1.7, 1.8)})
    settings = settings_of(tmp_path / "before", tmp_path / "after")
    assert settings.varied == ["folder", "mtp.depth"]
    labels = [f"folder={f}, mtp.depth={d}" for f in ("before", "after") for d in (0, 1)]
    means = [(s.label, round(s.estimate(LOSS).interval.mean, 9)) for s in settings.all]
    assert means == list(zip(labels, (2.05, 1.95, 2.05, 1.75), strict=True))
    # Each setting of the second folder is compared with the same one of the first.
    pairs = {c.setting.label: c.reference.label for c in compare(settings)}
    assert pairs == dict(zip(labels[2:], labels[:2], strict=True))


def test_settings_are_named_by_group_choices_if_keys_do_not(tmp_path: Path) -> None:
    overrides = "[lambda_schedule=constant, +lambda_schedule.unit=fraction]"
    choices = "hydra: {runtime: {choices: {lambda_schedule: deepseek_v3}}}"
    for name, config, file, text in (
        ("a", {"lambda_schedule.unit": "fraction"}, "overrides.yaml", overrides),
        ("b", {"lambda_schedule.length": 3}, "hydra.yaml", choices),
    ):
        (written := write_run(tmp_path / name, config) / ".hydra").mkdir()
        (written / file).write_text(text)
    assert [s.label for s in settings_of(tmp_path).all] == [
        "lambda_schedule=constant",
        "lambda_schedule=deepseek_v3",
    ]


def test_runs_are_sorted_by_the_numbers_in_their_names(tmp_path: Path) -> None:
    for name in ("d-10", "d-2", "d-1"):
        write_run(tmp_path / name, done=False)
    assert list(run_states(tmp_path)) == ["d-1", "d-2", "d-10"]


@pytest.mark.parametrize(
    ("old", "new"), [("seed: 7", "seed: [1, 2]"), ("d_model: 128", f"d_model: {10**400}")]
)
def test_configs_with_odd_types_and_sizes_are_read(tmp_path: Path, old: str, new: str) -> None:
    write_run(tmp_path / "a")
    config = write_run(tmp_path / "b", {"seed": 7}) / "config.yaml"
    config.write_text(config.read_text().replace(old, new))
    assert "2 runs: 2 done" in answer_of(tmp_path)


def test_the_seed_is_read_from_overrides(tmp_path: Path) -> None:
    assert RunRecord(folder=tmp_path, overrides={"seed": "3"}).seed == 3
    for other in ("x", "²", "9" * 5000):
        assert RunRecord(folder=tmp_path, overrides={"seed": other}).seed == other
    assert RunRecord(folder=tmp_path).seed is None


def test_teacherless_is_not_taken_for_no_mtp(tmp_path: Path) -> None:
    """Neither has depths. Labels have the choice of the group mtp."""
    for name in ("none", "teacherless"):
        target = f"mtp_lightning.mtp.{name}.{'NoMTP' if name == 'none' else 'Teacherless'}Config"
        for seed in (0, 1):
            config = {"seed": seed, "mtp._target_": target, "mtp.depth": 0}
            status = {"state": "done", "overrides": [f"mtp={name}", f"seed={seed}"]}
            write_run(tmp_path / f"{name}{seed}", config, status=status)
    settings = settings_of(tmp_path)
    assert run_counts(settings) == [(f"mtp={name}", 2, 2) for name in ("none", "teacherless")]
    (comparison,) = compare(settings)
    assert comparison.reference.is_plain and not comparison.setting.is_plain
