"""The metrics of ``/metrics``, in Prometheus' text format."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mtp_lightning.decoding.sequence import Generation

_ROUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_WAITS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Meters:
    """The metrics of one server, in a separate registry."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter = partial(Counter, registry=self._registry)
        gauge = partial(Gauge, registry=self._registry)
        histogram = partial(Histogram, registry=self._registry)
        ended = "Requests that ended, by status; 499: the client disconnected."
        self._requests = counter("mtp_requests", ended, ["status"])
        # The worker connects these two to its queue and its slots.
        self.queue = gauge("mtp_queue_length", "Requests that wait for a slot.")
        self.rows = gauge("mtp_rows", "Slots in use.")
        self.prompt_tokens = counter("mtp_prompt_tokens", "Tokens read.")
        self.tokens = counter("mtp_tokens", "Tokens emitted.")
        self._accepted = counter(
            "mtp_drafts_accepted", "Modules' drafts accepted, of texts that ended.", ["position"]
        )
        self._reached = counter(
            "mtp_drafts_reached", "Modules' drafts judged, of texts that ended.", ["position"]
        )
        self._lookups = counter("mtp_lookups", "Drafts looked up in the text, of texts that ended.")
        self._lookups_accepted = counter(
            "mtp_lookups_accepted", "Looked-up drafts accepted, of texts that ended."
        )
        self.round = histogram("mtp_round_seconds", "A round.", buckets=_ROUNDS)
        self.first_token = histogram(
            "mtp_first_token_seconds", "From a request to its first token.", buckets=_WAITS
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
