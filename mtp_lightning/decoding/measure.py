"""Acceptance and speedup of drafts: measured in the real decoding loop, and expected from teacher
forcing and the times of single passes.

Shapes: P positions of one text, C d_model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning.decoding.fused import decoding_passes, fused_passes
from mtp_lightning.decoding.generate import generate
from mtp_lightning.decoding.lookup import extra_tokens_are_cheap, lookups_alone
from mtp_lightning.decoding.options import DecodingOptions, Prompt
from mtp_lightning.decoding.sequence import Generation, rate_counts, rates
from mtp_lightning.decoding.session import Session
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.runtime import eval_mode

# Two tokens whose logits differ by less are tied: rounding may choose either.
_TIE = 1e-3
# Samples of a bootstrap, and untimed calls of a pass before the timed ones.
_RESAMPLES, _WARM_UP = 1000, 10
# Prompts decoded together to measure acceptance, and the fewest decoded one by one for speed.
TOGETHER, _TIMED = 64, 4


def prompts_that_fit(
    data: Any, *, n_prompts: int, prompt_tokens: int, new_tokens: int, key: str
) -> tuple[list[Tensor], int]:
    """The held-out prompts that a run and evaluate.py decode, at most ``n_prompts``, and the number
    of tokens to generate, which fit into one window together.

    For text, a prompt has at most ``prompt_tokens``, and the number is ``new_tokens``. For a task,
    the prompts are whole and the number is the length of an answer. ``key`` is the setting of
    ``new_tokens``, for messages.

    Raises:
        UserError: there are no prompts, or a window has no room for ``new_tokens`` and a prompt.
    """
    new_tokens = new_tokens if data.answer_length is None else data.answer_length
    room = data.seq_len - new_tokens
    if room < 1:
        raise UserError(
            f"data.seq_len={data.seq_len} leaves no room for a prompt and new_tokens={new_tokens}: "
            f"lower {key}"
        )
    return data.held_out_prompts(n_prompts, min(prompt_tokens, room), fewer=True), new_tokens


@dataclass(frozen=True)
class Race:
    """The same prompts decoded in several ways, interleaved so that other load hits all alike."""

    outputs: dict[str, list[Generation]]  # the generations of every way
    # For every way, wall-clock seconds of each repeat over all prompts.
    seconds: dict[str, list[float]]

    def speedup(self, name: str, over: str = "plain") -> float:
        """Median over the repeats of ``seconds[over] / seconds[name]``."""
        pairs = zip(self.seconds[over], self.seconds[name], strict=True)
        return median(slow / fast for slow, fast in pairs)


def race(
    model: MTPModel,
    prompts: Sequence[Prompt],
    ways: Mapping[str, DecodingOptions],
    *,
    tokenizer: Any = None,
    repeats: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Race:
    """Decode ``prompts`` in several ways, ``repeats`` times each.

    Every way first decodes one batch untimed: the first passes of a size load kernels and allocate
    memory, which alone made plain decoding differ from itself by a factor of up to 1.4. Then the
    ways take turns, in alternating order; with ``batch_size=1`` they take turns at every prompt.
    The clock returns seconds; use ``time.process_time`` on a busy machine.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    outputs: dict[str, list[Generation]] = {}
    alone = all(options.slots == 1 for options in ways.values())
    groups = [[prompt] for prompt in prompts] if alone else [prompts]
    order = list(ways)
    with fused_passes(model):  # else every timed call would pack the weights again
        for options in ways.values():
            generate(model, prompts[: options.slots], options, tokenizer=tokenizer)
        for _ in range(repeats):
            outputs = {name: [] for name in ways}
            for name in ways:
                seconds[name].append(0.0)
            for group in groups:
                for name in order:
                    began = clock()
                    outputs[name] += generate(model, group, ways[name], tokenizer=tokenizer)
                    seconds[name][-1] += clock() - began
                order.reverse()
    return Race(outputs, seconds)


def short_race(
    model: MTPModel,
    prompts: Sequence[Prompt],
    ways: Mapping[str, DecodingOptions],
    *,
    tokenizer: Any = None,
    seconds: float,
) -> Race:
    """A :func:`race` of greedy decoding, one of whose ways is ``"plain"``, over as many of the
    first prompts as take about ``seconds``, at least four. Acceptance differs so much between
    prompts that few of them mislead.

    Raises:
        RuntimeError: drafts changed a text.
    """
    run = race(model, prompts[:_TIMED], ways, tokenizer=tokenizer)
    taken = sum(sum(own) for own in run.seconds.values())
    if (n := int(seconds / max(taken, 1e-9) * _TIMED)) > _TIMED:
        run = race(model, prompts[:n], ways, tokenizer=tokenizer)
    for outputs in run.outputs.values():
        require_same_greedy(model, prompts[: len(outputs)], run.outputs["plain"], outputs)
    return run


