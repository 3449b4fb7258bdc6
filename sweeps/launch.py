"""Common parts of all launchers: checks before any job starts, skipping, and the final report.

Hydra's sweeper passes the jobs of a sweep; launchers differ only in the function that runs the jobs
that are not done yet.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from mtp_lightning.command_line import check_config
from mtp_lightning.command_line.conf_comments import groups
from mtp_lightning.command_line.keys import NEEDS, require_allowed
from mtp_lightning.command_line.shell import program as typed
from mtp_lightning.command_line.shell import readable_errors, this_program
from mtp_lightning.errors import UserError, counted, require_package
from mtp_lightning.run.config import affects_training, flatten, key_of, read_yaml
from mtp_lightning.run.layout import CONFIG_FILE, SUMMARY_FILE
from mtp_lightning.run.status import describe_failure, read_status, state_of, write_status
from mtp_lightning.stored import read_json
from sweeps.compose import Composer, settle
from sweeps.interrupts import alone
from sweeps.lease import live
from sweeps.plan import (
    Recipe,
    SweepPlan,
    must_run,
    name_of_program,
    refuse_run_folder,
    varied_labels,
)
from sweeps.process import Job, refuse_several_machines

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader

RunJobs = Callable[[list[Job]], None]
Configs = dict[Job, dict[str, Any]]

# Hydra's settings that are about the sweep and not about a job.
_SWEEP_SETTINGS = (
    "hydra/launcher",
    "hydra.launcher",
    "hydra/sweeper",
    "hydra.sweep",  # and hydra.sweeper
    "hydra.mode",
    "hydra.run",
)


def launch(
    module: str | None,
    settings: Mapping[str, Any],
    *,
    config: DictConfig,
    loader: ConfigLoader,
    batch: Sequence[Sequence[str]],
    dry_run: bool,
) -> list[JobReturn]:
    """Runs the jobs of a sweep that are not done, and reports the results of all. Returns an entry
    per job, with its final validation loss; none for jobs that are not run here.

    Args:
        module: the launcher's module, whose ``run`` runs jobs, each to its end; their status files
            say how they ended. None leaves them to workers.
        settings: keyword arguments of ``run``.
        config: the sweep's own config.
        loader: Hydra's, which composes the jobs' configs.
        batch: every job's overrides.
        dry_run: only check and list the jobs (``--dry-run``), and write nothing.

    Raises:
        SystemExit: 1 if a job did not finish or something was wrong with the sweep; 128 + the
            signal's number if it was interrupted.
    """
    with readable_errors():
        plan = SweepPlan(Path(config.hydra.sweep.dir).absolute())
        run = None if module is None else _runner(module, settings, config)
        configs = _checked(plan, config, loader, batch)
        if module in (None, "sweeps.pool", "sweeps.ray_cluster"):
            for job in configs:
                refuse_several_machines(job)
        jobs = list(configs)
        if dry_run:
            _show(plan.folder, jobs)
            return []
        _start(run, plan, configs, config)
        if run is None:
            return []
        _say_end(plan.folder, jobs)
        return [_job_return(job) for job in jobs]


def _runner(module: str, settings: Mapping[str, Any], config: DictConfig) -> RunJobs:
    """The function that runs jobs with the launcher's settings, after a check of their values."""
    launcher = config.hydra.runtime.choices["hydra/launcher"]
    if option := groups()["hydra/launcher"].get(launcher):
        if needs := NEEDS.search(option.comment):
            require_package(needs[1], what=f"hydra/launcher={launcher}", extra=needs[2])
        for key in option.keys:
            if key.name in settings:
                require_allowed(f"hydra.launcher.{key.name}", settings[key.name], key.comment)
    try:
        run = import_module(module).run
    except (ImportError, AttributeError) as error:
        raise UserError(f"hydra.launcher.module={module} cannot be used: {error}.") from error
    return partial(run, **settings)


def _checked(
    plan: SweepPlan, config: DictConfig, loader: ConfigLoader, batch: Sequence[Sequence[str]]
) -> Configs:
    """Adds a batch of jobs to a plan, and checks their configs, which it returns."""
    if config.hydra.sweeper.get("max_batch_size") is not None:
        raise UserError(
            "hydra.sweeper.max_batch_size would start jobs before the later ones are checked: "
            "leave it out; hydra.launcher.n_jobs sets how many run at once."
        )
    for overrides in batch:
        refuse_run_folder(overrides, "give sweep_dir=..., the folder of the sweep")
    planned_jobs = plan.add(batch)
    # They do not change results, so jobs that differ only in them are one.
    paths = [o for o in batch[0] if key_of(o).startswith("paths.")]
    labels = varied_labels(planned_jobs)
    options, program = [*_options(config), *paths], name_of_program()
    composer = Composer(config, loader)
    configs: Configs = {}
    for planned in planned_jobs:
        run_folder = plan.folder / planned.folder
        overrides = [*paths, *planned.overrides]
        job_config = settle(composer.compose(overrides), run_folder)
        check_config.check(job_config, "config", overrides)
        planned.recipe = Recipe.of(job_config, program=program, options=options)
        job = planned.recipe.job(
            run_folder, planned.overrides, labels=labels[planned.folder], program=this_program()
        )
        configs[job] = job_config
    return configs


