"""The metrics of ``/metrics``, in Prometheus' text format."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mtp_lightning.decoding.sequence import Generation

_ROUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_WAITS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Meters:
    """The metrics of one server, in a separate registry.

    Attributes:
        queue, rows: gauges that the worker connects to its queue and its slots.
        prompt_tokens, tokens: counters.
        first_token, round: histograms, in seconds.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        args: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter(
            "mtp_requests", "Requests that ended, by status; 499 hung up.", ["status"], **args
        )
        self.queue = Gauge("mtp_queue_length", "Requests that wait for a slot.", **args)
        self.rows = Gauge("mtp_rows", "Slots in use.", **args)
        self.prompt_tokens = Counter("mtp_prompt_tokens", "Tokens read.", **args)
        self.tokens = Counter("mtp_tokens", "Tokens emitted.", **args)
        self._accepted = Counter(
            "mtp_drafts_accepted",
            "Modules' drafts accepted, texts that ended.",
            ["position"],
            **args,
        )
        self._reached = Counter(
            "mtp_drafts_reached",
            "Modules' drafts judged, of texts that ended.",
            ["position"],
            **args,
        )
        self._lookups = Counter(
            "mtp_lookups", "Drafts looked up in the text, of texts that ended.", **args
        )
        self._lookups_accepted = Counter(
            "mtp_lookups_accepted", "Looked-up drafts accepted, of texts that ended.", **args
        )
        self.round = Histogram("mtp_round_seconds", "A round.", buckets=_ROUNDS, **args)
        self.first_token = Histogram(
            "mtp_first_token_seconds", "From a request to its first token.", buckets=_WAITS, **args
        )

    def ended(self, status: int) -> None:
        """Count a finished request."""
        self._requests.labels(str(status)).inc()

    def drafts(self, done: Generation) -> None:
        """Count a finished text's drafts: the modules' by position, and the looked-up ones."""
        pairs = zip(done.drafts_accepted, done.drafts_reached, strict=True)
        for position, (accepted, reached) in enumerate(pairs, start=1):
            self._accepted.labels(str(position)).inc(accepted)
            self._reached.labels(str(position)).inc(reached)
        self._lookups.inc(done.lookups)
        self._lookups_accepted.inc(done.lookups_accepted)

    def text(self) -> bytes:
        """All metrics as text."""
        return generate_latest(self._registry)
