"""Finds the checkpoint of one optimizer step of a run."""

from __future__ import annotations

from pathlib import Path

from mtp_lightning.errors import UserError
from mtp_lightning.run import checkpoints
from mtp_lightning.run.layout import CHECKPOINTS, kept_at


def checkpoint_of_step(text: str) -> Path:
    """Find the checkpoint that ``RUN@STEP`` names.

    Raises:
        FileNotFoundError: the run does not exist.
        UserError: the text has another form, or the run has no intact checkpoint of that step.
    """
    run, _, number = text.rpartition("@")
    if not run or not number.isascii() or not number.isdigit() or len(number) > 18:
        raise UserError(
            f"{text} names no checkpoint: give a run's folder and an optimizer step, as in "
            "runs/long@600."
        )
    folder, step = Path(run) / CHECKPOINTS, int(number)
    if not folder.is_dir():
        raise FileNotFoundError(f"{text}: there is no run in {run}.")
    kept = folder / kept_at(step)
    if checkpoints.inspect(kept)[1] == step:
        return kept
    # This is slow: it reads all checkpoints whole, for their checksums.
    by_step = {checkpoints.inspect(path)[1]: path for path in sorted(folder.glob("*.ckpt"))}
    if step not in by_step:
        steps = ", ".join(str(n) for n in sorted(by_step) if n >= 0) or "none"
        raise UserError(
            f"{text}: that run has no intact checkpoint of step {step} (there are: {steps}); "
            f"callbacks.checkpoints.keep_steps=[{step}] keeps one."
        )
    return by_step[step]
