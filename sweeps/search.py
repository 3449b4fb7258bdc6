"""Search: an Optuna study whose trials are runs in the pool.

    python -m sweeps.search runs/search optimizer.lr='interval(1e-3,1e-2,log)' mtp.depth=1,2,4 \\
        trainer.max_steps=500 --trials 20

The folder is a sweep's (sweep.json, a folder per trial), with the study in ``study.db``. The same
command continues it, first with interrupted trials. TPE (Bergstra et al. 2011) proposes values;
after a quarter of its steps, a trial is stopped if its best loss so far is above the median of the
others at the same step.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mtp_lightning.command_line import check_config
from mtp_lightning.command_line.quote import literal
from mtp_lightning.command_line.shell import Parser, readable_errors
from mtp_lightning.errors import UserError, require_package, suggestion
from mtp_lightning.run.layout import METRICS_FILE, SUMMARY_FILE
from mtp_lightning.run.metrics import read_metrics, read_newest
from mtp_lightning.run.status import PRUNED, read_status
from mtp_lightning.stored import read_json
from sweeps.compose import compose_run, settle, typed_folder
from sweeps.devices import typed_devices
from sweeps.interrupts import alone
from sweeps.plan import SweepPlan, job_of, refuse_run_folder
from sweeps.pool import make_pool
from sweeps.process import Job
from sweeps.search_space import Space, examples, parse, shown
from sweeps.status import was_pruned

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import Trial

STUDY_FILE = "study.db"
LOSS = "val/loss_depth_0"  # that every validation logs


@dataclass(kw_only=True)
class Search:
    """The study of a folder, and its trials as jobs.

    Raises:
        UserError: if the folder holds another search.
    """

    folder: Path  # of the search, absolute
    space: Space
    fixed: list[str]  # overrides of all trials
    metric: str  # to minimize: a validation's tag in `metrics.csv` and `summary.json`
    n_trials: int  # total number, whatever their results
    warmup: int | None  # the step before which no trial is stopped; None to stop none
    seed: int  # the sampler's
    config_dir: Path | None = None  # a folder with more configs, absolute
    command: Sequence[str] = ()  # for `sweep.json`

    def __post_init__(self) -> None:
        self.study = _open_study(self.folder, warmup=self.warmup, seed=self.seed)
        ranges = {key: shown(domain) for key, domain in self.space.items()}
        definition = {"space": ranges, "fixed": self.fixed, "metric": self.metric}
        stored = self.study.user_attrs.get("search", definition)
        if not any(trial.state.is_finished() for trial in self.study.trials):
            stored = {**stored, "metric": self.metric}  # a misspelled one may be mended
        if stored != definition:
            raise UserError(
                f"{self.folder} holds another search ({json.dumps(stored)}): give this one its own "
                "folder."
            )
        self.study.set_user_attr("search", definition)
        self._plan = SweepPlan(self.folder)
        self._trials: dict[Path, list[Trial]] = {}  # unfinished ones, by folder
        self._metric_logged = False  # whether a validation has logged the metric
        self._newest_steps: dict[Path, int] = {}  # of the validations that were reported

    def jobs(self) -> Iterator[Job]:
        """Trials, each requested when there is room for it; interrupted ones come first."""
        from optuna.trial import Trial, TrialState

        for interrupted in self.study.get_trials(states=(TrialState.RUNNING,)):
            trial = Trial(self.study, interrupted._trial_id)
            status = read_status(self.folder / trial.user_attrs.get("folder", ""))
            if status and was_pruned(status):  # Ctrl-C came before it had ended
                self.study.tell(trial, state=TrialState.PRUNED)
            elif trial.params.keys() == self.space.keys():
                yield from self._job_of(trial)
            else:  # while its values were drawn
                self.study.tell(trial, state=TrialState.FAIL)
        while len(self.study.trials) < self.n_trials:
            yield from self._job_of(self.study.ask({**self.space}))

    def watch(self, job: Job) -> str | None:
        """Reports new validations to the study; returns a reason to stop, if there is one."""
        file = job.folder / METRICS_FILE
        self._metric_logged = self._metric_logged or self._logged_by_first(file)
        newest = read_newest(file, self.metric) if self._metric_logged else None
        if newest is None or newest[0] == self._newest_steps.get(job.folder):
            return None
        self._newest_steps[job.folder] = newest[0]
        trial = self._trials[job.folder][0]
        reported = self.study.trials[trial.number].intermediate_values
        for row in (row for row in read_metrics(file) if LOSS in row):
            step, value = int(row["step"]), row.get(self.metric, math.nan)
            if step in reported or not math.isfinite(value):
                continue
            trial.report(value, step)
            if trial.should_prune():
                return f"{PRUNED}: {self.metric} {value:.4f} at step {step} is above the median"
        return None

    def _logged_by_first(self, file: Path, *, ended: bool = False) -> bool:
        """Whether the first validation has logged the metric; False while it may still do so.

        Raises:
            UserError: it has not, although the run continued.
        """
        rows = read_metrics(file) if file.is_file() else []
        first = next((i for i, row in enumerate(rows) if LOSS in row), None)
        if first is None:
            return False
        tags = sorted(tag for tag in rows[first] if not tag.startswith("train/"))
        # Callbacks add to the row of a validation after its loss.
        if self.metric not in tags and (ended or first < len(rows) - 1):
            raise UserError(
                f"--metric {self.metric} was not logged by the first validation: "
                f"{suggestion(self.metric, tags)}"
            )
        return self.metric in tags

    def ended(self, job: Job) -> None:
        """Reports a trial's result to the study; an interrupted trial stays open."""
        from optuna.trial import TrialState

        status = read_status(job.folder) or {"state": "pending"}
        done = status["state"] == "done"
        if done and not self._metric_logged:
            self._metric_logged = self._logged_by_first(job.folder / METRICS_FILE, ended=True)
        for trial in self._trials.pop(job.folder):
            value = _result(job.folder, self.metric) if done else math.nan
            if math.isfinite(value):
                self.study.tell(trial, value)
            elif was_pruned(status):
                self.study.tell(trial, state=TrialState.PRUNED)
            elif status["state"] != "interrupted":
                self.study.tell(trial, state=TrialState.FAIL)

    def _job_of(self, trial: Trial) -> Iterator[Job]:
        """The trial's job; none if the same job has run, or runs, for another trial."""
        from optuna.trial import TrialState

        # In the order in which the ranges are typed.
        values = {key: str(trial.params[key]) for key in self.space}
        overrides = [*(f"{key}={value}" for key, value in values.items()), *self.fixed]
        (planned,) = self._plan.add([overrides], varied=list(self.space))
        folder = self.folder / planned.folder
        trial.set_user_attr("folder", planned.folder)
        if folder in self._trials:
            self._trials[folder].append(trial)
            return
        finished = (other for other in self.study.trials if other.state.is_finished())
        by_folder = {other.user_attrs.get("folder"): other for other in finished}
        if twin := by_folder.get(planned.folder):
            # A pruned trial's value is its last one in training, which only a new trial reports.
            value = twin.value if twin.state == TrialState.COMPLETE else None
            self.study.tell(trial, value, state=twin.state)
            return
        self._plan.write(self.command)
        self._trials[folder] = [trial]
        labels = [
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in trial.params.items()
        ]
        job, _ = _job(folder, overrides, labels, config_dir=self.config_dir)
        yield replace(job, overrides=planned.overrides)


