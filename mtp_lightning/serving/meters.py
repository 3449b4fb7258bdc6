"""The metrics of ``/metrics``, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_ROUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_WAITS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Meters:
    """The metrics of one server, in a separate registry."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        every: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter(
            "mtp_requests", "Requests that ended, by status; 499 hung up.", ["status"], **every
        )
        self._queue = Gauge("mtp_queue_length", "Requests that wait for a place.", **every)
        self._rows = Gauge("mtp_rows", "Places in use.", **every)
        self._prompt_tokens = Counter("mtp_prompt_tokens", "Tokens read.", **every)
        self._tokens = Counter("mtp_tokens", "Tokens emitted.", **every)
        self._accepted = Counter(
            "mtp_drafts_accepted", "Drafts accepted, of texts that ended.", ["position"], **every
        )
        self._reached = Counter(
            "mtp_drafts_reached", "Drafts judged, of texts that ended.", ["position"], **every
        )
        self._round = Histogram("mtp_round_seconds", "A round.", buckets=_ROUNDS, **every)
        self._first = Histogram(
            "mtp_first_token_seconds", "From a request to its first token.", buckets=_WAITS, **every
        )

    def watch(self, queue: Callable[[], int], rows: Callable[[], int]) -> None:
        """Set functions that return the current queue length and number of rows."""
        self._queue.set_function(queue)
        self._rows.set_function(rows)

    def ended(self, status: int) -> None:
        """Count a finished request."""
        self._requests.labels(str(status)).inc()

    def read(self, tokens: int) -> None:
        """Count the tokens of a prompt."""
        self._prompt_tokens.inc(tokens)

    def emitted(self, tokens: int) -> None:
        """Count new tokens."""
        self._tokens.inc(tokens)

    def first_token(self, seconds: float) -> None:
        """Record how long a client waited for its first token."""
        self._first.observe(seconds)

    def round(self, seconds: float) -> None:
        """Record how long a round took."""
        self._round.observe(seconds)

    def drafts(self, accepted: Sequence[int], reached: Sequence[int]) -> None:
        """Count a text's drafts by position."""
        for position, (yes, judged) in enumerate(zip(accepted, reached, strict=True), start=1):
            self._accepted.labels(str(position)).inc(yes)
            self._reached.labels(str(position)).inc(judged)

    def text(self) -> bytes:
        """All metrics as text."""
        return generate_latest(self._registry)
