"""Metrics of a task besides exact match, from a model's answers, states and losses.

A measure does not see the model: it asks for the outputs that it needs, and the others are not
computed.

Shapes: B batch, W tokens of a window, P its positions, K scored tokens, C d_model, V vocabulary, S
size of a probe's target.
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
    """A model's outputs for some examples, each a row of ``batch``; computed at their first use."""

    batch: WindowBatch  # as the model reads them; ``scored`` where it answers
    greedy_BW: Tensor  # the tokens, with the model's greedy answers at the scored positions
    # Likewise with answers at temperature 1, drawn from one stream per example: they do not depend
    # on batch, rank or validation.
    sampled_BW: Tensor
    # The others are teacher-forced.
    states_BPC: Tensor  # the trunk's final states
    nats_BW: Tensor  # float64 ``-log p`` of each scored token; 0 elsewhere
    log_probs_KV: Tensor  # ``log p`` of every id at the K scored tokens, row by row


class TaskMeasure(Metric, ABC):
    """Values over a set of examples, all ranks and batches: a metric with additive states."""

    full_state_update = False

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        """Adds a state of zeros, which is summed over all ranks."""
        self.add_state(name, default=torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    @abstractmethod
    def update(self, numbers: np.ndarray, outputs: Outputs) -> None:
        """Counts the examples of these numbers, [B] from 0, by the model's outputs for them."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The values by name, as in ``val/NAME``; undefined values are left out."""


class SampledAnswers(TaskMeasure):
    """Values of a task computed from one answer per example, drawn at temperature 1.

    Args:
        n: number of examples.
        span: the positions of their answers in the windows.
        judge: maps all answers, in the order of their examples, to values by name.
    """

    answers: Tensor

    def __init__(
        self, n: int, span: slice, judge: Callable[[list[list[int]]], Mapping[str, float]]
    ) -> None:
        super().__init__()
        self.span = span
        self.judge = judge
        # One row per example, filled by one rank; the sum over ranks fills all rows.
        self.add_sum("answers", n, span.stop - span.start, dtype=torch.int64)

    def update(self, numbers: np.ndarray, outputs: Outputs) -> None:
        rows = torch.from_numpy(numbers).to(self.answers.device)
        self.answers[rows] = outputs.sampled_BW[:, self.span].to(self.answers.device)

    def compute(self) -> dict[str, float]:
        return dict(self.judge(self.answers.tolist()))


LEAST = 1e-4
"""Least singular value that a probe uses, relative to the largest; smaller ones are rounding, which
differs between batches."""


class AffineProbe(TaskMeasure):
    """R^2 of the best affine map (least squares) from the states that the model predicts from to
    some target: fitted on the examples of even number, scored on the others.

    It is ``1 - sum |y - fit|^2 / sum |y - mean y|^2`` over all components and scored positions of
    the scored examples, with their own mean of y. Only sums are kept.

    Args:
        wanted: maps tokens [B, W] to the target [B, W, S] after each of them.
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
        # Products of [state, 1, target] with itself, for each half of the examples.
        n = d_model + 1 + size
        self.add_sum("products", 2, n, n)

    def update(self, numbers: np.ndarray, outputs: Outputs) -> None:
        batch = outputs.batch
        valid_BP = batch.valid(0)
        assert valid_BP is not None
        target = torch.from_numpy(self.wanted(batch.tokens.cpu().numpy())).to(batch.device)
        target_BPS = target[:, : batch.seq_len].double()
        states_BPC = outputs.states_BPC.double()
        ones_BP1 = torch.ones_like(states_BPC[..., :1])
        joined_BPN = torch.cat((states_BPC, ones_BP1, target_BPS), dim=-1)
        part_B = torch.from_numpy(numbers % 2).to(batch.device)
        for part in range(2):
            rows = joined_BPN[valid_BP & (part_B == part).unsqueeze(1)]
            self.products[part] += rows.T @ rows

    def compute(self) -> dict[str, float]:
        fit, score = self.products.cpu().numpy()
        constant = self.d_model
        states, target = slice(constant), slice(constant + 1, None)
        n_fit, n = fit[constant, constant], score[constant, constant]
        if not (n_fit and n):
            return {}
        means = score[constant, target] / n
        total = np.trace(score[target, target]) - n * means @ means
        if total <= 1e-12 * n:  # constant
            return {}
        varied = fit - np.outer(fit[constant], fit[constant]) / n_fit
        # The products are squares, so the bound is squared too.
        slope, *_ = np.linalg.lstsq(varied[states, states], varied[states, target], rcond=LEAST**2)
        offset = (fit[constant, target] - fit[constant, states] @ slope) / n_fit
        error = np.concatenate([slope, offset[None], -np.eye(len(offset))])
        return {self.name: float(1 - np.einsum("is,ij,js->", error, score, error) / total)}


class Means(TaskMeasure):
    """Means of the named values, each over the items for which it is defined."""

    sums: Tensor

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        self.add_sum("sums", len(names), 2)

    @abstractmethod
    def count(self, outputs: Outputs) -> list[tuple[float, int]]:
        """For each value, its sum and the number of items."""

    def update(self, numbers: np.ndarray, outputs: Outputs) -> None:
        self.sums += torch.tensor(self.count(outputs), dtype=torch.float64).to(self.sums.device)

    def compute(self) -> dict[str, float]:
        pairs = zip(self.names, self.sums.tolist(), strict=True)
        return {name: total / n for name, (total, n) in pairs if n}


class Excess(Means):
    """``surprisal``, the least possible loss on the scored tokens, and ``excess_loss``, the model's
    excess over it; both are means in nats. Tokens after the end of an answer do not count.

    Args:
        least: maps tokens [B, W] to the nats of each token given those before it, under the best
            predictor.
    """

    def __init__(self, least: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__("surprisal", "excess_loss")
        self.least = least

    def count(self, outputs: Outputs) -> list[tuple[float, int]]:
        batch, nats_BW = outputs.batch, outputs.nats_BW
        assert batch.scored is not None
        least_BW = torch.from_numpy(self.least(batch.tokens.cpu().numpy())).to(batch.device)
        counts_BW = batch.scored.clone()
        counts_BW[:, 1:] &= batch.tokens[:, :-1] != 0  # the id that ends an answer
        n = int(counts_BW.sum())
        return [(float(values[counts_BW].sum()), n) for values in (least_BW, nats_BW - least_BW)]


Training = Callable[[], Sequence[Sequence[int]]]
"""The answers of a training set."""