def check(
    folder: Path, space: Space, fixed: Sequence[str], *, config_dir: Path | None = None
) -> tuple[list[Job], int]:
    """Checked jobs with every choice and both bounds of every range, and the most optimizer steps
    of a trial.

    Raises:
        UserError: an override does not match the config.
    """
    jobs, steps = [], 0
    first_values = {key: examples(domain)[0] for key, domain in space.items()}
    for key, domain in space.items():
        for example in examples(domain):
            values = {**first_values, key: example}
            overrides = [*(f"{k}={v}" for k, v in values.items()), *fixed]
            job, own_steps = _job(folder / "trial", overrides, config_dir=config_dir)
            jobs.append(job)
            steps = max(steps, own_steps)
    return jobs, steps


def _job(
    folder: Path, overrides: Sequence[str], labels: Sequence[str] = (), *, config_dir: Path | None
) -> tuple[Job, int]:
    """A trial's job, and its optimizer steps in the config."""
    settled = settle(compose_run(overrides, config_dir), folder)
    check_config.check(settled, "config")
    job = job_of(settled, folder, overrides, labels=labels, config_dir=config_dir)
    return job, settled["trainer"]["max_steps"]


def _open_study(folder: Path, *, warmup: int | None, seed: int) -> Study:
    """The study in the folder; no trial is pruned before step ``warmup``, or none if it is None."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruners = optuna.pruners
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / STUDY_FILE}")
    names = optuna.get_all_study_names(storage)  # by the folder's name when the search began
    study = optuna.create_study(
        storage=storage,
        study_name=names[0] if names else folder.name,
        load_if_exists=True,
        pruner=pruners.NopPruner() if warmup is None else pruners.MedianPruner(5, warmup),
    )
    # A sampler that starts again must not repeat its first values. Running trials count as bad, so
    # that parallel trials explore elsewhere.
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials), constant_liar=True)
    return study


def _result(folder: Path, metric: str) -> float:
    try:
        return float(read_json(folder / SUMMARY_FILE)[metric])
    except (OSError, ValueError, KeyError, TypeError):
        return math.nan


def report(search: Search) -> int:
    """Prints the best trials and those that failed; returns the exit code."""
    from optuna.trial import TrialState

    trials = search.study.trials
    count = Counter(trial.state for trial in trials)
    print(
        f"{len(trials)} trials: {count[TrialState.COMPLETE]} complete, "
        f"{count[TrialState.PRUNED]} pruned, {count[TrialState.FAIL]} failed"
    )
    failed = [trial.user_attrs.get("folder") for trial in trials if trial.state == TrialState.FAIL]
    for name in filter(None, dict.fromkeys(failed)):  # equal values share a folder
        folder = search.folder / name
        reason = read_status(folder).get("reason")
        print(f"failed: {folder}: {reason or f'its {search.metric} is not a finite number'}")
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    different = {trial.user_attrs.get("folder"): trial for trial in complete}.values()
    for trial in sorted(different, key=lambda t: float(t.value or 0))[:5]:
        values = " ".join(f"{key}={value}" for key, value in trial.params.items())
        print(f"{search.metric} {trial.value:.4f}  {values}")
    return 0 if complete else 1


def main(
    arguments: Sequence[str] | None = None, *, program: str = "python -m sweeps.search"
) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parser(program).parse_intermixed_args(arguments)
    with readable_errors():
        if args.trials < 1:
            raise UserError(f"--trials must be at least 1, not {args.trials}.")
        require_package("optuna", what="sweeps.search", extra="search")
        space, fixed = parse(literal(["-m", *args.overrides])[1:])
        refuse_run_folder(fixed, "leave it out, since every trial has one in the search's folder")
        folder = Path(args.folder).absolute()
        if "?" in str(folder) or "%" in str(folder):
            raise UserError(
                f"{folder} has a ? or % in its path, which the address of a study's file cannot "
                "hold: choose another folder."
            )
        config_dir = args.config_dir and args.config_dir.absolute()
        checked, steps = check(folder, space, fixed, config_dir=config_dir)
        pool = make_pool(checked, devices=args.devices, n_jobs=args.n_jobs)
        busy = f"Another search is at work in {folder}: wait, or stop it."
        with alone(folder, busy, "The same command continues."), _errors_of_study(folder):
            search = Search(
                folder=folder,
                space=space,
                fixed=fixed,
                metric=args.metric,
                n_trials=args.trials,
                warmup=None if args.no_pruning else steps // 4,
                seed=args.seed,
                config_dir=config_dir,
                command=[program, *arguments],
            )
            ended = sum(trial.state.is_finished() for trial in search.study.trials)
            pool.display.total = max(args.trials - ended, 0)
            pool.display.estimates = False  # some trials are stopped early
            pool.run(search.jobs(), watch=search.watch, ended=search.ended)
        code = report(search)
    sys.exit(code)


@contextmanager
def _errors_of_study(folder: Path) -> Iterator[None]:
    """Turn an error of the study's file into a sentence."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import DBAPIError

    try:
        yield
    except (DBAPIError, StorageInternalError) as error:
        raise UserError(
            f"{folder / STUDY_FILE} cannot be used ({getattr(error, 'orig', error)}): close other "
            "programs that use it, or choose another folder."
        ) from error


def _parser(program: str) -> argparse.ArgumentParser:
    parser = Parser.of(__doc__, module="sweeps.search", program=program)
    parser.add_argument("folder", help="folder of the search; an existing search continues")
    parser.add_argument("overrides", nargs="+", metavar="KEY=RANGE", help="and fixed KEY=VALUE")
    more = "a folder with more configs"
    parser.add_argument("--config-dir", type=typed_folder, metavar="FOLDER", help=more)
    parser.add_argument("--trials", type=int, default=20, help="total number (default 20)")
    parser.add_argument("--metric", default=LOSS, help=f"to minimize (default {LOSS})")
    parser.add_argument("--n-jobs", type=int, help="trials at once, as hydra.launcher.n_jobs")
    gpus = "auto, cpu or GPUs: 0,1"
    parser.add_argument("--devices", type=typed_devices, default="auto", help=gpus)
    parser.add_argument("--no-pruning", action="store_true", help="let every trial finish")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler (default 0)")
    return parser


if __name__ == "__main__":
    main()
