"""The least possible rejection (floor) against linear programs, loops and a source with a known
floor."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from data_modules.windows import WindowBatch
from mtp_lightning.callbacks.floor_and_gap import FloorAndGap
from mtp_lightning.metrics import floor
from mtp_lightning.metrics.floor import Floors, FloorValues, floors, least_rejection
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp import selector
from mtp_lightning.mtp.eagle import EagleConfig
from mtp_lightning.mtp.linear import LinearConfig
from mtp_lightning.mtp.parallel import ParallelConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from tests.decoding.models import random_prompts, small_model

VOCAB = 5
PROMPT = torch.tensor([3, 1, 4, 1, 0, 2])


def tiny(depth: int = 2, stack: Any = ParallelConfig, seed: int = 0, **more: Any) -> MTPModel:
    model = small_model(seed, depth, vocab=VOCAB, stack=stack, **more).double()
    with torch.no_grad():
        model.head.weight.mul_(0.3)  # otherwise predictions are almost certain
    return model


def by_linear_program(p_NV: np.ndarray, weight_N: np.ndarray) -> float:
    """Maximize sum w_n u_nv where u_nv <= p_nv, u_nv <= q_v and the q_v sum to 1."""
    n, size = p_NV.shape
    gain = np.concatenate([-np.repeat(weight_N, size), np.zeros(size)])
    below = np.hstack([np.eye(n * size), np.tile(-np.eye(size), (n, 1))])
    total = np.concatenate([np.zeros(n * size), np.ones(size)])[None]
    bounds = [(0, p) for p in p_NV.flatten()] + [(0, 1)] * size
    solution = linprog(gain, below, np.zeros(n * size), total, [1.0], bounds)
    return float(weight_N.sum() + solution.fun)


@pytest.mark.parametrize("seed", range(4))
def test_the_least_rejection_is_that_of_a_linear_program(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n, size = seed + 1, generator.integers(2, 8)
    p_NV, weight_N = generator.dirichlet([0.4] * size, n), generator.random(n)
    p_NV[-1] = p_NV[0]  # equal distributions
    weight_N[generator.random(n) < 0.2] = 0
    least = least_rejection(torch.tensor(p_NV), torch.tensor(weight_N))
    assert least == pytest.approx(by_linear_program(p_NV, weight_N), abs=1e-9)


@torch.no_grad()
def main_prediction(model: MTPModel, tokens: list[int]) -> np.ndarray:
    """The trunk's prediction after the tokens."""
    batch = WindowBatch(torch.tensor([[*tokens, *[0] * (model.depth + 1)]]), model.depth)
    return model.head(model(batch, ())[0])[0, -1].softmax(-1).numpy()


@torch.no_grad()
def depth_prediction(model: MTPModel, tokens: list[int], between: list[int]) -> np.ndarray:
    """The drafts' distribution of depth k at the last of ``tokens``, given the k tokens
    ``between``."""
    k, fill = len(between), [0] * (model.depth + 1 - len(between))
    batch = WindowBatch(torch.tensor([[*tokens, *between, *fill]]), model.depth)
    before = torch.tensor([*tokens, *between])[-1:]
    return model.draft_logits(k, model(batch)[k][0, -1:], before)[0].softmax(-1).numpy()


def by_loops(model: MTPModel, prompt: list[int], k: int, m: int) -> FloorValues:
    groups: dict[tuple[int, ...], list[tuple[float, np.ndarray]]] = {}
    rejection = recall = 0.0
    for path in itertools.product(range(VOCAB), repeat=k):
        steps = [main_prediction(model, [*prompt, *path[:i]]) for i in range(k + 1)]
        weight = float(np.prod([p[token] for p, token in zip(steps, path, strict=False)]))
        groups.setdefault(path[k - m :] if m else (), []).append((weight, steps[k]))
        q = depth_prediction(model, prompt, list(path))
        rejection += weight * 0.5 * np.abs(steps[k] - q).sum()
        recall += weight * sum(steps[k][v] for v in np.argsort(-q)[: floor.RECALL])
    least = sum(
        by_linear_program(np.stack([p for _, p in group]), np.array([w for w, _ in group]))
        for group in groups.values()
    )
    return FloorValues(least, float(rejection), recall)


@pytest.mark.parametrize(
    ("stack", "more"),
    [
        (SequentialConfig, {}),
        (ParallelConfig, {}),
        (LinearConfig, {"rank": 2}),
        (LinearConfig, {"correction": "selector", "correction_rank": 5}),
        (EagleConfig, {"draft_vocab": 3}),  # other tokens are never drafted
    ],
)
def test_floors_rejections_and_recalls_equal_those_of_loops(
    stack: Any, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floor, "RECALL", 2)
    monkeypatch.setattr(selector, "CANDIDATES", 3)
    model = tiny(stack=stack, **more)
    measured = Floors(model, PROMPT, torch.Generator(), rollouts=1, seen=1).measure()
    assert list(measured) == [(1, 0), (2, 0), (2, 1)]
    for (k, m), values in measured.items():
        reference = by_loops(model, PROMPT.tolist(), k, m)
        assert values.floor == pytest.approx(reference.floor, abs=1e-9)
        assert values.rejection == pytest.approx(reference.rejection, abs=1e-9)
        assert values.recall == pytest.approx(reference.recall, abs=1e-9)
    assert 0.02 < measured[2, 1].floor < measured[2, 0].floor


