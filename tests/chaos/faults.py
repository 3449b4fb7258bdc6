"""Faults of the machine: NaN, files that change during a run, clocks that jump, a run folder that
vanishes or becomes read-only, two runs in one folder."""

from __future__ import annotations

import errno
import math
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtp_lightning.module import MTPModule
from tests.chaos.cases import Attempt, Case, hold
from tests.chaos.given import AS_TOKENS, Finished
from tests.chaos.jobs import SMALL, same_runs, whole_files
from tests.chaos.kills import refusing
from tests.chaos.processes import Change, Ended, Process, run
from tests.integration.helpers import overrides, rows, weights

STEPS = int(SMALL["trainer.max_steps"])


def cases(folder: Path) -> list[Case]:
    """One case for each fault."""
    cache = folder / "cache"
    whole = Finished(folder / "finished", cache)
    made: dict[str, Attempt] = {}
    for place in ("the forward pass", "the backward pass", "the optimizer's state"):
        for value in (math.nan, math.inf):
            made[f"{value} in {place}"] = partial(_not_finite, place, value, whole)
    made["nan on one rank of two"] = partial(_not_finite_on_one_rank, cache)
    for what in ("shrinks", "vanishes", "changes"):
        made[f"a file of tokens {what} under a run"] = partial(_data, what, cache)
    made["clocks that jump"] = partial(_clocks, whole)
    made["a folder that vanishes"] = partial(_vanishing, whole)
    made["two runs at once"] = partial(_two_at_once, whole)
    made["a folder that becomes read-only"] = partial(_read_only, whole)
    return [Case("faults", name, attempt, several="rank" in name) for name, attempt in made.items()]


def _resumes(whole: Finished, folder: Path) -> None:
    """Hold that a run in ``folder/run``, started again, ends as the whole one."""
    again = run(whole.arguments(folder / "run"), folder / "log")
    hold(again.code == 0, f"started again it ends with {again.code}: {again.out[-1500:]}")
    same_runs(folder / "run", whole.run)


def one_sentence(ended: Ended, *, naming: str) -> None:
    """Hold that it ended with code 1 and one error line with the words of ``naming``."""
    ended.require(1)
    hold(len(ended.errors) == 1 and naming in ended.errors[0], f"it says {ended.errors}")


def _around_steps(around: Callable[[Callable[[], Any], MTPModule], Any]) -> Change:
    """Have every training step of this process go through a function of the step and its module."""

    def change() -> None:
        train = MTPModule.training_step

        def training_step(self: MTPModule, batch: Any, batch_idx: int) -> Any:
            return around(lambda: train(self, batch, batch_idx), self)

        MTPModule.training_step = training_step  # type: ignore[method-assign]

    return change


def _inject(place: str, value: float, step: int) -> Change:
    """Put a value into one number of a step of this process."""

    def hit(tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            tensor.detach().view(-1)[0] = value

    def around(train: Callable[[], Any], module: MTPModule) -> Any:
        if module.trainer.global_step != step:
            return train()
        weight = module.model.trunk.blocks[0].attention.out.weight
        if place == "the forward pass":
            handle = module.model.trunk.register_forward_hook(
                lambda trunk, given, out: hit(out[0] if isinstance(out, tuple) else out.final)
            )
        elif place == "the backward pass":
            handle = weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), value))
        else:
            optimizer = module.optimizers().optimizer  # type: ignore[union-attr]
            hit(optimizer.state[weight]["exp_avg"])
            return train()
        try:
            return train()
        finally:
            handle.remove()

    return _around_steps(around)


def _not_finite(
    place: str, value: float, whole: Finished, folder: Path, chance: random.Random
) -> str:
    step = chance.randint(6, STEPS - 8)
    ended = run(whole.arguments(folder / "run"), folder / "log", change=_inject(place, value, step))
    one_sentence(ended, naming="not finite")
    _all_finite(folder / "run")
    _resumes(whole, folder)
    return f"in step {step + 1}"


