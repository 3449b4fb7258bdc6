"""The number of drafts that pays on this machine: measured once per model, and kept.

``generate.py`` and ``serve.py`` draft this many tokens per round unless they are told a number.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from data_modules.cache import build_once, cache_folder, cache_key
from mtp_lightning.decoding.adaptive import MIN_GAIN_MEASURED, AutoDepth, Measured, Payoff
from mtp_lightning.decoding.engine import Engine
from mtp_lightning.decoding.fused import version
from mtp_lightning.decoding.options import DecodingOptions, Prompt
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.opening import OpenedModel
from mtp_lightning.system import processor

log = logging.getLogger(__name__)

_FILE = "measured.json"
# The beginnings of the texts, and the number of tokens that the model adds to each. Acceptance
# differs so much between texts that three of them gave a third more than the mean of many.
_BEGINNINGS = (
    "The old house at the end of",
    "def main(",
    "What is the difference between",
    "Once upon a time, there was a",
    "import os\n\n\nclass ",
    "1. First, preheat the oven to",
    "Dear Sir or Madam,",
    "The results of the experiment show that",
)
_TOKENS = 48
# The timed rounds with each number of drafts; after _SECONDS, _LEAST rounds are enough.
_ROUNDS, _LEAST = 48, 4
_SECONDS = 3.0


def with_measured_depth(
    options: DecodingOptions, opened: OpenedModel, *, rows: int, **setting: Any
) -> DecodingOptions:
    """The options, with the measured number of drafts where they leave it open (None, ``"auto"``).

    The first call for a model measures, which takes seconds; later ones look it up in the cache
    folder until a file of the model, the machine, its fast code, the number of texts that are
    decoded together (``rows``) or a ``setting`` such as the precision changes.
    """
    model, depth_is_open = opened.model, options.draft_depth in (None, "auto")
    can_measure = options.speculative and not options.compile and options.tree is None
    if not (depth_is_open and can_measure) or model.mtp.max_draft_depth == 0:
        return options
    probing = replace(options, draft_depth="auto", measured=None, batch_size=rows, lookup=0)
    names = ("draft_vocab", "min_confidence", "cache", "verify")
    facts = {name: getattr(probing, name) for name in names} | setting
    facts |= {"rows": rows, "threads": torch.get_num_threads(), "drafts": probing.max_draft(model)}
    device = model.head.weight.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    facts |= {"on": [name, processor(), torch.__version__, version(device.type)]}
    folder = cache_folder() / "drafts" / cache_key(opened.path, json.dumps(facts))
    measured = _measured(folder, lambda: measure(model, probing, _prompts(opened)))
    return replace(options, draft_depth="auto", measured=measured)


def _prompts(opened: OpenedModel) -> list[Prompt]:
    """Beginnings of texts; a token where the model reads no text."""
    tokenizer, prompts = opened.tokenizer, []
    with suppress(UserError):
        prompts = [tokenizer.encode_prompt(text) for text in _BEGINNINGS]
    return [ids[: max(1, opened.seq_len // 4)] for ids in prompts if len(ids)] or [[0]]


def measure(model: MTPModel, options: DecodingOptions, prompts: Sequence[Prompt]) -> Measured:
    """Time rounds with 0, 1, .. drafts in turn, while the model continues the prompts,
    ``batch_size`` of them together. The options have ``draft_depth="auto"``."""
    sampled, greedy = (_payoff(model, options, prompts, temperature=t) for t in (1.0, 0.0))
    return Measured(greedy=greedy, sampled=sampled)


def _payoff(
    model: MTPModel, options: DecodingOptions, prompts: Sequence[Prompt], *, temperature: float
) -> Payoff:
    room = _TOKENS if options.max_context is None else options.max_context // 2
    n_new, n_drafts = max(2, min(_TOKENS, room)), options.max_draft(model)
    # A text's first and last tokens come from the trunk, so a round has at most n_new - 2 drafts.
    turns = _Turns(min(n_drafts, n_new - 2))
    plain: dict[str, Any] = {"top_k": None, "top_p": None, "stop": (), "eot_id": -1, "seed": 0}
    options = replace(options, max_new_tokens=n_new, temperature=temperature, **plain)
    end, n_begun = time.perf_counter() + _SECONDS, 0
    with Engine(model, options, depths=turns) as engine:
        while not turns.enough(late=time.perf_counter() > end):
            new = [(n_begun + i, prompts[(n_begun + i) % len(prompts)]) for i in range(engine.free)]
            engine.add([options.request(prompt, index) for index, prompt in new])
            n_begun += len(new)
            engine.step()
    payoff, missing = turns.payoff(), n_drafts - turns.max_draft
    return Payoff(payoff.costs + payoff.costs[-1:] * missing, payoff.accepted + (0.0,) * missing)


class _Turns(AutoDepth):
    """Cycles through all numbers of drafts, two rounds each. The second is timed: in the first the
    modules catch up with the rounds before."""

    _EACH = 2

    def __init__(self, max_draft: int) -> None:
        super().__init__(max_draft)
        self._rounds_done = 0
        self._times: list[list[float]] = [[] for _ in range(max_draft + 1)]
        self._counts = [[0, 0] for _ in range(max_draft)]  # accepted, reached

    def depth(self, rows: int, room: int | None = None) -> int:
        return self._rounds_done // self._EACH % (self.max_draft + 1)

    def record(
        self, m: int, seconds: float, accepted: Sequence[int], reached: Sequence[int]
    ) -> None:
        if self._rounds_done % self._EACH:
            self._times[m].append(seconds)
        for j, count in enumerate(self._counts[:m]):
            count[0] += sum(a > j for a in accepted)
            count[1] += sum(r > j for r in reached)
        self._rounds_done += 1

    def enough(self, *, late: bool) -> bool:
        """Whether every number was timed often enough."""
        return min(map(len, self._times)) >= (_LEAST if late else _ROUNDS)

    def payoff(self) -> Payoff:
        """The result. A round with drafts includes all the work of a plain one."""
        plain, *drafted = map(median, self._times)
        costs = (1.0, *(max(seconds / plain, 1.0) for seconds in drafted))
        return Payoff(costs, tuple(a / r if r else 0.0 for a, r in self._counts))


def _measured(folder: Path, measure_now: Callable[[], Measured]) -> Measured:
    """The measurement stored in ``folder``; measured and stored if there is none."""
    new: list[Measured] = []
    errors: list[Exception] = []

    def build(target: Path) -> None:
        try:
            new[:] = new or [measure_now()]
        except Exception as error:
            errors.append(error)
            raise
        (target / _FILE).write_text(json.dumps(asdict(new[0])), "utf-8")

    try:
        build_once(folder, build)  # whose seal shows a file that was changed
        if not new:
            payoffs = json.loads((folder / _FILE).read_text("utf-8")).items()
            stored = {k: Payoff(tuple(p["costs"]), tuple(p["accepted"])) for k, p in payoffs}
            return Measured(**stored)
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        if errors:  # not the folder's error
            raise
        log.info("%s cannot be used, and drafts are measured again: %s", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        new = new or [measure_now()]
        with suppress(UserError, OSError):  # a cache that cannot be written
            build_once(folder, build)
    if sys.stderr.isatty():
        print(description(new[0]), file=sys.stderr)
    return new[0]


def description(measured: Measured) -> str:
    """A sentence about a measurement, for people."""
    greedy, samples = _fastest(measured.greedy), _fastest(measured.sampled)
    return (
        f"Measured once, for this machine: {greedy} for greedy text, {samples} for samples; "
        f"drafts that gain less than {MIN_GAIN_MEASURED - 1:.0%} are not used at first. "
        "draft_depth=N sets another number."
    )


def _fastest(payoff: Payoff) -> str:
    n, gains = payoff.best, payoff.gains()
    drafts = {0: "no draft", 1: "1 draft per pass"}.get(n, f"{n} drafts per pass")
    return f"{drafts} ({f'{gains[n]:.2f}' if n else f'one would give {gains[1]:.2f}'} x plain)"
