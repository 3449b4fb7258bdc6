"""Branching: a run that continues another run's state in its own folder, under other schedules.

One long run at a constant learning rate, with a branch that decays at each budget, costs about half
as much as a separate run for each budget (Haegele et al. 2024, arXiv 2405.18392).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from mtp_lightning.errors import UserError
from mtp_lightning.experiment.instantiate import instantiate, rebuild
from mtp_lightning.objective.schedule.base import LambdaSchedule, Progress
from mtp_lightning.run.config import NOT_TRAINING, describe_differences

# Keys that a branch may change: those of later steps, and of logging and callbacks.
_FREE = (
    *(*NOT_TRAINING, "callbacks", "branch_from"),
    *("optimizer.schedule", "lambda_schedule", "mtp_lambda"),
    *("trainer.max_steps", "trainer.val_check_interval", "trainer.log_every_n_steps"),
)
# Groups of conf/ whose classes a stored schedule may be built from.
_SCHEDULES = ("optimizer", "lambda_schedule")
# The most steps at which the schedules are compared, spread evenly over the steps done.
_COMPARED = 10_000


def check_branch(stored: dict[str, Any], cfg: DictConfig, *, allow: Collection[str] = ()) -> None:
    """Refuse a branch whose config would have trained the steps done so far differently than the
    checkpoint ``stored``, whose schedules may use classes of the packages in ``allow``.

    Raises:
        UserError: a setting other than a schedule differs, or a schedule gives other values in the
            steps that are done.
    """
    begin = f"branch_from={cfg.branch_from} cannot be continued"
    if (match := stored["config"].get("compare", {}).get("match", "none")) != "none":
        raise UserError(
            f"{begin}: compare.match={match} set that run's length or layers. Use its weights by "
            "init_from, or branch from a run of compare.match=none."
        )
    if cfg.compare.match != "none":
        raise UserError(
            f"{begin} with compare.match={cfg.compare.match}, which sets a run's length or layers: "
            "set compare.match=none and trainer.max_steps."
        )
    now = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(now, dict)
    differences = describe_differences(stored["config"], now, ignore=_FREE)  # type: ignore[arg-type]
    if differences:
        raise UserError(
            f"{begin}: a branch may change schedules, length, callbacks and loggers alone, and "
            f"this one changes {'; '.join(differences)}. Start a new run, or use the weights by "
            "init_from."
        )
    step = int(stored["global_step"])
    old_steps, new_steps = stored["config"]["trainer"]["max_steps"], cfg.trainer.max_steps
    if new_steps <= step:
        raise UserError(
            f"{begin} with trainer.max_steps={new_steps}: step {step} is done, so give more."
        )
    for key in ("balance.frozen", "model.feed_forward.bias_frozen"):
        share = OmegaConf.select(cfg, key) or 0
        unfrozen = round((1 - share) * min(old_steps, new_steps), 6)  # the first steps of both
        if old_steps != new_steps and step > unfrozen:
            raise UserError(
                f"{begin}: {key}={share} freezes the last share of a run, and of {old_steps} or "
                f"{new_steps} steps in all, steps before {step} would be frozen in one alone. "
                "Branch from an earlier step."
            )
    _require_same_schedules(stored, cfg, allow, begin)


def _require_same_schedules(
    stored: dict[str, Any], cfg: DictConfig, allow: Collection[str], begin: str
) -> None:
    """Refuse schedules that give other values than the stored ones in the steps that are done."""
    old_config = OmegaConf.create(stored["config"])
    done, tokens = int(stored["global_step"]), stored["progress"]["tokens"]
    rates = (
        rebuild(old_config.optimizer.schedule, allow=allow, groups=_SCHEDULES),
        instantiate(cfg.optimizer.schedule),
    )
    lambdas: tuple[LambdaSchedule, LambdaSchedule] = (
        rebuild(old_config.lambda_schedule, allow=allow, groups=_SCHEDULES),
        instantiate(cfg.lambda_schedule, kind=LambdaSchedule),
    )
    lengths = old_config.trainer.max_steps, cfg.trainer.max_steps
    for step in np.linspace(0, done - 1, min(done, _COMPARED)).astype(int).tolist():
        old, new = (rate(step, length) for rate, length in zip(rates, lengths, strict=True))
        if old != new:
            raise UserError(
                f"{begin}: the learning rate of step {step} was {old:.6g} of its peak, and under "
                f"this run's schedule it would have been {new:.6g}. Give a schedule that agrees "
                "up to there: optimizer.schedule.warmup_steps rather than a fraction, and a decay "
                "that begins later."
            )
        tokens_read = step * tokens // done  # by the mean of a step
        old_lambdas, new_lambdas = (
            schedule.lambdas(Progress(step=step, max_steps=length, tokens=tokens_read))
            for schedule, length in zip(lambdas, lengths, strict=True)
        )
        if old_lambdas != new_lambdas:
            raise UserError(
                f"{begin}: the lambdas of step {step} were {old_lambdas}, and under this run's "
                f"schedule they would have been {new_lambdas}. Give a schedule that agrees up to "
                "there, such as lambda_schedule=knots in steps."
            )
