"""The search, with trials that are small programs, and once with real runs."""

from __future__ import annotations

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
from mtp_lightning.run.status import read_status
from sweeps import plan as plan_module
from sweeps import search as search_module
from sweeps.search_space import parse, shown
from tests.integration.helpers import execute, overrides
from tests.sweeps.claims.fixture_claims import own_conf

optuna = pytest.importorskip("optuna", reason="needs the extra search")

METRIC = "val/loss_depth_0"
RANGES = ["optimizer.lr=interval(1e-4,1e-1,log)", "mtp.depth=1,2"]

# A run that "trains": its loss is best at a learning rate of 0.01 and depth 1.
RUN = """
import json, math, os, sys, time
folder, *overrides = sys.argv[1:]
values = dict(o.lstrip("+").split("=", 1) for o in overrides if "=" in o)
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
def fake_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "run.py"
    program.write_text(RUN)

    def command(script: Path, overrides: Sequence[str], folder: Path) -> tuple[str, ...]:
        return (sys.executable, "-S", str(program), str(folder), *overrides)

    monkeypatch.setattr(plan_module, "python_command", command)


def run(folder: Path, *arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        search_module.main([str(folder), *RANGES, "--n-jobs", "2", *arguments])
    return int(ended.value.code or 0)


def study(folder: Path) -> Any:
    return optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder / 'study.db'}")


def test_fixed_paths_are_taken_as_they_are_typed(tmp_path: Path, fake_runs: None) -> None:
    folder = tmp_path / "找 (1), [2]"
    assert run(folder, "data=text", "data.paths=文本 (1)", "--trials", "1") == 0
    (job,) = json.loads((folder / "sweep.json").read_text())["jobs"]
    assert "data.paths='文本 (1)'" in job["overrides"]


def test_a_folder_of_configs_reaches_the_trials(tmp_path, fake_runs, monkeypatch, capsys):
    monkeypatch.chdir(own_conf(tmp_path / "conf").parent)
    own = ["mtp=mine", "--trials", "1"]
    assert run(tmp_path / "search", *own) == 1
    assert "needs --config-dir" in capsys.readouterr().err
    assert run(tmp_path / "search", *own, "--config-dir", "conf") == 0


def test_finds_the_better_half(tmp_path, fake_runs, capsys):
    folder = tmp_path / "search"
    assert run(folder, "--trials", "9", "--no-pruning") == 0
    trials = study(folder).trials
    assert [trial.number for trial in trials] == list(range(9))
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
    best = study(folder).best_trial
    assert best.params["mtp.depth"] == "1"
    for trial in trials:
        summary = json.loads((folder / trial.user_attrs["folder"] / "summary.json").read_text())
        assert trial.value == summary[METRIC]
        status = read_status(folder / trial.user_attrs["folder"])
        assert status["state"] == "done"
        assert f"optimizer.lr={trial.params['optimizer.lr']!r}" in status["overrides"]
    printed = capsys.readouterr().out
    assert "9 trials: 9 complete, 0 pruned, 0 failed" in printed
    assert f"{best.value:.4f}" in printed
    stored = json.loads((folder / "sweep.json").read_text())
    assert stored["varied"] == ["optimizer.lr", "mtp.depth"] and len(stored["jobs"]) == 9


@pytest.mark.parametrize("metric, meant", [("val/los_depth_0", METRIC), ("train/loss", METRIC)])
def test_a_metric_that_no_validation_logs_stops_the_search(
    tmp_path: Path, fake_runs: None, capsys: pytest.CaptureFixture[str], metric: str, meant: str
) -> None:
    folder, slow = tmp_path / "search", "data.val_fraction=0.5"
    assert run(folder, slow, "--trials", "4", "--n-jobs", "1", "--metric", metric) == 1
    error = capsys.readouterr().err
    assert f"--metric {metric} was not logged by the first validation" in error and meant in error
    assert len(study(folder).trials) == 1
    assert run(folder, slow, "--trials", "1") == 0, "the same folder, with the right one"


def test_looks_at_the_end_of_metrics_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {"space": {}, "fixed": [], "n_trials": 1, "warmup": None, "seed": 0}
    search = search_module.Search(tmp_path, metric="val/excess_loss", **told)
    job: Any = SimpleNamespace(folder=tmp_path / "job")
    trial = search.study.ask()
    search._trials[job.folder] = [trial]
    csv = MetricsFile(job.folder / "metrics.csv")
    csv.write({METRIC: 2.0}, 5)
    assert search.watch(job) is None, "a callback adds its number to the row later"
    csv.write({"val/excess_loss": 1.0}, 5)
    assert search.watch(job) is None
    whole = []
    monkeypatch.setattr(search_module, "read_metrics", lambda f: whole.append(f) or read_metrics(f))
    for step in (6, 7, 8):
        csv.write({"train/loss": 1.0}, step)
        search.watch(job)
    assert whole == []
    csv.write({METRIC: 2.0, "val/excess_loss": 0.5}, 10)
    search.watch(job)
    assert search.study.trials[trial.number].intermediate_values == {5: 1.0, 10: 0.5}


def test_prunes_what_is_above_the_median(tmp_path: Path, fake_runs: None) -> None:
    folder = tmp_path / "search"
    # Slow enough to be watched; the warm-up is a quarter of these 5 steps instead of 3500.
    fixed = ["data.val_fraction=0.5", "trainer.max_steps=5"]
    assert run(folder, *fixed, "--trials", "9", "--n-jobs", "4") == 0
    pruned = [t for t in study(folder).trials if t.state.name == "PRUNED"]
    assert pruned
    complete = [t for t in study(folder).trials if t.state.name == "COMPLETE"]
    assert len(pruned) + len(complete) == 9
    for trial in pruned:
        folder_of = folder / trial.user_attrs["folder"]
        status = read_status(folder_of)
        assert status["state"] == "interrupted"
        assert "pruned: val/loss_depth_0" in status["reason"]
        assert not (folder_of / "summary.json").exists()


def test_goes_on_with_what_was_cut_off(tmp_path, fake_runs, monkeypatch):
    folder = tmp_path / "search"
    begun: set[Path] = set()

    def cut_off(self: Any, job: Any) -> None:
        before = len(begun)
        if (job.folder / "job.log").stat().st_size:
            begun.add(job.folder)
        if before < len(begun) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setenv("STEP_SECONDS", "600")  # none ends before it is cut off
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
    # All trials are there: nothing more to do.
    assert run(folder, "--trials", "4") == 0
    assert len(study(folder).trials) == 4
    assert run(folder, "--trials", "6") == 0
    values = [t.params["optimizer.lr"] for t in study(folder).trials]
    assert len(set(values)) == 6, "the sampler began again with its first proposals"


def test_a_trial_that_was_cut_off_before_it_had_values_fails(tmp_path, fake_runs):
    folder = tmp_path / "search"
    assert run(folder, "--trials", "1") == 0
    study(folder).ask()
    assert run(folder, "--trials", "3") == 0
    assert [t.state.name for t in study(folder).trials] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_the_same_values_are_run_once(tmp_path, fake_runs, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "RANGES", ["mtp.depth=1,2"])
    folder = tmp_path / "search"
    assert run(folder, "optimizer.lr=0.01", "--trials", "5") == 0
    assert len(list(folder.glob("*/job.log"))) <= 2
    assert {t.value for t in study(folder).trials if t.params["mtp.depth"] == "1"} <= {1.0}
    assert len([t for t in study(folder).trials if t.state.name == "COMPLETE"]) == 5


def test_values_whose_trial_was_pruned_are_pruned_again(tmp_path, fake_runs, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "RANGES", ["mtp.depth=1,2"])
    folder = tmp_path / "search"
    assert run(folder, "optimizer.lr=0.01", "--trials", "1") == 0
    (done,) = study(folder).trials
    # The other depth's trial, in the folder that it would get.
    other = {"1": "2", "2": "1"}[done.params["mtp.depth"]]
    named = done.user_attrs["folder"].replace(f"depth-{done.params['mtp.depth']}", f"depth-{other}")
    pruned = {"state": optuna.trial.TrialState.PRUNED, "intermediate_values": {5: 3.0}}
    pruned |= {"params": {"mtp.depth": other}, "distributions": done.distributions}
    study(folder).add_trial(optuna.trial.create_trial(**pruned, user_attrs={"folder": named}))
    assert run(folder, "optimizer.lr=0.01", "--trials", "8") == 0
    states = {(t.params["mtp.depth"], t.state.name) for t in study(folder).trials}
    assert states == {(done.params["mtp.depth"], "COMPLETE"), (other, "PRUNED")}


@pytest.mark.parametrize("fixed", ["seed=13", "mtp_lambda=nan"])
def test_failures_are_told(tmp_path, fake_runs, capsys, fixed):
    assert run(tmp_path / "search", fixed, "--trials", "2") == 1
    printed = capsys.readouterr().out
    assert "2 trials: 0 complete, 0 pruned, 2 failed" in printed
    assert ("told to fail" if fixed == "seed=13" else "not a finite number") in printed


def test_a_moved_folder_keeps_its_search_and_takes_no_other(tmp_path, fake_runs, capsys):
    run(tmp_path / "search", "--trials", "1")
    moved = (tmp_path / "search").rename(tmp_path / "moved")
    assert run(moved, "--trials", "2") == 0
    (name,) = optuna.get_all_study_names(storage := f"sqlite:///{moved / 'study.db'}")
    assert name == "search"
    assert run(moved, "seed=1", "--trials", "3") == 1
    error = capsys.readouterr().err
    assert "holds another search" in error and "optimizer.lr" in error
    assert len(optuna.load_study(study_name=name, storage=storage).trials) == 2


REFUSED = {
    "mtp.depht=1,2": "mtp.depht",
    "mtp=sequential,sequentail": "sequentail",
    "trainer.devices=-1": "not -1",
    "model.n_layers=int(0,4)": "model.n_layers must be a whole number of at least 1, not 0",
    "model.d_ff=interval(4,1)": "both bounds must be finite, and the lower one come first",
    "mtp_lambda=interval(0.1,inf)": "both bounds must be finite",
    "optimizer.lr=0.5": "optimizer.lr=0.5 fixes a key that is searched",
    "model.d_ff=interval(0,1,log)": "above 0",
    "model.d_ff=int(1.5,4)": "must be numbers",
    "model.d_ff=interval(1,2": "neither an override nor a range",
    "mtp.depth=4,8": "mtp.depth=4,8 gives mtp.depth a second range",
    "data.batch_size=range(1,1)": "data.batch_size=range(1,1) has no values",
    "mtp=glob(p*)": "mtp=glob(p*) has no values",
    "run_dir=mine": "run_dir=mine is the folder of one run: leave it out",
    "trainer.num_nodes=2 trainer.strategy=ddp": "num_nodes=2 in a sweep takes hydra/launcher=slurm",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_mistakes_are_told_before_there_is_a_search(tmp_path, fake_runs, capsys, typed):
    assert run(tmp_path / "search", *typed.split(), "--trials", "2") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and REFUSED[typed] in error
    assert list(tmp_path.glob("search/*/job.log")) == []
    assert not (tmp_path / "search" / "study.db").exists()


def test_ranges_and_what_is_shown_and_stored_of_them() -> None:
    typed = "a=interval(1e-4,1e-2,log)|b=int(1, 8)|c=choice(x,y)|d=[1,2],[3]|e=5|f=[1,2]"
    space, fixed = parse(typed.split("|"))
    found = {
        "interval(0.0001,0.01,log)": FloatDistribution(1e-4, 1e-2, log=True),
        "int(1,8)": IntDistribution(1, 8),
        "choice(x,y)": CategoricalDistribution(("x", "y")),
        "choice([1,2],[3])": CategoricalDistribution(("[1,2]", "[3]")),
    }
    assert space == dict(zip("abcd", found.values(), strict=True))
    assert list(map(shown, space.values())) == list(found) and fixed == ["e=5", "f=[1,2]"]
    with pytest.raises(ValueError, match="nothing to search"):
        parse(["e=5"])


def test_a_search_on_the_cpu_leaves_gpus_alone(tmp_path, fake_runs, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    wide = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp"]
    assert run(tmp_path / "search", *wide, "--trials", "1") == 0
    assert "on cpu:0" in capsys.readouterr().out


@pytest.mark.slow
def test_real_runs(tmp_path: Path, cache: Path) -> None:
    settings = {"optimizer.lr": "interval(1e-4,3e-2,log)", "mtp.depth": "0,1"}
    command = [sys.executable, "-m", "sweeps.search", str(tmp_path / "search")]
    command += ["--trials", "2", "--n-jobs", "2", *overrides(cache, settings)]
    assert "2 trials: 2 complete" in execute(command, code=0).stdout
    for trial in study(tmp_path / "search").trials:
        job = tmp_path / "search" / trial.user_attrs["folder"]
        assert json.loads((job / "summary.json").read_text())[METRIC] == trial.value
        assert trial.intermediate_values[10] == pytest.approx(trial.value)
