"""Random weights in every step: a control for adaptive rules (Lin et al. 2022, arXiv 2111.10603).

    w = K softmax(z),    z ~ N(0, I)

over the K tasks, the main prediction included as in the source. The factor K, which the source does
not have, makes their mean 1, as for the other rules. An adaptive rule is worth its cost only if it
gains more over fixed weights than this one. The draw depends only on the seed and the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mtp_lightning.nn.init import generator
from mtp_lightning.objective.balance.base import Balance, multiplied, softmax_weights
from mtp_lightning.objective.plan import tasks_of
from mtp_lightning.objective.schedule.base import Progress


@dataclass(eq=False, kw_only=True)
class RandomWeights(Balance):
    """``balance=random``, drawn from the run's ``seed``."""

    name = "random"
    weighs_main = True
    observes = False

    seed: int

    def factors(self, lambdas: Sequence[float], progress: Progress) -> list[float]:
        rng = generator(self.seed, f"balance:{self.name}:{progress.step}")
        scores = torch.randn(self.depth + 1, dtype=torch.float64, generator=rng)
        return multiplied(lambdas, softmax_weights(scores, tasks_of(lambdas)))
