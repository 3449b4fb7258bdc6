"""One text that is being decoded: its tokens, its end, its counts.

Shapes: T tokens of a round, V vocabulary.
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtp_lightning.decoding.detokenizer import Detokenizer
from mtp_lightning.decoding.options import Request
from mtp_lightning.decoding.speculative import RowResult


@dataclass(frozen=True)
class LogProb:
    """A token's log-probability by the trunk, in nats, before temperature, ``top_k`` and ``top_p``;
    ``top`` has the most likely tokens and their log-probabilities, best first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Rejected(NamedTuple):
    """A draft that did not become part of the text."""

    # Index in the text of the token that the trunk itself chose in that pass; it may lie after the
    # text's end.
    at: int
    depth: int  # of the draft, from 1
    token: int  # id of the draft
    # Index among the pass's rejected drafts of the one that it was drafted after; None if it
    # follows the accepted drafts.
    after: int | None
    looked_up: bool  # whether the text itself gave it, and not the modules


class Fresh(NamedTuple):
    """The new tokens of a sequence since the last call of :meth:`TextSequence.fresh`."""

    token_ids: list[int]
    pieces: list[str]  # the characters of the text that each token completes
    # The depth of each as a draft; 0 where the trunk chose the token itself, which ends a pass.
    depths: list[int]
    looked_up: list[bool]  # whether each is a draft that the text itself gave
    rejected: list[list[Rejected]]  # for each token, the drafts that were rejected there
    logprobs: list[LogProb]  # one per token if the request asked for them, else empty


@dataclass(frozen=True)
class Generation:
    """A finished continuation.

    Attributes:
        token_ids: all generated tokens, a final end-of-text token or stop string included.
        text: their text without an end-of-text token or stop string; None without a tokenizer.
        finish_reason: ``length``, ``eot`` or ``stop``.
        seconds: time since the engine took the request, reading the prompt included.
        verify_passes: passes of the trunk after the prompt's.
        drafts_accepted: for every draft position, the drafts accepted. Drafts after the text's end
            are left out.
        drafts_reached: for every draft position, the drafts that reached it.
        accepted_mask: which of ``token_ids`` were drafts.
        logprobs: one per token if the request asked for them, else None.
        drafts: number of drafts made, accepted or not; every candidate of a tree counts. Drafts
            beyond ``max_new_tokens`` are left out.
        lookups: number of those that were looked up in the text; ``acceptance`` is of the others.
        lookup_mask: which of ``token_ids`` were such drafts.
        rejected: the drafts that were not accepted.
    """

    token_ids: list[int]
    text: str | None
    finish_reason: str
    seconds: float
    verify_passes: int
    drafts_accepted: list[int]
    drafts_reached: list[int]
    accepted_mask: list[bool]
    logprobs: list[LogProb] | None = None
    drafts: int = 0
    lookups: int = 0
    lookup_mask: list[bool] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    @property
    def new_tokens(self) -> int:
        """Number of ``token_ids``."""
        return len(self.token_ids)

    @property
    def tokens_per_second(self) -> float:
        """``new_tokens / seconds``."""
        return self.new_tokens / max(self.seconds, 1e-9)

    @property
    def tokens_per_step(self) -> float:
        """Tokens from verify passes / ``verify_passes``, the trunk's own token included: 1 in plain
        decoding. The first token is left out: it comes from the prompt's pass."""
        return (self.new_tokens - 1) / self.verify_passes if self.verify_passes else 1.0

    @property
    def acceptance(self) -> list[float | None]:
        """For every draft position, drafts accepted / drafts that reached it; None if none did."""
        pairs = zip(self.drafts_accepted, self.drafts_reached, strict=True)
        return [accepted / reached if reached else None for accepted, reached in pairs]

    @property
    def lookups_accepted(self) -> int:
        """Number of ``lookups`` that were accepted."""
        return sum(self.lookup_mask)


def rates(generations: Sequence[Generation]) -> dict[str, float]:
    """``acceptance_position_j`` and ``tokens_per_step`` of the loop, pooled over generations, as
    :attr:`Generation.acceptance` and :attr:`Generation.tokens_per_step`."""
    return {
        # fp32, the precision that loggers store.
        name: float(np.float32(above_N.sum() / below_N.sum()))
        for name, (above_N, below_N) in rate_counts(generations).items()
        if below_N.sum()
    }