def intervals(generations: Sequence[Generation]) -> dict[str, float]:
    """95 % confidence intervals ``NAME_low`` and ``NAME_high`` of the values of :func:`rates`.

    By a percentile bootstrap over prompts (Efron 1979), since the tokens of one text depend on one
    another and prompts do not. Empty for a single prompt.
    """
    n = len(generations)
    if n < 2:
        return {}
    drawn_RN = np.random.default_rng(0).integers(n, size=(_RESAMPLES, n))
    values = {}
    for name, (above_N, below_N) in rate_counts(generations).items():
        above_R, below_R = above_N[drawn_RN].sum(1), below_N[drawn_RN].sum(1)
        counted_R = below_R > 0
        if counted_R.any():
            bounds = np.percentile(above_R[counted_R] / below_R[counted_R], (2.5, 97.5))
            values[f"{name}_low"], values[f"{name}_high"] = bounds.astype("float32").tolist()
    return values


def acceptance(
    model: MTPModel, prompts: Sequence[Prompt], options: DecodingOptions, *, tokenizer: Any = None
) -> tuple[dict[str, float], list[Generation]]:
    """:func:`rates` of greedy drafting, their :func:`intervals`, and the result of
    :func:`~mtp_lightning.decoding.lookup.lookups_alone`; also checks that plain decoding gives the
    same texts.

    Returns:
        The values, with ``n_prompts`` and ``new_tokens``, and the generations of plain decoding.

    Raises:
        RuntimeError: drafts changed a text.
    """
    # On a CPU, texts that are decoded together use no lookups.
    alone = options.lookup and not extra_tokens_are_cheap(model.head.weight.device)
    options = replace(options, batch_size=1 if alone else TOGETHER)
    plain = generate(model, prompts, options.plain(), tokenizer=tokenizer)
    drafted = generate(model, prompts, options, tokenizer=tokenizer)
    require_same_greedy(model, prompts, plain, drafted)
    sizes = {"n_prompts": float(len(prompts)), "new_tokens": float(options.max_new_tokens)}
    lookup_values = lookups_alone(prompts, plain)
    return {**rates(drafted), **intervals(drafted), **lookup_values, **sizes}, plain


@torch.inference_mode()
def read_text(
    model: MTPModel, text: Sequence[int], active: Sequence[int] | None = ()
) -> dict[int, Tensor]:
    """The hidden states of depth 0 and of the ``active`` depths (by default none; None for all),
    [P, C] for the P tokens of a text, in one pass as in training. The padding after the text only
    fills the window."""
    ids = [*text, *[0] * (model.depth + 1)]
    tokens = torch.tensor([ids], device=model.head.weight.device)
    with eval_mode(model):
        hidden = model(WindowBatch(tokens, model.depth), active)
    return {k: h_BPC[0] for k, h_BPC in hidden.items()}


@torch.inference_mode()
def teacher_forced_rates(
    model: MTPModel, prompts: Sequence[Prompt], generations: Sequence[Generation]
) -> dict[str, float]:
    """The rates of :func:`rates`, expected from one teacher-forced pass over greedy texts.

    At every position of a continuation the depths predict the tokens that the model itself then
    chose. ``agreement_position_j`` is conditional, like acceptance: the share of positions right at
    depth j among those where all shallower depths are right. ``expected_tokens_per_step`` is 1 +
    the mean number of depths that are right before the first wrong one. The decoding loop visits
    only some of these positions, so measured and expected rates differ slightly; a difference of
    more than a few points is a defect in one of them.
    """
    depth = model.depth
    n_reached, n_right = torch.zeros(depth), torch.zeros(depth)
    for prompt, generation in zip(prompts, generations, strict=True):
        text = torch.tensor([*map(int, prompt), *generation.token_ids])
        # Count the positions whose targets of all depths are in the text.
        first, end = len(prompt) - 1, len(text) - depth - 1
        if end <= first:
            continue
        hidden = read_text(model, text.tolist(), active=None)
        all_right_P = torch.ones(end - first, dtype=torch.bool)
        for k in range(1, depth + 1):
            state_PC = hidden[k][first:end]
            before_P = text[first + k : end + k].to(state_PC.device)
            choice_P = model.draft_logits(k, state_PC, before_P).argmax(-1).cpu()
            n_reached[k - 1] += all_right_P.sum()
            all_right_P &= choice_P == text[first + k + 1 : end + k + 1]
            n_right[k - 1] += all_right_P.sum()
    values = {
        f"agreement_position_{j}": float(a / n)
        for j, (a, n) in enumerate(zip(n_right, n_reached, strict=True), start=1)
        if n
    }
    if depth and n_reached[0]:
        values["expected_tokens_per_step"] = 1 + float(n_right.sum() / n_reached[0])
    return values


