"""Drafts that are looked up in the text itself: what followed the same words before.

Prompt lookup (Saxena 2023; LLMA, arXiv 2304.04487) needs no model: the longest end of the text that
has stood in it before proposes the tokens that followed it there. The number of drafts depends on
how often proposals after an equally long match were right, so that a text that does not repeat
itself is hardly ever drafted. (In SuffixDecoding, arXiv 2411.04975, it depends on the length of the
match.)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, count, takewhile
from operator import mul
from weakref import WeakKeyDictionary

import numpy as np
import torch

from mtp_lightning.decoding.options import MOST_DRAFTS, Prompt
from mtp_lightning.decoding.sequence import Generation, TextSequence
from mtp_lightning.model import MTPModel

# Longest match that is looked for.
_LONGEST = 16
# At first, a proposal after a match of l tokens is taken to be right with probability l / (l + 3).
# This guess weighs as much as this number of judged proposals.
_GUESS = 4.0
# Tokens are proposed while the product of their estimated probabilities is at least this: in greedy
# texts, and in samples, which repeat themselves less. Measured on texts of SmolLM2: if verifying a
# token costs 0.3 plain passes, lookups slow no text by more than 1 %, not counting the time to make
# the drafts.
_WORTH, _WORTH_IN_SAMPLES = 0.3, 0.5


class Lookup:
    """A growing text, greedy or ``sampled``, which proposes its own continuation."""

    def __init__(self, prompt: Sequence[int], *, sampled: bool = False) -> None:
        self._ids = np.empty(2 * len(prompt), np.int64)
        self.n = 0  # number of its tokens
        length = np.arange(_LONGEST + 1)
        # For each length of the match: the proposals that were right, and all judged ones.
        self._n_right = _GUESS * length / (length + 3)
        self._n_judged = np.full(_LONGEST + 1, _GUESS)
        self._worth = _WORTH_IN_SAMPLES if sampled else _WORTH
        self._length, self._proposed = 0, self._ids[:0]
        self.add(prompt)

    def add(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text, and compare the last proposal with them."""
        judged = zip(count(self._length), self._proposed, tokens, strict=False)
        for length, proposed, token in judged:
            length = min(length, _LONGEST)
            self._n_judged[length] += 1
            if proposed != token:
                break
            self._n_right[length] += 1
        end = self.n + len(tokens)
        if end > len(self._ids):
            self._ids = np.concatenate([self._ids[: self.n], np.empty(end, np.int64)])
        self._ids[self.n : end] = tokens
        self.n = end
        self._length, start = longest_match(self._ids[:end])
        # A proposal that reaches the text's end continues with its own beginning.
        self._proposed = np.resize(self._ids[start:end], MOST_DRAFTS if self._length else 0)

    def drafts(self, most: int) -> list[int]:
        """The tokens that are proposed to follow, up to ``most``."""
        lengths = np.minimum(self._length + np.arange(len(self._proposed)), _LONGEST)
        shares = self._n_right[lengths] / self._n_judged[lengths]
        worth = sum(all_right >= self._worth for all_right in accumulate(shares[:most], mul))
        return self._proposed[:worth].tolist()


def longest_match(ids: np.ndarray) -> tuple[int, int]:
    """The longest end of a text, up to 16 tokens, that occurs in it before: its length, and the
    place after its last earlier occurrence. The length is 0 if even the last token is new."""
    n, length, start = len(ids), 0, len(ids)
    ends = np.flatnonzero(ids[: n - 1] == ids[n - 1])
    while len(ends) and length < _LONGEST:
        start, length = int(ends[-1]) + 1, length + 1
        ends = ends[ends >= length]
        ends = ends[ids[ends - length] == ids[n - 1 - length]]
    return length, start


def lookups_alone(prompts: Sequence[Prompt], generations: Sequence[Generation]) -> dict[str, float]:
    """``lookup_tokens_per_step``: the tokens per pass of greedy continuations if all drafts were
    looked up, at most 8 per round; no model runs. Empty without a pass."""
    tokens = passes = 0
    for prompt, generation in zip(prompts, generations, strict=True):
        ids = generation.token_ids
        text = Lookup(list(map(int, prompt)))
        text.add(ids[:1])  # by the prompt's pass
        position = 1
        while position < len(ids):
            drafts = text.drafts(min(8, len(ids) - position - 1))
            pairs = zip(drafts, ids[position:], strict=False)
            end = position + 1 + len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
            text.add(ids[position:end])
            passes, position = passes + 1, end
        tokens += len(ids) - 1
    # fp32, the precision that loggers store.
    return {"lookup_tokens_per_step": float(np.float32(tokens / passes))} if passes else {}


class Lookups:
    """The lookups of a decoding engine's texts, of which ``slots`` are decoded together, with at
    most ``most`` drafts per round."""

    def __init__(self, model: MTPModel, *, most: int, slots: int) -> None:
        self._tokens_are_cheap = extra_tokens_are_cheap(model.head.weight.device)
        self._most = most
        self._slots = slots
        self._texts = WeakKeyDictionary[TextSequence, Lookup]()

    def drafts(self, sequences: Sequence[TextSequence], rooms: Sequence[int]) -> list[list[int]]:
        """The drafts of the next round from every sequence's own text, at most as many as the room
        of each.

        On a CPU there are none while texts are decoded together, since a pass takes time for every
        token. A sample then has none in an engine of several slots at all, since its text depends
        on its drafts.
        """
        if len(sequences) > 1 and not self._tokens_are_cheap:
            return [[] for _ in sequences]
        return [
            self._lookup_of(sequence).drafts(min(room, self._most))
            if sequence.request.draft_depth != 0
            and (sequence.request.greedy or self._slots == 1 or self._tokens_are_cheap)
            else []
            for sequence, room in zip(sequences, rooms, strict=True)
        ]

    def _lookup_of(self, sequence: TextSequence) -> Lookup:
        """The lookup of a sequence, with all its tokens so far."""
        request, text = sequence.request, self._texts.get(sequence)
        if text is None:
            text = Lookup(list(request.prompt), sampled=not request.greedy)
            self._texts[sequence] = text
        text.add(sequence.token_ids[text.n - len(request.prompt) :])
        return text


def extra_tokens_are_cheap(device: torch.device) -> bool:
    """Whether a pass takes hardly more time for more tokens, so that drafts pay that only some of
    its rows have: on a CPU every token takes time."""
    return device.type != "cpu"
