"""One prompt's continuation: its tokens, its end, its counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Generation:
    """A finished continuation.

    Attributes:
        token_ids: all that was emitted, a final end-of-text token or stop string included.
        text: their text, without either; None without a tokenizer.
        finish_reason: ``length``, ``eot`` or ``stop``.
        new_tokens: number of ``token_ids``.
        seconds: from the start of its batch, the prompt's reading included.
        tokens_per_second: ``new_tokens / seconds``.
        verify_passes: passes of the trunk after the prompt's.
        tokens_per_step: tokens emitted by verify passes / ``verify_passes``, the trunk's own token
            included: 1 in plain decoding. The first token is the prompt's pass's.
        acceptance: by position, conditional: drafts accepted there / drafts that reached it, those
            behind the text's end left out; None where none did.
        drafts_accepted: the numerators.
        drafts_reached: the denominators.
        accepted_mask: which of ``token_ids`` were drafts.
    """

    token_ids: list[int]
    text: str | None
    finish_reason: str
    new_tokens: int
    seconds: float
    tokens_per_second: float
    verify_passes: int
    tokens_per_step: float
    acceptance: list[float | None]
    drafts_accepted: list[int]
    drafts_reached: list[int]
    accepted_mask: list[bool]


class RowOptions(Protocol):
    """What a row needs to know of the call."""

    @property
    def max_new_tokens(self) -> int: ...
    @property
    def stop(self) -> tuple[str, ...]: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def eot_id(self) -> int | None: ...
    @property
    def on_tokens(self) -> Callable[[int, list[int], list[bool]], None] | None: ...


class Row:
    """Collects one prompt's tokens and notices its end.

    Args:
        index: the prompt's.
        max_draft: positions to count acceptance for.
        options: of the call.
    """

    def __init__(self, index: int, max_draft: int, options: RowOptions) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.accepted_mask: list[bool] = []
        self.finish_reason: str | None = None
        self._options = options
        self._streamed = 0
        self._text: str | None = None
        self._passes = 0
        self._emitted = 0
        self._accepted = [0] * max_draft
        self._reached = [0] * max_draft
        # A token is a byte at least, so this many hold every stop string.
        self._stop_bytes = max((len(s.encode()) for s in options.stop), default=0)

    @property
    def remaining(self) -> int:
        """Tokens still wanted."""
        return self._options.max_new_tokens - len(self.token_ids)

    def take_round(self, tokens: list[int], accepted: int, reached: int) -> None:
        """Take and count one verify pass, as far as the text goes: what was drafted behind its end
        was judged, but is no part of it."""
        before = len(self.token_ids)
        self.extend(tokens, accepted)
        kept = len(self.token_ids) - before
        self._passes += 1
        self._emitted += kept
        for j in range(min(reached, kept)):
            self._reached[j] += 1
            self._accepted[j] += j < accepted

    def extend(self, tokens: list[int], accepted: int) -> None:
        """Take a round's tokens, the first ``accepted`` of them drafts, as far as the end."""
        options = self._options
        tokens = tokens[: self.remaining]
        if options.eot_id in tokens:
            tokens = tokens[: tokens.index(options.eot_id) + 1]
            self.finish_reason = "eot"
        before = len(self.token_ids)
        self.token_ids += tokens
        self.accepted_mask += [j < accepted for j in range(len(tokens))]
        if options.stop:
            self._look_for_stop(before)
        if self.finish_reason is None and self.remaining <= 0:
            self.finish_reason = "length"
        if options.on_tokens is not None:
            self._stream()

    def _decode(self, ids: list[int]) -> str:
        ids = [token for token in ids if token != self._options.eot_id]
        return self._options.tokenizer.decode(ids)

    def _look_for_stop(self, before: int) -> None:
        """Cut the tokens behind the one that completes a stop string, if a new one does."""
        stop = self._options.stop
        first = max(0, before - self._stop_bytes)
        if not any(s in self._decode(self.token_ids[first:]) for s in stop):
            return
        for end in range(before + 1, len(self.token_ids) + 1):
            if any(s in self._decode(self.token_ids[first:end]) for s in stop):
                del self.token_ids[end:], self.accepted_mask[end:]
                text = self._decode(self.token_ids)
                places = [text.find(s) for s in stop if s in text]
                self._text = text[: min(places)] if places else text
                self.finish_reason = "stop"
                return

    def _stream(self) -> None:
        """Hand on the new tokens, but hold back what may become a stop string."""
        assert self._options.on_tokens is not None
        end = len(self.token_ids)
        if self.finish_reason == "stop":
            assert self._text is not None
            while end > self._streamed and len(self._decode(self.token_ids[:end])) > len(
                self._text
            ):
                end -= 1
        elif self.finish_reason is None and self._options.stop:
            tail = self._decode(self.token_ids[max(0, end - self._stop_bytes) :])
            for s in self._options.stop:
                if any(tail.endswith(s[:n]) for n in range(1, len(s))):
                    return
        if end > self._streamed:
            self._options.on_tokens(
                self.index,
                self.token_ids[self._streamed : end],
                self.accepted_mask[self._streamed : end],
            )
            self._streamed = end

    def generation(self, seconds: float) -> Generation:
        """The result, ``seconds`` after the batch began."""
        assert self.finish_reason is not None
        text = self._text
        if text is None and self._options.tokenizer is not None:
            text = self._decode(self.token_ids)
        n = len(self.token_ids)
        return Generation(
            token_ids=self.token_ids,
            text=text,
            finish_reason=self.finish_reason,
            new_tokens=n,
            seconds=seconds,
            tokens_per_second=n / max(seconds, 1e-9),
            verify_passes=self._passes,
            tokens_per_step=self._emitted / self._passes if self._passes else 1.0,
            acceptance=[
                a / r if r else None for a, r in zip(self._accepted, self._reached, strict=True)
            ],
            drafts_accepted=self._accepted,
            drafts_reached=self._reached,
            accepted_mask=self.accepted_mask,
        )
