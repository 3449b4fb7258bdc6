"""The hyperparameter search, with small programs as trials, and once with real runs."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from mtp_lightning.run.metrics import MetricsFile, read_metrics
from mtp_lightning.run.status import read_status, write_status
from sweeps import plan as plan_module
from sweeps import search as search_module
from sweeps.search_space import parse, shown
from sweeps.status import main as status_of
from tests.integration.helpers import execute, overrides
from tests.sweeps.claims.fixture_claims import conf_with_own_head

optuna = pytest.importorskip("optuna", reason="needs the extra search")

METRIC = "val/loss_depth_0"
RANGES = ("optimizer.lr=interval(1e-4,1e-1,log)", "mtp.depth=1,2")
TWO_VALUES = ("mtp.depth=1,2", "optimizer.lr=0.01")

# Replaces a run: its loss is lowest at a learning rate of 0.01 and depth 1.
RUN = """
import json, math, os, sys, time
overrides = sys.argv[1:]
values = dict(o.lstrip("+").split("=", 1) for o in overrides if "=" in o)
folder = values["run_dir"].strip("'")
if values.get("mtp") == "mine" and "--config-dir" not in overrides:
    sys.exit("error: no such head")
print("training", flush=True)
best = math.log10(float(values["optimizer.lr"]) / 0.01) ** 2 + int(values["mtp.depth"])
if values.get("seed") == "13":
    sys.exit("error: told to fail")
with open(f"{folder}/metrics.csv", "w") as file:
    print("step,train/loss,METRIC", file=file, flush=True)
    for step in range(1, 6):
        print(f"{step},{best + 1 / step},{best + 1 / step}", file=file, flush=True)
        time.sleep(float(os.environ.get("STEP_SECONDS", values.get("data.val_fraction", 0))))
json.dump({"METRIC": best if "nan" not in values.get("mtp_lambda", "") else math.nan},
          open(f"{folder}/summary.json", "w"))
""".replace("METRIC", METRIC)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a search whose trials run RUN."""
    program = tmp_path / "run.py"
    program.write_text(RUN)
    monkeypatch.setattr(plan_module, "app", lambda name: ["-S", str(program)])
    return tmp_path / "search"


def run(folder: Path, *arguments: str, ranges: Sequence[str] = RANGES) -> int:
    with pytest.raises(SystemExit) as ended:
        search_module.main([str(folder), *ranges, "--n-jobs", "2", *arguments])
    return int(ended.value.code or 0)


@functools.cache
def storage(folder: Path) -> Any:
    """Opened once, which takes a third of a second."""
    return optuna.storages.get_storage(f"sqlite:///{folder / 'study.db'}")


def study(folder: Path) -> Any:
    return optuna.load_study(study_name=folder.name, storage=storage(folder))