def rate_counts(generations: Sequence[Generation]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Numerators and denominators [N] of every rate, one per generation."""
    accepted_ND = np.array([g.drafts_accepted for g in generations])
    reached_ND = np.array([g.drafts_reached for g in generations])
    counts = {
        f"acceptance_position_{j + 1}": (accepted_ND[:, j], reached_ND[:, j])
        for j in range(reached_ND.shape[1])
    }
    passes_N = np.array([g.verify_passes for g in generations])
    # The first token comes from the prompt's pass.
    emitted_N = np.array([g.new_tokens - 1 for g in generations])
    return counts | {"tokens_per_step": (emitted_N, passes_N)}


class TextSequence:
    """Collects the tokens of one request and detects its end; counts acceptance for ``max_draft``
    positions. The tokenizer has ``decode(ids)`` and ``end_ids``, or is None.
    """

    def __init__(self, request: Request, max_draft: int, tokenizer: Any) -> None:
        self.request = request
        # Those so far; the last ones may turn out to belong to a stop string, see ``fresh``.
        self.token_ids: list[int] = []
        self.depths: list[int] = []
        self.lookup_mask: list[bool] = []
        self.logprobs: list[LogProb] = []
        self.rejected: list[Rejected] = []
        # ``length``, ``eot`` or ``stop``; None before the end.
        self.finish_reason: str | None = None
        # The ids that end the text, which have no text.
        self.ends: Sequence[int] = () if request.eot_id is None else (request.eot_id,)
        if request.eot_id is None and tokenizer is not None:
            self.ends = tokenizer.end_ids
        self._began = time.perf_counter()
        self._seconds = 0.0
        self._n_returned = 0
        # The characters that each token completes, for the first tokens, and the whole text of a
        # request with stop strings.
        self._pieces: list[str] = []
        self._detokenizer = Detokenizer(tokenizer, request.prompt, self.ends) if tokenizer else None
        self._text = ""
        self._passes = 0
        self._drafted = 0
        self._lookups = 0
        self._accepted = [0] * max_draft
        self._reached = [0] * max_draft
        self._longest_stop = max(map(len, request.stop), default=0)

    @property
    def remaining(self) -> int:
        """Number of tokens left to generate."""
        return self.request.max_new_tokens - len(self.token_ids)

    def take(self, result: RowResult, logits_TV: Tensor) -> int:
        """Take the result of a verify pass up to the text's end, and count its drafts. Returns how
        many tokens the text has kept. ``logits_TV`` are the trunk's, of at least as many tokens."""
        before, looked_up = len(self.token_ids), result.looked_up
        n_kept = self.extend(result.tokens, result.accepted, logits_TV, looked_up=looked_up)
        self._passes += 1
        n_drafts = result.accepted + len(result.rejected)
        self._drafted += n_drafts
        position = before + result.accepted
        self.rejected += [Rejected(position, *draft, looked_up) for draft in result.rejected]
        if looked_up:
            self._lookups += n_drafts
            return n_kept
        for j in range(min(result.reached, n_kept)):
            self._reached[j] += 1
            self._accepted[j] += j < result.accepted
        return n_kept

    def extend(
        self, tokens: list[int], accepted: int, logits_TV: Tensor, *, looked_up: bool = False
    ) -> int:
        """Append a round's tokens, the first ``accepted`` being drafts; otherwise as `take`."""
        tokens = tokens[: self.remaining]
        end = next((i for i, token in enumerate(tokens, 1) if token in self.ends), None)
        if end is not None:
            tokens = tokens[:end]
            self.finish_reason = "eot"
        before = len(self.token_ids)
        self.token_ids += tokens
        self.depths += [j + 1 if j < accepted else 0 for j in range(len(tokens))]
        self.lookup_mask += [looked_up and j < accepted for j in range(len(tokens))]
        if self.request.stop:
            self._look_for_stop(before)
        if self.finish_reason is None and self.remaining <= 0:
            self.finish_reason = "length"
        if self.request.logprobs is not None:
            self.logprobs += _logprobs(logits_TV, self.token_ids[before:], self.request.logprobs)
        if self.finish_reason is not None:
            self._seconds = time.perf_counter() - self._began
        return len(self.token_ids) - before

    def _detokenize(self, end: int) -> None:
        """Turn the first ``end`` tokens into text."""
        new = self.token_ids[len(self._pieces) : end]
        detokenizer = self._detokenizer
        self._pieces += map(detokenizer.add, new) if detokenizer else [""] * len(new)

    def _look_for_stop(self, before: int) -> None:
        """If a new token completes a stop string, drop the tokens after it and the characters from
        the stop string on."""
        for end in range(before + 1, len(self.token_ids) + 1):
            self._detokenize(end)
            searched = max(0, len(self._text) + 1 - self._longest_stop)
            self._text += self._pieces[-1]
            places = [i for s in self.request.stop if (i := self._text.find(s, searched)) >= 0]
            if places:
                del self.token_ids[end:], self.depths[end:], self.lookup_mask[end:]
                self._text = self._text[: min(places)]
                begins = itertools.accumulate(map(len, self._pieces), initial=0)
                self._pieces = [
                    piece[: max(len(self._text) - begin, 0)]
                    for piece, begin in zip(self._pieces, begins, strict=False)
                ]
                self.finish_reason = "stop"
                return

    def fresh(self) -> Fresh:
        """The tokens since the last call that certainly belong to the text. Tokens that could begin
        a stop string are held back. If a stop string was found, the last token returned is the last
        one with characters before it, and its piece ends there."""
        start, end = self._n_returned, max(self._n_returned, self._known_end())
        self._n_returned = end
        self._detokenize(end)
        rejected: list[list[Rejected]] = [[] for _ in range(start, end)]
        for draft in self.rejected[bisect_left(self.rejected, start, key=attrgetter("at")) :]:
            if draft.at < end:
                rejected[draft.at - start].append(draft)
        return Fresh(
            self.token_ids[start:end],
            self._pieces[start:end],
            self.depths[start:end],
            self.lookup_mask[start:end],
            rejected,
            self.logprobs[start:end],
        )

    def _known_end(self) -> int:
        end = len(self.token_ids)
        if self.finish_reason == "stop":
            # Up to the token that completes the text; the next ones begin with the stop string.
            return max((n for n, piece in enumerate(self._pieces, 1) if piece), default=0)
        if self.finish_reason is None and self.request.stop:
            assert self._detokenizer is not None
            if self._detokenizer.waits:  # for a character, which could begin a stop string
                return 0
            for s in self.request.stop:
                if any(self._text.endswith(s[:n]) for n in range(1, len(s))):
                    return 0
        return end

    def generation(self) -> Generation:
        """The result of a finished sequence."""
        assert self.finish_reason is not None
        self._detokenize(len(self.token_ids))
        text = None
        if self._detokenizer is not None:
            rest = "" if self.finish_reason == "stop" else self._detokenizer.rest()
            text = "".join(self._pieces) + rest
        return Generation(
            token_ids=self.token_ids,
            text=text,
            finish_reason=self.finish_reason,
            seconds=self._seconds,
            verify_passes=self._passes,
            drafts_accepted=self._accepted,
            drafts_reached=self._reached,
            accepted_mask=[depth > 0 for depth in self.depths],
            logprobs=self.logprobs if self.request.logprobs is not None else None,
            drafts=self._drafted,
            lookups=self._lookups,
            lookup_mask=self.lookup_mask,
            rejected=self.rejected,
        )


def _logprobs(logits_TV: Tensor, tokens: list[int], n_top: int) -> list[LogProb]:
    log_p_TV = logits_TV[: len(tokens)].float().log_softmax(-1)
    log_p_T = log_p_TV.gather(1, torch.tensor(tokens, device=logits_TV.device).unsqueeze(1))[:, 0]
    top = log_p_TV.topk(min(n_top, log_p_TV.shape[1]), dim=-1)
    rows = zip(tokens, log_p_T.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    return [LogProb(t, log_p, list(zip(ids, p, strict=True))) for t, log_p, ids, p in rows]