def _not_finite_on_one_rank(cache: Path, folder: Path, chance: random.Random) -> str:
    more = {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.max_steps": 12}
    arguments = ["train.py", *overrides(cache, {**SMALL, **more})]
    # The change applies to rank 0 alone: rank 1 is another process.
    change = _inject("the forward pass", math.nan, 6)
    ended = run([*arguments, f"run_dir={folder / 'run'}"], folder / "log", change=change)
    hold(not ended.timed_out, "the ranks wait for each other")
    hold(ended.code == 1 and "not finite" in ended.out, f"code {ended.code}: {ended.out[-1500:]}")
    _all_finite(folder / "run")
    again = run([*arguments, f"run_dir={folder / 'run'}"], folder / "log")
    hold(again.code == 0, f"started again it ends with {again.code}: {again.out[-1500:]}")
    return "both ranks ended"


def _all_finite(folder: Path) -> None:
    whole_files(folder)
    for file in (folder / "checkpoints").glob("*.ckpt"):
        for name, tensor in weights(folder, file.name).items():
            finite = not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
            hold(finite, f"{file.name} holds {name} that is not finite")


def _data(what: str, cache: Path, folder: Path, chance: random.Random) -> str:
    """A memory-mapped file of tokens changes while a run reads it."""
    ids = np.random.default_rng(chance.randrange(2**32)).integers(0, 250, 400_000)
    file = folder / "tokens.npy"
    np.save(file, ids.astype(np.uint16))
    settings = {
        **SMALL, **AS_TOKENS, "data.path": file, "data.held_out": 0.05,
        "tokenizer.vocab_size": 256, "tokenizer.eot_id": 255, "data.eval_bytes": None,
        "trainer.max_steps": 400, "trainer.val_check_interval": 100,
    }  # fmt: skip
    arguments = ["train.py", *overrides(cache, settings), f"run_dir={folder / 'run'}"]
    process = Process(arguments, folder / "log")
    while not process.ended() and _steps(folder / "run") < 20:
        time.sleep(0.05)
    hold(not process.ended(), f"it ended early: {process.log.read_text()[-1500:]}")
    if what == "vanishes":
        file.unlink()
    else:
        with file.open("r+b") as handle:
            if what == "shrinks":
                handle.truncate(4096)
            else:
                handle.seek(4096)
                handle.write(bytes(200_000))
    ended = process.end(timeout=200)
    ended.require(0, 1)
    if what != "vanishes" or ended.code:  # an open file outlives its name
        one_sentence(ended, naming=str(file))
    whole_files(folder / "run")
    return f"code {ended.code}"


def _steps(folder: Path) -> int:
    return len(rows(folder)) if (folder / "metrics.csv").is_file() else 0


def _clocks(whole: Finished, folder: Path, chance: random.Random) -> str:
    """All clocks of Python jump to and fro, by up to a year."""
    jumps = random.Random(chance.random())

    def change() -> None:
        for name in ("time", "monotonic", "perf_counter"):
            real = getattr(time, name)
            setattr(time, name, lambda real=real: real() + jumps.uniform(-3e7, 3e7))

    ended = run(whole.arguments(folder / "run"), folder / "log", change=change, timeout=300)
    ended.require(0)
    same_runs(folder / "run", whole.run)
    return "the same numbers"


def _vanishing(whole: Finished, folder: Path, chance: random.Random) -> str:
    process = Process(whole.arguments(folder / "run"), folder / "log")
    until = chance.randint(3, STEPS - 10)
    while not process.ended() and _steps(folder / "run") < until:
        time.sleep(0.01)
    shutil.rmtree(folder / "run", ignore_errors=True)
    ended = process.end()
    ended.require(0, 1)
    if ended.code:
        one_sentence(ended, naming="run")
    return f"code {ended.code}"


def _read_only(whole: Finished, folder: Path, chance: random.Random) -> str:
    """From some operation on, nothing can be synced, linked or renamed."""
    n = chance.randint(20, 100)
    change = refusing(n, errno.EROFS)
    ended = run(whole.arguments(folder / "run"), folder / "log", change=change)
    one_sentence(ended, naming="Read-only")
    whole_files(folder)
    _resumes(whole, folder)
    return f"from operation {n} on"


def _waiting_for(file: Path, *, step: int) -> Change:
    """Hold this process at a step until a file is there."""

    def around(train: Callable[[], Any], module: MTPModule) -> Any:
        while module.trainer.global_step == step and not file.exists():
            time.sleep(0.01)
        return train()

    return _around_steps(around)


def _two_at_once(whole: Finished, folder: Path, chance: random.Random) -> str:
    second_ended = folder / "second-ended"
    arguments = whole.arguments(folder / "run")
    first = Process(arguments, folder / "first.log", change=_waiting_for(second_ended, step=4))
    while not first.ended() and _steps(folder / "run") < 2:
        time.sleep(0.01)
    second = run(arguments, folder / "second.log")
    second_ended.touch()
    one_sentence(second, naming=str(folder / "run"))
    ended = first.end()
    hold(ended.code == 0, f"the first ends with {ended.code}: {ended.out[-1500:]}")
    same_runs(folder / "run", whole.run)
    return "the second was refused"
