"""Quick training runs, and readers of their files."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from data_modules.tasks import answers as tasks
from mtp_lightning.command_line.shell import readable_errors
from mtp_lightning.run.checkpoints import load
from mtp_lightning.run.metrics import read_metrics, read_newest
from tests.warm import HEAVY, Done, warm

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"

# The examples on which a task counts how many of its questions training has seen: the 16,384 of a
# user's run would take longer than a quick run.
tasks.TRIED = 256


def typed(text: str) -> dict[str, Any]:
    """Settings from ``KEY=VALUE KEY=VALUE``; a KEY alone is None, which leaves the setting out."""
    pairs = (word.partition("=") for word in text.split())
    values = {key: value if equals else None for key, equals, value in pairs}
    return {k: int(v) if v is not None and v.isdecimal() else v for k, v in values.items()}


# A real run of a fraction of a second. It sets every value that the tests depend on, so that the
# main job's defaults may change.
QUICK = typed("""
    data=synthetic data.source.size=60000 data.source.documents=120 data.val_fraction=0.05
    data.eval_bytes=400 data.eval_batch_size=16 data.seq_len=16 data.batch_size=4 tokenizer=byte
    model.d_model=32 model.n_layers=1 model.n_heads=2 model.n_kv_heads=1 model.d_ff=48
    mtp=sequential mtp.depth=2 mtp_lambda=0.3 lambda_schedule=deepseek_v3 optimizer.lr=0.003
    callbacks.checkpoints.every_n_steps=100 callbacks.throughput.measure_matmul=false logger=csv
    trainer.max_steps=10 trainer.val_check_interval=5 trainer.log_every_n_steps=1
    trainer.num_threads=1 trainer.accelerator=cpu trainer.gradient_clip_val=1.0
""")

# Leaves out what a run takes from the folder that it starts from (``init_from``).
FROM_FOLDER = {key: None for key in QUICK if key.startswith(("model.", "tokenizer"))}

# Two processes of data-parallel training.
DDP = typed("trainer.devices=2 trainer.strategy=ddp")
# A constant learning rate and constant lambdas.
CONSTANT = typed(
    "lambda_schedule=constant optimizer.schedule.kind=constant "
    "optimizer.schedule.warmup_steps=0 optimizer.schedule.warmup_fraction=null"
)
# Leaves out the keys of text, for a run on a task.
NO_TEXT = typed("data.seq_len data.val_fraction data.eval_bytes tokenizer")
# A quick run on a task.
TASK = NO_TEXT | typed("data=copy data.task.letters=4 data.task.periods=4 data.eval_examples=30")


def overrides(cache: Path, settings: dict[str, Any]) -> list[str]:
    """QUICK with ``settings`` on top, as Hydra's overrides; a setting of None is left out."""
    both = {**QUICK, "paths.cache_dir": cache, **settings}
    if both["data"] != "synthetic":
        both = {k: v for k, v in both.items() if not k.startswith("data.source.") or k in settings}
    return [f"{key}={value}" for key, value in both.items() if value is not None]


def config(run_dir: Path, cache: Path, settings: dict[str, Any] | None = None) -> DictConfig:
    """The composed config of a quick run, for ``train(cfg)`` in this process."""
    arguments = [*overrides(cache, settings or {}), f"paths.output_dir={run_dir}"]
    return composed("config", arguments)


def composed(name: str, arguments: list[str]) -> DictConfig:
    """The config that Hydra composes. Options take most of its time, so the same options are
    composed once, and values are then set as Hydra sets them."""
    keys = {override: override.split("=")[0].lstrip("+~") for override in arguments}
    groups = [o for o, k in keys.items() if (CONF / k).is_dir() or k == "sweeps"]
    cfg = copy.deepcopy(_chosen(name, tuple(groups)))
    values = [_parsed(override) for override in arguments if override not in groups]
    ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
    return cfg