def test_paths_are_taken_literally_and_a_search_on_the_cpu_uses_no_gpu(folder, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    folder = folder.with_name("找 (1), [2]")
    wide = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp"]
    assert run(folder, "data=text", "data.paths=文本 (1)", *wide, "--trials", "1") == 0
    (job,) = json.loads((folder / "sweep.json").read_text())["jobs"]
    assert "data.paths='文本 (1)'" in job["overrides"]
    assert "on cpu:0" in capsys.readouterr().out


def test_a_folder_of_configs_reaches_the_trials(folder, monkeypatch, capsys):
    monkeypatch.chdir(conf_with_own_head(folder.with_name("conf")).parent)
    own = ["mtp=mine", "--trials", "1"]
    assert run(folder, *own) == 1
    assert "needs --config-dir" in capsys.readouterr().err
    assert run(folder, *own, "--config-dir", "conf") == 0


def test_trials_are_stored_and_the_best_has_the_better_depth(folder, capsys):
    assert run(folder, "--trials", "6", "--no-pruning") == 0
    trials, best = study(folder).trials, study(folder).best_trial
    assert [(trial.number, trial.state.name) for trial in trials] == [
        (i, "COMPLETE") for i in range(6)
    ]
    assert best.params["mtp.depth"] == "1"
    for trial in trials:
        job = folder / trial.user_attrs["folder"]
        assert trial.value == json.loads((job / "summary.json").read_text())[METRIC]
        status = read_status(job)
        assert status["state"] == "done"
        assert f"optimizer.lr={trial.params['optimizer.lr']!r}" in status["overrides"]
    printed = capsys.readouterr().out
    assert "6 trials: 6 complete, 0 pruned, 0 failed" in printed
    assert f"\nval/loss_depth_0 {best.value:.4f}  " in printed
    stored = json.loads((folder / "sweep.json").read_text())
    assert stored["varied"] == ["optimizer.lr", "mtp.depth"] and len(stored["jobs"]) == 6


@pytest.mark.parametrize("metric", ["val/los_depth_0", "train/loss"])
def test_a_metric_that_no_validation_logs_stops_the_search(folder, capsys, metric):
    slow = "data.val_fraction=0.3"
    assert run(folder, slow, "--trials", "4", "--n-jobs", "1", "--metric", metric) == 1
    error = capsys.readouterr().err
    assert f"--metric {metric} was not logged by the first validation" in error and METRIC in error
    assert len(study(folder).trials) == 1
    assert run(folder, slow, "--trials", "1") == 0, "the folder takes the right metric"


def test_watching_reads_only_the_new_rows_of_metrics(tmp_path, monkeypatch):
    options: dict[str, Any] = {"space": {}, "fixed": [], "n_trials": 1, "warmup": None, "seed": 0}
    search = search_module.Search(folder=tmp_path, metric="val/excess_loss", **options)
    job: Any = SimpleNamespace(folder=tmp_path / "job")
    trial = search.study.ask()
    search._trials[job.folder] = [trial]
    csv = MetricsFile(job.folder / "metrics.csv")
    csv.write({METRIC: 2.0}, 5)
    assert search.watch(job) is None, "a callback adds its metric to the row later"
    csv.write({"val/excess_loss": 1.0}, 5)
    assert search.watch(job) is None
    reads = []
    monkeypatch.setattr(search_module, "read_metrics", lambda f: reads.append(f) or read_metrics(f))
    for step in (6, 7, 8):
        csv.write({"train/loss": 1.0}, step)
        search.watch(job)
    assert reads == [], "the whole file was read"
    csv.write({METRIC: 2.0, "val/excess_loss": 0.5}, 10)
    search.watch(job)
    assert search.study.trials[trial.number].intermediate_values == {5: 1.0, 10: 0.5}


def test_trials_above_the_median_are_pruned(folder, capsys):
    # Slow enough to be watched; the warm-up is a quarter of these 5 steps.
    fixed = ["data.val_fraction=0.5", "trainer.max_steps=5"]
    assert run(folder, *fixed, "--trials", "9", "--n-jobs", "4") == 0
    states = [trial.state.name for trial in study(folder).trials]
    n_pruned = states.count("PRUNED")
    assert n_pruned > 0 and states.count("COMPLETE") == 9 - n_pruned
    for trial in (t for t in study(folder).trials if t.state.name == "PRUNED"):
        job = folder / trial.user_attrs["folder"]
        status = read_status(job)
        assert status["state"] == "interrupted" and f"pruned: {METRIC}" in status["reason"]
        assert not (job / "summary.json").exists()
    with pytest.raises(SystemExit) as ended:
        status_of([str(folder)])
    assert ended.value.code == 0
    counts = f"9 jobs: {9 - n_pruned} done, {n_pruned} pruned"
    assert capsys.readouterr().out.endswith(f"{counts}\n")


def test_an_interrupted_search_continues_its_trials(folder, monkeypatch):
    begun: set[Path] = set()

    def cut_off(self: Any, job: Any) -> None:
        before = len(begun)
        if (job.folder / "job.log").stat().st_size:
            begun.add(job.folder)
        if before < len(begun) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setenv("STEP_SECONDS", "600")  # no trial ends before the interrupt
        patch.setattr(search_module.Search, "watch", cut_off)
        assert run(folder, "--trials", "4") == 130
    open_trials = [t for t in study(folder).trials if t.state.name == "RUNNING"]
    assert len(open_trials) == len(study(folder).trials) == 2
    assert run(folder, "--trials", "4") == 0
    trials = study(folder).trials
    assert [t.state.name for t in trials] == ["COMPLETE"] * 4
    for old in open_trials:
        assert trials[old.number].params == old.params
        log = (folder / old.user_attrs["folder"] / "job.log").read_text()
        assert "started again" in log
    # All trials are done.
    assert run(folder, "--trials", "4") == 0
    assert len(study(folder).trials) == 4
    assert run(folder, "--trials", "6") == 0
    values = [t.params["optimizer.lr"] for t in study(folder).trials]
    assert len(set(values)) == 6, "the sampler repeated its first proposals"


def test_a_trial_interrupted_before_it_had_values_fails(folder, capsys):
    assert run(folder, "--trials", "1") == 0
    study(folder).ask()
    assert run(folder, "--trials", "3") == 0
    assert "(1 of 2)" in capsys.readouterr().out, "one trial had ended before"
    assert [t.state.name for t in study(folder).trials] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_a_pruned_trial_that_ended_after_an_interruption_stays_pruned(folder):
    assert run(folder, "--trials", "1") == 0
    (done,) = study(folder).trials
    trial = study(folder).ask(done.distributions)
    trial.set_user_attr("folder", "pruned-one")
    write_status(folder / "pruned-one", [], "interrupted", reason="pruned: above the median")
    assert run(folder, "--trials", "2") == 0
    assert [t.state.name for t in study(folder).trials] == ["COMPLETE", "PRUNED"]


def test_equal_values_are_run_and_listed_once(folder, capsys):
    assert run(folder, "--trials", "5", ranges=TWO_VALUES) == 0
    n_run = len(list(folder.glob("*/job.log")))
    best = [x for x in capsys.readouterr().out.splitlines() if x.startswith("val/loss_depth_0 ")]
    assert len(best) == len(set(best)) == n_run <= 2
    trials = study(folder).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 5
    assert {trial.value for trial in trials if trial.params["mtp.depth"] == "1"} <= {1.0}


def test_values_whose_trial_was_pruned_are_pruned_again(folder):
    assert run(folder, "--trials", "1", ranges=TWO_VALUES) == 0
    (done,) = study(folder).trials
    # A pruned trial of the other depth, in the folder that it would get.
    other = {"1": "2", "2": "1"}[done.params["mtp.depth"]]
    named = done.user_attrs["folder"].replace(f"depth-{done.params['mtp.depth']}", f"depth-{other}")
    pruned = {"state": optuna.trial.TrialState.PRUNED, "intermediate_values": {5: 3.0}}
    pruned |= {"params": {"mtp.depth": other}, "distributions": done.distributions}
    study(folder).add_trial(optuna.trial.create_trial(**pruned, user_attrs={"folder": named}))
    assert run(folder, "--trials", "8", ranges=TWO_VALUES) == 0
    states = {(t.params["mtp.depth"], t.state.name) for t in study(folder).trials}
    assert states == {(done.params["mtp.depth"], "COMPLETE"), (other, "PRUNED")}


@pytest.mark.parametrize(
    ("fixed", "reason"), [("seed=13", "told to fail"), ("mtp_lambda=nan", "not a finite number")]
)
def test_failed_trials_are_counted_and_each_failure_is_named_once(folder, capsys, fixed, reason):
    assert run(folder, fixed, "--trials", "4", ranges=TWO_VALUES) == 1
    printed = capsys.readouterr().out
    assert "4 trials: 0 complete, 0 pruned, 4 failed" in printed and reason in printed
    folders = [line.split(":")[1] for line in printed.splitlines() if line.startswith("failed:")]
    assert len(folders) == len(set(folders)) <= 2


def test_a_moved_folder_keeps_its_search_and_refuses_another(folder, capsys):
    run(folder, "--trials", "1")
    moved = folder.rename(folder.with_name("moved"))
    assert run(moved, "--trials", "2") == 0
    assert optuna.get_all_study_names(storage(moved)) == ["search"]
    assert run(moved, "seed=1", "--trials", "3") == 1
    error = capsys.readouterr().err
    assert "holds another search" in error and "optimizer.lr" in error
    assert len(optuna.load_study(study_name="search", storage=storage(moved)).trials) == 2


REFUSED = {
    "mtp.depht=1,2": "mtp.depht",
    "mtp=sequential,sequentail": "sequentail",
    "trainer.devices=-1": "not -1",
    "model.n_layers=int(0,4)": "model.n_layers must be a whole number of at least 1, not 0",
    "model.d_ff=interval(4,1)": "both bounds must be finite, and the lower one come first",
    "mtp_lambda=interval(0.1,inf)": "both bounds must be finite",
    "optimizer.lr=0.5": "optimizer.lr=0.5 fixes a key that is searched",
    "model.d_ff=interval(0,1,log)": "above 0",
    "model.d_ff=int(1.5,4)": "must be whole numbers",
    "model.d_ff=interval(1,2": "neither an override nor a range",
    "mtp.depth=4,8": "mtp.depth=4,8 gives mtp.depth a second range",
    "+mtp.depth=3,4": "gives +mtp.depth a second range",
    "++optimizer.lr=0.1": "++optimizer.lr=0.1 fixes a key",
    "data.batch_size=range(1,1)": "data.batch_size=range(1,1) has no values that can be listed",
    "run_dir=mine": "run_dir=mine is the folder of one run: leave it out",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_mistakes_are_refused_before_the_search_begins(folder, capsys, typed):
    assert run(folder, typed, "--trials", "2") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and REFUSED[typed] in error
    assert not folder.exists()


def test_ranges_are_parsed_and_printed() -> None:
    typed = "a=interval(1e-4,1e-2,log)|b=int(1, 8)|c=choice(x,y)|d=[1,2],[3]|e=5|f=[1,2]"
    space, fixed = parse(typed.split("|"))
    distributions = {
        "interval(0.0001,0.01,log)": FloatDistribution(1e-4, 1e-2, log=True),
        "int(1,8)": IntDistribution(1, 8),
        "choice(x,y)": CategoricalDistribution(("x", "y")),
        "choice([1,2],[3])": CategoricalDistribution(("[1,2]", "[3]")),
    }
    assert space == dict(zip("abcd", distributions.values(), strict=True))
    assert list(map(shown, space.values())) == list(distributions) and fixed == ["e=5", "f=[1,2]"]
    assert shown(IntDistribution(1, 1_000_001)) == "int(1,1000001)"
    with pytest.raises(ValueError, match="nothing to search"):
        parse(["e=5"])


def test_a_file_that_is_no_study_is_refused(folder, capsys):
    folder.mkdir()
    (folder / "study.db").write_text("text " * 1000)
    assert run(folder, "--trials", "1") == 1
    error = capsys.readouterr().err
    assert "study.db cannot be used" in error and error.count("\n") == 1


@pytest.mark.slow
def test_trials_train_real_runs(tmp_path: Path, cache: Path) -> None:
    settings = {"optimizer.lr": "interval(1e-4,3e-2,log)", "mtp.depth": "0,1"}
    command = [sys.executable, "-m", "sweeps.search", str(tmp_path / "search")]
    command += ["--trials", "2", "--n-jobs", "2", *overrides(cache, settings)]
    assert "2 trials: 2 complete" in execute(command, code=0).stdout
    for trial in study(tmp_path / "search").trials:
        job = tmp_path / "search" / trial.user_attrs["folder"]
        assert json.loads((job / "summary.json").read_text())[METRIC] == trial.value
        assert trial.intermediate_values[10] == pytest.approx(trial.value)
