"""What a task reports of a model beside exact match, from what the model says, knows and costs.

A measure sees no model: it asks for what it needs, and the rest is not computed.

Shapes: B batch, W tokens of a window, P its positions, C d_model, S what a probe is to find.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from data_modules.windows import WindowBatch


class Outputs(Protocol):
    """What a model makes of some examples, each a row of :attr:`batch`; computed when asked for."""

    @property
    def batch(self) -> WindowBatch:
        """The examples as the model is given them; ``scored`` where it speaks."""

    @property
    def sampled_BW(self) -> Tensor:
        """The tokens, with what the model says at temperature 1 in the scored places. Drawn from a
        stream of each example's own: the same for any batch, rank and validation."""

    @property
    def states_BPC(self) -> Tensor:
        """The trunk's final states, teacher-forced."""

    @property
    def nats_BW(self) -> Tensor:
        """float64 ``-log p`` of each scored token, teacher-forced; 0 elsewhere."""


class Measure(Metric, ABC):
    """Values of a set of examples, over all ranks and batches: a metric whose states add up."""

    full_state_update = False

    @abstractmethod
    def update(self, numbers: np.ndarray, outputs: Outputs) -> None:
        """Count some examples.

        Args:
            numbers: of the examples, [B] from 0.
            outputs: the model's.
        """

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The values by name, as in ``val/NAME``; what is not defined is left out."""


class SampledAnswers(Measure):
    """What a task makes of an answer to each example, drawn at temperature 1.

    Args:
        n: examples.
        place: of the answers in the windows.
        judge: all answers, in the order of their examples, to values by name.
    """

    answers: Tensor

    def __init__(
        self, n: int, place: slice, judge: Callable[[list[list[int]]], Mapping[str, float]]
    ) -> None:
        super().__init__()
        self.place = place
        self.judge = judge
        # A row each, of one rank; together they are all.
        empty = torch.zeros((n, place.stop - place.start), dtype=torch.int64)
        self.add_state("answers", default=empty, dist_reduce_fx="sum")

    def update(self, numbers: np.ndarray, outputs: Outputs) -> None:
        rows = torch.from_numpy(numbers).to(self.answers.device)
        self.answers[rows] = outputs.sampled_BW[:, self.place].to(self.answers.device)

    def compute(self) -> dict[str, float]:
        return dict(self.judge(self.answers.tolist()))


LEAST = 1e-4
"""Singular value of what a probe still reads, relative to the largest."""


class AffineProbe(Measure):
    """R^2 of the affine map that best (by least squares) reads something off the states from which
    the model speaks: fitted on the examples of even number, scored on the others.

    ``1 - sum |y - fit|^2 / sum |y - mean y|^2`` over all components and scored positions, y's mean
    being theirs. Nothing is kept of a position but its part of a sum. What states vary in by less
    than :data:`LEAST` of what they vary in most is left out: it is their rounding, which no two
    batches share.

    Args:
        name: of the value.
        wanted: tokens [B, W] to what is to be found [B, W, S] after each of them.
        size: S.
        d_model: C.
    """

    products: Tensor

    def __init__(
        self, name: str, wanted: Callable[[np.ndarray], np.ndarray], *, size: int, d_model: int
    ) -> None:
        super().__init__()
        self.name = name
        self.wanted = wanted
        self.d_model = d_model
        # Of [state, 1, wanted] with itself, for either part of the examples.
        n = d_model + 1 + size
        empty = torch.zeros((2, n, n), dtype=torch.float64)
        self.add_state("products", default=empty, dist_reduce_fx="sum")

    def update(self, numbers: np.ndarray, outputs: Outputs) -> None:
        batch = outputs.batch
        valid_BP = batch.valid(0)
        assert valid_BP is not None
        wanted = torch.from_numpy(self.wanted(batch.tokens.cpu().numpy())).to(batch.device)
        wanted_BPS = wanted[:, : batch.seq_len].double()
        states_BPC = outputs.states_BPC.double()
        both = torch.cat((states_BPC, torch.ones_like(states_BPC[..., :1]), wanted_BPS), dim=-1)
        part_B = torch.from_numpy(numbers % 2).to(batch.device)
        for part in range(2):
            rows = both[valid_BP & (part_B == part).unsqueeze(1)]
            self.products[part] += rows.T @ rows

    def compute(self) -> dict[str, float]:
        fit, score = self.products.cpu().numpy()
        one = self.d_model
        states, wanted = slice(one), slice(one + 1, None)
        n_fit, n = fit[one, one], score[one, one]
        if not (n_fit and n):
            return {}
        means = score[one, wanted] / n
        total = np.trace(score[wanted, wanted]) - n * means @ means
        if total <= 1e-12 * n:  # the same everywhere
            return {}
        varied = fit - np.outer(fit[one], fit[one]) / n_fit
        # Of squares, so that the least is squared, too.
        slope, *_ = np.linalg.lstsq(varied[states, states], varied[states, wanted], rcond=LEAST**2)
        offset = (fit[one, wanted] - fit[one, states] @ slope) / n_fit
        error = np.concatenate([slope, offset[None], -np.eye(len(offset))])
        return {self.name: float(1 - np.einsum("is,ij,js->", error, score, error) / total)}


class Excess(Measure):
    """The least loss that there is on the scored tokens, and by how much the model's is above it;
    both are means in nats.

    Args:
        name: of the least loss.
        least: tokens [B, W] to the nats of each, given those before it, of the best prediction.
    """

    sums: Tensor

    def __init__(self, name: str, least: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self.name = name
        self.least = least
        empty = torch.zeros(3, dtype=torch.float64)
        self.add_state("sums", default=empty, dist_reduce_fx="sum")

    def update(self, numbers: np.ndarray, outputs: Outputs) -> None:
        batch, nats_BW = outputs.batch, outputs.nats_BW
        assert batch.scored is not None
        least_BW = torch.from_numpy(self.least(batch.tokens.cpu().numpy())).to(batch.device)
        found = [values[batch.scored].sum() for values in (least_BW, nats_BW - least_BW)]
        self.sums += torch.stack([*found, batch.scored.sum().double()])

    def compute(self) -> dict[str, float]:
        least, excess, n = self.sums.tolist()
        return {self.name: least / n, "excess_loss": excess / n}


Training = Callable[[], Sequence[Sequence[int]]]
"""The answers of a training set."""