@pytest.mark.parametrize("sampled", [False, True])
def test_on_a_markov_source_the_floor_of_a_head_that_reads_a_token_is_0(
    sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sampled:
        monkeypatch.setattr(floor, "ENUMERATED", 0)
    model = tiny(depth=3)
    with torch.no_grad():  # without attention, a prediction depends only on the last token
        for name, weight in model.trunk.named_parameters():
            if "attention" in name or "attn" in name:
                weight.zero_()
    measured = Floors(model, PROMPT, torch.Generator(), rollouts=32, seen=4).measure()
    assert min(measured[k, 0].floor for k in (1, 2, 3)) > 0.02
    assert max(measured[k, m].floor for k in (2, 3) for m in range(1, k)) < 1e-9


def test_sampled_floors_approach_the_exact_one_from_below(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny()
    exact = Floors(model, PROMPT, torch.Generator(), rollouts=1, seen=1).measure()
    monkeypatch.setattr(floor, "ENUMERATED", 0)
    many, few = (
        [
            Floors(
                model, PROMPT, torch.Generator().manual_seed(seed), rollouts=n, seen=seen
            ).measure()
            for seed in range(seeds)
        ]
        for n, seen, seeds in ((1000, 200, 1), (4, 8, 20))
    )
    for at, values in exact.items():
        assert many[0][at].floor == pytest.approx(values.floor, abs=0.02)
        assert many[0][at].rejection == pytest.approx(values.rejection, abs=0.03)
        assert many[0][at].recall == pytest.approx(1)  # the vocabulary has fewer than 16 tokens
        assert all(s[at].floor <= s[at].rejection + 1e-12 for s in (*many, *few))
        assert np.mean([sampled[at].floor for sampled in few]) < values.floor


def test_logged_floors_and_gaps_are_means_over_prompts() -> None:
    first = {
        (1, 0): FloorValues(0.1, 0.4, 0.9),
        (2, 0): FloorValues(0.2, 0.5, 0.8),
        (2, 1): FloorValues(0, 0.5, 0.8),
    }
    second = {
        (1, 0): FloorValues(0.3, 0.6, 0.7),
        (2, 0): FloorValues(0.4, 0.7, 0),
        (2, 1): FloorValues(0.15, 0.7, 0),
    }
    values = floors([first, second])
    expected = {
        "rejection_depth_1": 0.5,
        "recall_16_depth_1": 0.8,
        "floor_depth_1_order_0": 0.2,
        "gap_depth_1_order_0": 0.3,
        "floor_share_depth_1_order_0": 0.4,
        "rejection_depth_2": 0.6,
        "recall_16_depth_2": 0.4,
        "floor_depth_2_order_0": 0.3,
        "gap_depth_2_order_0": 0.3,
        "floor_share_depth_2_order_0": 0.5,
        "floor_depth_2_order_1": 0.075,
        "gap_depth_2_order_1": 0.525,
        "floor_share_depth_2_order_1": 0.125,
        "floor_kept_depth_2_order_1": 0.25,
    }
    assert values == pytest.approx(expected)


def logged(callback: FloorAndGap, model: MTPModel) -> dict[str, float]:
    """The values that a validation logs for 3 prompts."""
    prompts = [torch.tensor(ids) for ids in random_prompts(3, (5,) * 3, VOCAB)]
    data = SimpleNamespace(seq_len=64, answer_length=None, tokenizer=None)
    data.held_out_prompts = lambda n, tokens, fewer: prompts[:n]
    trainer: Any = SimpleNamespace(is_global_zero=True, datamodule=data)
    values: dict[str, float] = {}
    module: Any = SimpleNamespace(
        whole_model=lambda: model, log_dict=lambda logged, **_: values.update(logged)
    )
    callback.on_validation_epoch_end(trainer, module)
    return values


def test_the_callback_logs_floors_and_leaves_the_global_generator_alone() -> None:
    model = tiny()
    state = torch.get_rng_state()
    callback = FloorAndGap(n_prompts=3)
    values = logged(callback, model)
    assert callback.summary() == values
    assert torch.equal(state, torch.get_rng_state())
    assert values == logged(FloorAndGap(n_prompts=3), tiny())
    assert {tag.partition("_")[0] for tag in values} == {
        "val/rejection",
        "val/recall",
        "val/floor",
        "val/gap",
    }
    assert logged(FloorAndGap(), small_model(0, 0)) == {}
    assert logged(FloorAndGap(), tiny(stack=ParallelConfig, stride=2)) == {}
