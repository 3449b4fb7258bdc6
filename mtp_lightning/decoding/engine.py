"""Decoding of a batch whose sequences come and go; ``generate`` and serving are loops over it.

    with Engine(model, DecodingOptions(batch_size=8), tokenizer=tokenizer) as engine:
        sequences = engine.add([Request(prompt=[1, 2], max_new_tokens=20)])
        while engine.sequences:
            for sequence in engine.step():
                print(sequence.request.index, sequence.fresh().token_ids, sequence.finish_reason)

A text depends on its own request alone, not on the other sequences of the batch. Greedy text equals
that of plain decoding token for token; a sample is determined by ``seed``, ``index`` and the number
of its drafts. With ``draft_depth="auto"`` and no measurement a sample also depends on timing, and
with ``lookup`` on whether the engine has one slot, but its distribution remains the trunk's.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtp_lightning.decoding.fused import decoding_passes
from mtp_lightning.decoding.options import DecodingOptions, Request
from mtp_lightning.decoding.sequence import TextSequence
from mtp_lightning.decoding.session import Session
from mtp_lightning.decoding.speculative import Decoder, Round
from mtp_lightning.decoding.verification import RULES
from mtp_lightning.errors import UserError, counted, lacks_memory
from mtp_lightning.model import MTPModel
from mtp_lightning.settings import is_whole

if TYPE_CHECKING:
    from mtp_lightning.decoding.adaptive import AutoDepth
    from mtp_lightning.decoding.lookup import Lookups


class Engine:
    """Decodes up to ``slots`` requests together, in rounds.

    It is a context manager and works only while entered, with the model in eval mode and its
    weights packed. All calls must come from the thread that entered it, except :meth:`check`.

    Args:
        model: any variant that decodes token by token, on its device.
        options: how texts are drafted, and how many are decoded together. The options of single
            texts are taken from the requests instead.
        tokenizer: with ``decode(ids)`` and ``end_ids``, for texts and stop strings.
        on_logits: called with a request's index and the trunk's logits [T, V] that its new tokens
            were chosen by, round by round.
        depths: chooses the number of drafts of every round, in the place of ``"auto"``.

    Raises:
        UserError: the model cannot decode as the options ask.
    """

    def __init__(
        self,
        model: MTPModel,
        options: DecodingOptions,
        *,
        tokenizer: Any = None,
        on_logits: Callable[[int, Tensor], None] | None = None,
        depths: AutoDepth | None = None,
    ) -> None:
        if model.config.mtp.answers_at_once:
            raise UserError(
                f"a model of mtp={model.config.mtp.variant} predicts a task's whole answer at once "
                "and not token by token: ask it by evaluate.py."
            )
        self.options = options
        self.slots = options.slots
        self.max_draft = options.max_draft(model)
        self.tokenizer = tokenizer
        self._limit = options.max_context or sys.maxsize
        # Tokens that sliding keeps of a full context.
        self._kept = max(self._limit // 2, 1)
        self._on_logits = on_logits or (lambda index, logits_TV: None)
        self._model = model
        self._sequences: list[TextSequence] = []
        self._decoder: Decoder | None = None
        # Other programs make the wall time of a round longer, but not the CPU time of its thread.
        one_thread = model.head.weight.device.type == "cpu" and torch.get_num_threads() == 1
        self._clock = time.thread_time if one_thread else time.perf_counter
        self._auto = depths
        if depths is None and options.draft_depth == "auto" and self.max_draft:
            from mtp_lightning.decoding.adaptive import AutoDepth

            measured = options.measured
            self._auto = AutoDepth(self.max_draft, None if measured is None else measured.greedy)
        self._lookups: Lookups | None = None
        if options.lookup:
            from mtp_lightning.decoding.lookup import Lookups

            self._lookups = Lookups(model, most=options.lookup, slots=self.slots)
        self._inside = ExitStack()

    def __enter__(self) -> Engine:
        self._inside.enter_context(decoding_passes(self._model))
        return self

    def __exit__(self, *exception: object) -> None:
        self._sequences.clear()
        self._decoder = None
        self._inside.close()

    @property
    def sequences(self) -> Sequence[TextSequence]:
        """The sequences being decoded, in no particular order."""
        return tuple(self._sequences)

    @property
    def free(self) -> int:
        """Number of slots without a sequence."""
        return self.slots - len(self._sequences)

    def check(self, request: Request) -> None:
        """Refuse a request that :meth:`add` would refuse. Any thread may call it.

        Raises:
            UserError: the prompt is empty or holds an unknown token, the text would exceed the
                context, or there are stop strings and no tokenizer.
        """
        ids, name = request.prompt, f"Prompt {request.index}"
        vocab = self._model.config.trunk.vocab_size
        if not len(ids):
            raise UserError(f"{name} is empty: give at least one token.")
        for token in ids:
            if not is_whole(token) or not 0 <= token < vocab:
                raise UserError(
                    f"{name} holds {token!r}, not a token id of the model (0 to {vocab - 1}): "
                    "encode it with the tokenizer that the model was trained with."
                )
        if request.stop and self.tokenizer is None:
            raise UserError(f"stop={list(request.stop)} needs a tokenizer: pass tokenizer=.")
        # The last new token is never read.
        total = len(ids) + request.max_new_tokens - 1
        if self.options.long == "refuse" and total > self._limit:
            raise UserError(
                f"{name} ({counted(len(ids), 'token')}) and {request.max_new_tokens} new tokens "
                f"exceed the context of {self._limit} that the model was trained on: shorten the "
                "prompt, lower max_new_tokens, or set long=slide."
            )

    def add(self, requests: Sequence[Request]) -> list[TextSequence]:
        """Prefill new sequences, at most :attr:`free`, and choose their first tokens. Returns one
        sequence per request, in order; one whose first token is its last takes no slot.

        Raises:
            UserError: there are too many requests, :meth:`check` refuses one, or the memory is too
                small for them; the other sequences stay as they were.
        """
        if len(requests) > self.free:
            slots = f"{self.free} free slots of {self.slots}"
            raise UserError(f"{len(requests)} requests for {slots}: wait until one has finished.")
        for request in requests:
            self.check(request)
        if not requests:
            return []
        try:
            sequences = self._join(requests)
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            if self._decoder is not None:
                self._decoder.keep_rows(len(self._sequences))
            longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
            raise UserError(
                f"{longest} tokens of a text, in {self.slots} slots, do not fit into the memory: "
                "shorten the prompt, ask for fewer new tokens, or lower batch_size."
            ) from error
        self._sequences += sequences
        self._free_finished()
        return sequences

    def _join(self, requests: Sequence[Request]) -> list[TextSequence]:
        prompts = [list(request.prompt) for request in requests]
        # `check` lets a longer prompt pass only with long="slide".
        contexts = [ids if len(ids) <= self._limit else ids[-self._kept :] for ids in prompts]
        lengths = [len(c) + r.max_new_tokens for c, r in zip(contexts, requests, strict=True)]
        room = min(max(lengths), self._limit)
        if self._decoder is None:
            self._decoder = self._new_decoder(room)
        self._decoder.session.reserve(room)
        sequences = [TextSequence(r, self.max_draft, self.tokenizer) for r in requests]
        streams = [(r.seed, r.index, self._most_drafts_of(r)) for r in requests]
        tokens, logits_BV = self._decoder.join(contexts, [r.sampling for r in requests], streams)
        rows = zip(sequences, tokens, logits_BV.unsqueeze(1), strict=True)
        for sequence, token, logits_1V in rows:
            n_kept = sequence.extend([token], 0, logits_1V)
            self._on_logits(sequence.request.index, logits_1V[:n_kept])
        return sequences

    def step(self) -> list[TextSequence]:
        """Run one round for every sequence: draft, verify, accept.

        Returns:
            The sequences that took part. Each has grown by at least one token, which
            :meth:`TextSequence.fresh` may still hold back. Those with a ``finish_reason`` are done,
            and their slots are free.
        """
        sequences = list(self._sequences)
        if not sequences:
            return []
        assert self._decoder is not None
        for row, n in enumerate(self._decoder.session.n_read):
            if n >= self._limit:
                self._decoder.session.slide(row, self._kept)
        outcome = self._round(self._decoder)
        rows = zip(sequences, outcome.rows, outcome.logits_BTV.unbind(), strict=True)
        for sequence, result, logits_TV in rows:
            n_kept = sequence.take(result, logits_TV)
            self._on_logits(sequence.request.index, logits_TV[:n_kept])
        self._free_finished()
        return sequences

    def run(self, requests: Iterable[Request]) -> Iterator[TextSequence]:
        """Decode any number of requests to their ends, each in the first slot that becomes free.

        Yields:
            The sequences that have just joined, and after every round those that took part; each
            with a ``finish_reason`` once, at its end.
        """
        waiting = deque(requests)
        while waiting or self._sequences:
            yield from self.add([waiting.popleft() for _ in range(min(self.free, len(waiting)))])
            yield from self.step()

    def remove(self, sequence: TextSequence) -> None:
        """Stop decoding a sequence before its end and free its slot.

        Raises:
            UserError: the sequence is not in this engine, or has already finished.
        """
        if sequence not in self._sequences:
            index = sequence.request.index
            raise UserError(f"the sequence of prompt {index} is not in this engine.")
        self._drop(self._sequences.index(sequence))

    def _new_decoder(self, capacity: int) -> Decoder:
        options = self.options
        common: dict[str, Any] = {"slots": self.slots, "capacity": capacity}
        common |= {"draft_vocab": options.draft_vocab, "one_cache": options.cache == "single"}
        if options.tree is not None:
            from mtp_lightning.decoding.tree_session import TreeSession
            from mtp_lightning.decoding.tree_speculative import TreeDecoder

            tree = TreeSession(self._model, tree=options.tree, **common)
            return TreeDecoder(tree, most_drafts=len(options.tree))
        kind, most = Session, max(self.max_draft, options.lookup)
        if options.compile:
            from mtp_lightning.decoding.compiled import CompiledSession

            kind = CompiledSession
        return Decoder(
            kind(self._model, max_draft=self.max_draft, most_accepted=most, **common),
            most_drafts=most,
            min_confidence=options.min_confidence,
            verify=RULES[options.verify],
        )

    def _round(self, decoder: Decoder) -> Round:
        # After the accepted drafts comes a token of the trunk's own.
        rooms = [
            min(sequence.remaining, self._limit - n) - 1
            for sequence, n in zip(self._sequences, decoder.session.n_read, strict=True)
        ]
        n_drafts, caps, recorder = self._plan(rooms)
        looked_up = [] if self._lookups is None else self._lookups.drafts(self._sequences, rooms)
        if any(looked_up):
            caps = [len(ids) or cap for ids, cap in zip(looked_up, caps, strict=True)]
            n_drafts, recorder = 0 if all(looked_up) else n_drafts, None
        start = self._clock()
        outcome = decoder.round(n_drafts, caps, looked_up)
        if recorder is not None:
            seconds = self._clock() - start
            # A draft that was not made, for lack of confidence, counts as a failed one.
            accepted = [row.accepted for row in outcome.rows]
            reached = [min(a + 1, n_drafts, cap) for a, cap in zip(accepted, caps, strict=True)]
            recorder.record(n_drafts, seconds, accepted, reached)
        return outcome

    def _plan(self, rooms: Sequence[int]) -> tuple[int, list[int], AutoDepth | None]:
        """Plan the next round, by the most drafts that fit into each row.

        Returns:
            The number of drafts that the modules make for every row; for each row, the most that
            it accepts; and the :class:`AutoDepth` to record the round with, None if a row's number
            is fixed or no row has room for as many drafts as it chose.
        """
        auto, default = self._auto, self.max_draft
        fixed_depths = [self._fixed_depth(sequence.request) for sequence in self._sequences]
        free = all(depth is None for depth in fixed_depths)
        if auto is not None:
            default = auto.depth(len(fixed_depths), max(rooms)) if free else auto.best
        depths = [default if depth is None else depth for depth in fixed_depths]
        most = default if auto is None else max(depths)
        caps = [min(room, depth) for room, depth in zip(rooms, depths, strict=True)]
        # A compiled pass has a fixed width; drafts beyond a row's cap are not verified.
        n_drafts = most if self.options.compile else min(most, max(caps))
        return n_drafts, caps, auto if free and n_drafts == most else None

    def _fixed_depth(self, request: Request) -> int | None:
        """The request's fixed number of drafts: its own setting, or the measured number if it
        samples, since its text depends on it; None if the number may vary."""
        measured = self.options.measured
        if request.draft_depth is not None:
            return min(request.draft_depth, self.max_draft)
        return measured.sampled.best if measured is not None and request.temperature else None

    def _most_drafts_of(self, request: Request) -> int:
        """The most drafts of a request's rounds."""
        if self.options.tree is not None:
            return len(self.options.tree)
        fixed = self._fixed_depth(request)
        return max(self.max_draft if fixed is None else fixed, self.options.lookup)

    def _free_finished(self) -> None:
        for i in reversed(range(len(self._sequences))):
            if self._sequences[i].finish_reason is not None:
                self._drop(i)

    def _drop(self, i: int) -> None:
        assert self._decoder is not None
        self._sequences[i] = self._sequences[-1]
        self._sequences.pop()
        self._decoder.drop_row(i)