@functools.cache
def _chosen(name: str, groups: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose(name, overrides=list(groups))


@functools.cache
def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


def train_here(
    run_dir: Path, cache: Path, settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A quick run in this process; its summary."""
    from mtp_lightning.experiment.training import train

    return train(config(run_dir, cache, settings))


def evaluated(checkpoint: Path, *more: str) -> dict[str, Any]:
    """The metrics of evaluate.py for a checkpoint, in this process."""
    from mtp_lightning.experiment.evaluating import evaluate

    arguments = [f"checkpoint={checkpoint}", "num_threads=1", "accelerator=cpu", *more]
    return evaluate(composed("evaluate", arguments))


def command(
    run_dir: Path, cache: Path, settings: dict[str, Any] | None = None, *, app: str = "train.py"
) -> list[str]:
    """The command line of the same run."""
    arguments = overrides(cache, settings or {})
    return [sys.executable, str(ROOT / app), *arguments, f"run_dir={run_dir}"]


def environment() -> dict[str, str]:
    """The environment of a run's process: one thread, and no variables of other tests."""
    leaks = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_", "PL_GLOBAL_SEED", "HYDRA_FULL")
    others = {k: v for k, v in os.environ.items() if not k.startswith(leaks)}
    return {**others, "OMP_NUM_THREADS": "1"}


def execute(
    args: list[str],
    cwd: Path | None = None,
    *,
    code: int | None = None,
    imported: tuple[str, ...] = HEAVY,
    seconds: float = 480,
    **more: str,
) -> Done:
    """Run a command of Python to its end.

    Args:
        args: the command.
        cwd: its working directory; by default the checkout.
        code: the exit code to assert, without a traceback; None asserts nothing.
        imported: modules that are imported before it starts.
        seconds: the limit.
        more: variables of its environment.
    """
    assert args[0] == sys.executable
    env = {**environment(), **more}
    done = warm(imported).run(args, cwd=cwd or ROOT, env=env, seconds=seconds)
    if code is not None:
        output = f"{args}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == code and "Traceback" not in output, output
    return done


def train_apart(run_dir: Path, cache: Path, settings: dict[str, Any] | None = None) -> Done:
    """A quick run by the command line, to its end."""
    return execute(command(run_dir, cache, settings), code=0)


def start(args: list[str], log: Path, *, cwd: Path = ROOT, **more: str) -> subprocess.Popen[bytes]:
    """Start a command in the background, with more variables in its environment; both of its
    outputs are appended to ``log``."""
    env = {**environment(), **more}
    with log.open("ab") as file:
        return subprocess.Popen(args, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=cwd)


def kill_at(args: list[str], run_dir: Path, step: int) -> None:
    """Start a run and kill it as soon as it has logged ``step``."""
    run_dir.mkdir(exist_ok=True)
    process = start(args, run_dir / "first.log")
    try:
        wait_for_step(process, run_dir, step)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL


def wait_for_step(
    process: subprocess.Popen[bytes], run_dir: Path, step: int, *, seconds: float = 480
) -> None:
    """Return as soon as ``metrics.csv`` holds ``step``.

    ``read_newest`` ignores a row that is being written, which may begin with the digits of another
    number.
    """
    file = run_dir / "metrics.csv"
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if process.poll() is not None:
            raise AssertionError(f"the run ended (code {process.returncode}) before step {step}")
        newest = read_newest(file, "train/loss")
        if newest is not None and newest[0] >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached in {seconds} s")


def rows(run_dir: Path, *, timing: bool = False) -> list[dict[str, float]]:
    """The rows of ``metrics.csv``, without times and speeds, which no two runs share."""
    timed = ("perf/", "progress/seconds", "decode/speedup", "decode/tokens_per_second")
    return [
        {tag: value for tag, value in row.items() if timing or not tag.startswith(timed)}
        for row in read_metrics(run_dir / "metrics.csv")
    ]


def column(run_dir: Path, tag: str) -> dict[int, float]:
    """One column of ``metrics.csv`` by step."""
    return {int(row["step"]): row[tag] for row in rows(run_dir, timing=True) if tag in row}


def summary_of(run_dir: Path) -> dict[str, Any]:
    """The content of a run's ``summary.json``."""
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


def events(run_dir: Path) -> EventAccumulator:
    """A run's events, read by TensorBoard itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TensorBoard's imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    return EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def checkpoint(run_dir: Path, name: str = "last.ckpt") -> dict[str, Any]:
    """A checkpoint of a run, read by torch alone; one in parts by the product's reader."""
    path = run_dir / "checkpoints" / name
    content = torch.load(path, map_location="cpu", weights_only=True)
    return load(path) if "parts" in content else content


def weights(run_dir: Path, name: str = "last.ckpt") -> dict[str, torch.Tensor]:
    """The weights in a run's checkpoint."""
    return checkpoint(run_dir, name)["state_dict"]


def assert_same_run(a: Path, b: Path) -> None:
    """Both runs logged the same rows and ended with the same state, bit for bit."""
    assert rows(a) == rows(b)
    assert_same_weights(a, b)


def assert_same_weights(a: Path, b: Path) -> None:
    """Both runs ended with the same weights and the same optimizer state, bit for bit."""
    one, other = checkpoint(a), checkpoint(b)
    for key in ("state_dict", "optimizer_states"):
        assert one[key]
        assert_equal(one[key], other[key], key)


def assert_equal(a: Any, b: Any, where: str = "", *, without: Collection[str] = ()) -> None:
    """Nested containers of tensors, bit for bit; ``without`` names keys that are not compared."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - set(without):
            assert_equal(a[key], b[key], f"{where}.{key}", without=without)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_equal(one, other, f"{where}[{i}]", without=without)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


def assert_near_rows(run: Path, reference: Path, *, rel: float = 2e-6) -> None:
    """Every column of every row is near that of another run."""
    actual, expected = rows(run), rows(reference)
    assert [row["step"] for row in actual] == [row["step"] for row in expected] and actual
    for one, other in zip(actual, expected, strict=True):
        # A gain is a small difference of losses, and as exact as they are.
        assert one == {
            tag: pytest.approx(value, rel=rel, abs=rel if "gain" in tag else None)
            for tag, value in other.items()
        }


def fails(
    capfd: pytest.CaptureFixture[str], run_dir: Path, cache: Path, settings: dict[str, Any]
) -> str:
    """Run as the app does, and return its one line of error."""
    from mtp_lightning.experiment.training import train

    capfd.readouterr()
    with pytest.raises(SystemExit) as ended, readable_errors():
        train(config(run_dir, cache, settings))
    assert ended.value.code == 1
    return the_error(capfd.readouterr().err)


def the_error(stderr: str) -> str:
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, stderr
    assert stderr.endswith(f"{lines[0]}\n"), "the error is the last line"
    return lines[0]


def as_it_was_before(run: Path, copy: Path) -> None:
    """Copy a finished run as it was at the checkpoint before its last one."""
    shutil.copytree(run, copy)
    shutil.move(copy / "checkpoints" / "previous.ckpt", copy / "checkpoints" / "last.ckpt")
    (copy / "summary.json").unlink()


def resume_from_previous(run: Path, copy: Path, cache: Path, settings: dict[str, Any]) -> None:
    """Resume a copy of a finished run from the checkpoint before its last one, and assert that it
    becomes the same run."""
    as_it_was_before(run, copy)
    train_here(copy, cache, settings)
    assert_same_run(run, copy)


def train_with(
    folder: Path, cache: Path, callbacks: list[pl.Callback], settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A quick run with further callbacks, before its own."""
    from mtp_lightning.experiment import training

    build = training.build_trainer

    def with_callbacks(*args: Any, **kwargs: Any) -> pl.Trainer:
        trainer = build(*args, **kwargs)
        trainer.callbacks[:0] = callbacks  # type: ignore[attr-defined]
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_trainer", with_callbacks)
        return training.train(config(folder, cache, settings))


def stop_after(folder: Path, cache: Path, settings: dict[str, Any], step: int) -> None:
    """Run up to ``step`` and stop there, as at the end of a time limit: with a checkpoint.

    Lightning validates where it stops: only at a step that validates anyway are the rows the same.
    """
    import lightning.pytorch as pl

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *rest: object) -> None:
            trainer.should_stop = trainer.global_step >= step

    train_with(folder, cache, [Stop()], settings)
