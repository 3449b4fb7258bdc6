"""One MTP depth per step, drawn at random (Stern et al. 2018, arXiv 1811.03115, section 6).

    L = L_0 + lambda_k L_k / p_k    for the one depth k that was drawn with probability p_k

so that the expected gradient is that of all depths together. The main prediction is trained in
every step; Stern et al. draw it with the rest. The draw depends only on the seed and the step.

``loss_ratio`` draws in proportion to ``L_k(t) / L_k(0)`` (the loss ratio of Chen et al. 2018): the
depths that have learned least are trained most. A depth's loss is known only when it is drawn, so
the ratio uses a moving average (decay 0.9) over those steps; it is 1 before the first.

A step saves the computation of the other depths with parallel and linear heads. Of sequential
modules the shallower ones still run, since the drawn depth reads them. With ``parameter_free`` it
saves almost nothing, since all depths share the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtp_lightning.nn.init import generator
from mtp_lightning.objective.balance.base import Balance, Observed
from mtp_lightning.objective.plan import depths_of
from mtp_lightning.objective.schedule.base import Progress
from mtp_lightning.settings import is_number, require

if TYPE_CHECKING:
    from mtp_lightning.mtp.base import MTPConfig

_DECAY = 0.9


@dataclass(eq=False, kw_only=True)
class SampledDepths(Balance):
    """``balance=sampled_depths``.

    Args:
        probabilities: ``uniform``, ``loss_ratio``, or a list of D numbers above 0, which are
            normalized over the depths that the schedule does not switch off.

    Raises:
        UserError: the probabilities are neither of these.
    """

    name = "sampled_depths"
    stored = ("first", "mean")

    seed: int
    probabilities: str | Sequence[float] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        depth, shares = self.depth, self.probabilities
        expected = f"uniform, loss_ratio, or a list of mtp.depth={depth} numbers above 0"
        if isinstance(shares, str):
            fits = shares in ("uniform", "loss_ratio")
        else:
            has_length = isinstance(shares, Sequence) and len(shares) == depth
            fits = has_length and all(is_number(p) and p > 0 for p in shares)
        require(fits, "balance.probabilities", shares, expected)
        # L_k(0), and the moving average of L_k; NaN before a depth was drawn.
        self._first = torch.full((depth + 1,), torch.nan, dtype=torch.float64)
        self._mean = torch.full((depth + 1,), torch.nan, dtype=torch.float64)

    def chances(self, lambdas: Sequence[float]) -> Tensor:
        """p_k [D + 1], fp64; 0 for the main prediction, and where lambda_k is 0."""
        if self.probabilities == "loss_ratio":
            shares = (self._mean / self._first).nan_to_num(nan=1.0, posinf=1.0)
        elif isinstance(self.probabilities, str):
            shares = torch.ones(self.depth + 1, dtype=torch.float64)
        else:
            shares = torch.tensor([0.0, *self.probabilities], dtype=torch.float64)
        drawable = torch.tensor([k > 0 and x != 0 for k, x in enumerate(lambdas)])
        shares = torch.where(drawable, shares, 0.0)
        return shares / shares.sum().clamp(min=torch.finfo(shares.dtype).tiny)

    def needs_main(self, mtp: MTPConfig) -> bool:
        return mtp.trains_trunk  # the rule reads the losses of the depths alone

    def factors(self, lambdas: Sequence[float], progress: Progress) -> list[float]:
        factors = [lambdas[0], *[0.0] * self.depth]
        if depths_of(lambdas):
            chances = self.chances(lambdas)
            rng = generator(self.seed, f"balance:{self.name}:{progress.step}")
            k = int(torch.multinomial(chances, 1, generator=rng))
            factors[k] = lambdas[k] / float(chances[k])
        return factors

    def update(self, observed: Observed) -> dict[str, float]:
        chances = self.chances(observed.lambdas).tolist()
        for k in depths_of(observed.factors):
            if self._first[k].isnan():
                self._first[k] = self._mean[k] = observed.losses[k]
            else:
                self._mean[k] = _DECAY * self._mean[k] + (1 - _DECAY) * observed.losses[k]
        return {f"balance/probability_depth_{k}": chances[k] for k in depths_of(observed.lambdas)}

    def active_sets(self, lambdas: Sequence[float]) -> list[tuple[float, list[int]]]:
        depths = depths_of(lambdas)
        chances = self.chances(lambdas).tolist()
        return [(chances[k], [k]) for k in depths] or super().active_sets(lambdas)

    @property
    def skips(self) -> bool:
        return self.depth > 1