def _start(run: RunJobs | None, plan: SweepPlan, configs: Configs, config: DictConfig) -> None:
    """Stores the plan and the sweep's own config (``multirun.yaml``, as Hydra does), and runs the
    jobs that are not done, or leaves them to workers."""
    folder, folder_text = plan.folder, _shown(plan.folder)
    busy = f"Another sweep is at work in {folder}: wait for it, or stop it."
    with alone(folder, busy, f"The same command with sweep_dir={folder_text} continues."):
        if run is not None and live(folder):
            raise BlockingIOError(
                f"Workers are at work in {folder}: wait for them, or plan with hydra/launcher=plan."
            )
        plan.write([typed(Path(sys.argv[0]).stem), *sys.argv[1:]])
        OmegaConf.save(config, folder / "multirun.yaml")
        retry_failed = OmegaConf.select(config, "sweep.retry_failed")
        todo = [job for job in configs if must_run(job.folder, retry_failed=retry_failed)]
        _say_plan(folder, configs, todo)
        for job in todo:
            failed = run is None and state_of(job.folder) == "failed"
            if failed or not read_status(job.folder):
                write_status(job.folder, job.overrides, "pending")
        if run is None:
            print(f"planned: start any number of workers with python -m sweeps.work {folder_text}")
        elif todo:
            run(todo)


def _show(folder: Path, jobs: Sequence[Job]) -> None:
    """Print every job of a sweep that is not started."""
    text = f"{counted(len(jobs), 'job')} in {_shown(folder)}"
    print(f"{text}: the checks pass, and nothing is started (--dry-run):")
    width = max(len(job.name) for job in jobs)
    for job in jobs:
        text = job.steps_in_words
        if (n := job.processes * job.nodes) > 1:
            text += f", {n} processes"
        if (state := state_of(job.folder)) != "pending":
            text += f", {state}"
        print(f"  {job.name:{width}}  {text}")


def _options(config: DictConfig) -> list[str]:
    """The options of every job's command line: this call's config and Hydra settings."""
    hydra = config.hydra
    options: list[str] = []
    if hydra.job.config_name != "config":
        options += ["--config-name", str(hydra.job.config_name)]
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            options += ["--config-dir", str(source.path)]
    job_options = (o for o in hydra.overrides.hydra if not key_of(o).startswith(_SWEEP_SETTINGS))
    return [*options, *job_options]


def _say_plan(folder: Path, configs: Configs, todo: Sequence[Job]) -> None:
    text = f"{counted(len(configs), 'job')} in {_shown(folder)}"
    pending = set(todo)
    skipped = [job for job in configs if job not in pending]
    for state in ("done", "failed"):
        n = sum(state_of(job.folder) == state for job in skipped)
        text += f", {n} {state} before" if n else ""
    n_continued = sum(state_of(job.folder) in ("interrupted", "running") for job in todo)
    text += f", {n_continued} to be continued" if n_continued else ""
    print(text, flush=True)
    for job in skipped:
        if changed := _changed_settings(configs[job], job.folder):
            state = state_of(job.folder)
            print(f"warning: {job.name} ({state}) ran with other settings: {changed}", flush=True)


def _changed_settings(config: dict[str, Any], folder: Path) -> str:
    """The settings of a finished run's ``config.yaml`` that this call would change."""
    try:
        stored = read_yaml(folder / CONFIG_FILE)
    except (OSError, UserError):
        return ""
    old = flatten(stored) if isinstance(stored, dict) else {}
    new = flatten(config)
    folder_text = str(folder)
    changed = [
        f"{key} was {old[key]}, is {new[key]}"
        for key in filter(affects_training, old.keys() & new.keys())
        # The run decided what "auto" meant.
        if new[key] not in (old[key], "auto") and folder_text not in str(new[key])
    ]
    return "; ".join(sorted(changed))


def _say_end(folder: Path, jobs: Sequence[Job]) -> None:
    """Prints that all is well, or every job that is not done with its log; then exits with 1."""
    states = {job: state_of(job.folder) for job in jobs}
    unfinished = [job for job, state in states.items() if state != "done"]
    done = f"{counted(len(jobs), 'job')} done in {_shown(folder)}"
    if not unfinished:
        print(f"{done}; python -m sweeps.report {_shown(folder)} compares them", flush=True)
        return
    retry = " sweep.retry_failed=true" if "failed" in states.values() else ""
    print(
        f"{len(jobs) - len(unfinished)} of {done}; "
        f"the same command with sweep_dir={_shown(folder)}{retry} tries the others again:",
        *(describe_failure(job.folder) for job in unfinished),
        sep="\n",
        flush=True,
    )
    raise SystemExit(1)


def _shown(folder: Path) -> str:
    """The folder as it would be typed."""
    cwd = Path.cwd()
    return shlex.quote(str(folder.relative_to(cwd) if folder.is_relative_to(cwd) else folder))


def _job_return(job: Job) -> JobReturn:
    result = JobReturn(
        overrides=list(job.overrides), working_dir=str(Path.cwd()), status=JobStatus.COMPLETED
    )
    result.return_value = read_json(job.folder / SUMMARY_FILE).get("val/loss_depth_0")
    return result