@dataclass(frozen=True)
class PassCosts:
    """Median seconds of single passes."""

    verify: list[float]  # the trunk over 1 .. D + 1 tokens per row, with head and argmax
    draft: list[float]  # depths 1 .. D, with head and argmax

    def speedup(self, tokens_per_step: float) -> float:
        """Speedup of drafting D tokens over plain decoding if only these passes took time."""
        return tokens_per_step * self.verify[0] / (self.verify[-1] + sum(self.draft))


def pass_costs(
    model: MTPModel,
    prompt: Sequence[int],
    *,
    batch: int = 1,
    compile: bool = False,
    repeats: int = 60,
    clock: Callable[[], float] = time.perf_counter,
) -> PassCosts:
    """Time the passes of a decoding round of ``batch`` rows that have read ``prompt``, ``repeats``
    times each; compiled passes have one row."""
    kind = Session
    if compile:
        from mtp_lightning.decoding.compiled import CompiledSession

        kind = CompiledSession
    with decoding_passes(model):
        capacity = len(prompt) + 64
        session = kind(model, slots=batch, capacity=capacity, max_draft=model.depth)
        session.join([prompt] * batch)

        def verify(n_drafts: int) -> list[list[int]]:
            return session.verify(n_drafts).argmax(-1).tolist()

        def draft(k: int) -> None:
            # As after a round that accepted about half of its drafts: two positions to catch up.
            session.filled[k] = [max(0, n - max(2, k)) for n in session.n_read]
            chosen = session.draft(k).logits_BV.argmax(-1, keepdim=True)
            session.put(chosen, k)
            chosen.tolist()  # waits for a GPU

        costs = PassCosts([], [])
        for m in range(model.depth + 1):
            costs.verify.append(_seconds(partial(verify, m), repeats, clock))
        for k in range(1, model.depth + 1):
            session.draft(k)  # catches up with the prompt
            costs.draft.append(_seconds(partial(draft, k), repeats, clock))
    return costs


def _seconds(call: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> float:
    times = []
    for _ in range(_WARM_UP + repeats):
        began = clock()
        call()
        times.append(clock() - began)
    return median(times[_WARM_UP:])


def decoding_report(
    model: MTPModel, prompts: Sequence[Tensor], options: DecodingOptions, *, tokenizer: Any = None
) -> dict[str, float]:
    """Acceptance and speedup of drafting, measured and expected, on the same greedy texts. The
    speedup is timed one prompt at a time, for about two seconds.

    Returns:
        The values of :func:`acceptance` and :func:`teacher_forced_rates`, ``speedup`` (wall-clock
        over plain decoding) and ``expected_speedup`` (from ``expected_tokens_per_step`` and
        :func:`pass_costs`). Expected values are left out if an option of drafting is set or the
        model is deeper than a round, as teacher forcing then does not predict the drafts.

    Raises:
        RuntimeError: drafts changed a text.
        UserError: the model does not draft.
    """
    model.mtp.require_drafts()
    values, plain = acceptance(model, prompts, options, tokenizer=tokenizer)
    alone = replace(options, batch_size=1)
    ways = {"plain": alone.plain(), "drafted": alone}
    run = short_race(model, prompts, ways, tokenizer=tokenizer, seconds=2.0)
    values["speedup"] = run.speedup("drafted")
    if not options.drafts_as_trained or options.max_draft(model) < model.depth:
        return values
    values |= teacher_forced_rates(model, prompts, plain)
    if "expected_tokens_per_step" in values:
        half = [*prompts[0].tolist(), *plain[0].token_ids[: options.max_new_tokens // 2]]
        costs = pass_costs(model, half)
        values["expected_speedup"] = costs.speedup(values["expected_tokens_per_step"])
    return values


def require_same_greedy(
    model: MTPModel,
    prompts: Sequence[Prompt],
    plain: Sequence[Generation],
    drafted: Sequence[Generation],
) -> None:
    """Check that drafts have not changed the greedy texts.

    Raises:
        RuntimeError: texts differ at a token that is not a tie.
    """
    for prompt, one, other in zip(prompts, plain, drafted, strict=True):
        ids, a, b = list(map(int, prompt)), one.token_ids, other.token_ids
        if a == b:
            continue
        shorter = min(len(a), len(b))
        i = next((i for i in range(shorter) if a[i] != b[i]), shorter)
        if i < shorter and _are_tied(model, ids + a[:i], a[i], b[i]):
            continue
        raise RuntimeError(
            f"Speculative greedy decoding differs from plain decoding at new token {i} after the "
            f"prompt {ids}: {a[i : i + 4]} against {b[i : i + 4]}. This is a defect in the "
            "decoder: please report it with the checkpoint."
        )


@torch.inference_mode()
def _are_tied(model: MTPModel, text: list[int], a: int, b: int) -> bool:
    logits = model.head(read_text(model, text)[0][-1]).float()
    return abs(float(logits[a] - logits[b])) < _TIE
