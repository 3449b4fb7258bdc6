"""The thread that owns the engine: texts wait for a slot, and grow round by round.

Only this thread uses the model. Other threads submit and cancel texts under one lock.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from mtp_lightning.decoding.engine import Engine
from mtp_lightning.decoding.sequence import TextSequence
from mtp_lightning.errors import UserError
from mtp_lightning.serving.meters import Meters
from mtp_lightning.serving.refusal import HUNG_UP, Refusal
from mtp_lightning.serving.served_text import News, ServedText

# Shortest time between two news of a text. A small model makes thousands of passes a second, and
# sending each of them took most of the server's time.
_QUIET_SECONDS = 0.02


class Worker(threading.Thread):
    """A thread that decodes texts with an engine that nothing else uses, while at most ``queue``
    wait. It calls ``on_failure`` if a defect ends it.
    """

    def __init__(
        self, engine: Engine, *, queue: int, meters: Meters, on_failure: Callable[[], None]
    ) -> None:
        super().__init__(name="decoding", daemon=True)
        self.failure: BaseException | None = None  # the exception that ended the thread
        self.cut = 0  # number of texts that the end of the server cut short
        self._engine = engine
        self._queue = queue
        self._meters = meters
        self._on_failure = on_failure
        self._waiting: deque[ServedText] = deque()
        self._running: dict[TextSequence, ServedText] = {}
        self._joining: list[ServedText] = []
        self._changed = threading.Condition()
        self._ends_at: float | None = None  # by time.monotonic()
        self._threads = torch.get_num_threads()
        meters.queue.set_function(lambda: len(self._waiting))
        meters.rows.set_function(lambda: len(self._running))

    @property
    def alive(self) -> bool:
        """Whether the worker accepts texts."""
        return self.is_alive() and self._ends_at is None

    def submit(self, served: ServedText) -> None:
        """Put a text at the end of the queue.

        Raises:
            Refusal: the queue is full, or the server is ending.
        """
        with self._changed:
            if not self.alive:
                raise _ending()
            free = self._engine.slots - len(self._running) - len(self._joining)
            if len(self._waiting) >= self._queue + free:
                message = f"{self._queue} requests are waiting already: try again later."
                raise Refusal(message, status=429, code="queue_full", retry_after=1)
            self._waiting.append(served)
            self._changed.notify()

    def cancel(self, served: ServedText) -> None:
        """Cancel the text of a disconnected client: it leaves the queue, or its slot is freed after
        the current round. A finished text is left alone."""
        with self._changed:
            if served in self._waiting:
                self._waiting.remove(served)
            served.tell(Refusal("The client has hung up.", status=HUNG_UP))

    def close(self, grace: float) -> None:
        """Accept no more texts, refuse the waiting ones, give running ones ``grace`` seconds to
        finish, and end."""
        with self._changed:
            if self._ends_at is None:
                self._ends_at = time.monotonic() + grace
            while self._waiting:
                self._waiting.popleft().tell(_ending())
            self._changed.notify()

    def hurry(self) -> None:
        """Cut running texts short. It takes no lock, because signal handlers call it."""
        self._ends_at = time.monotonic()

    def run(self) -> None:
        """Decode until the worker is closed, or a defect ends it."""
        torch.set_num_threads(self._threads)  # PyTorch keeps this setting per thread
        try:
            with self._engine:
                while self._turn():
                    pass
        except BaseException as error:
            self.failure = error
            self._on_failure()
        finally:
            self.close(0)
            # Also the texts that a defect kept from joining the running ones.
            for served in (*self._running.values(), *self._joining):
                self.cut += not served.over
                served.tell(_ending())
            self._running.clear()

    def _turn(self) -> bool:
        """Decode one round of all sequences, including new ones; returns whether to continue."""
        with self._changed:
            while not (self._waiting or self._running or self._ends_at is not None):
                self._changed.wait()
            # Read once: texts taken from the queue after the end was noticed would be lost.
            ends_at = self._ends_at
            gone = [sequence for sequence, served in self._running.items() if served.over]
            free = 0 if ends_at is not None else self._engine.free + len(gone)
            self._joining = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        for sequence in gone:
            self._engine.remove(sequence)
            del self._running[sequence]
        if ends_at is not None and (not self._running or time.monotonic() >= ends_at):
            return False
        self._join(self._joining)
        began = time.perf_counter()
        sequences = self._engine.step()
        if sequences:
            self._meters.round.observe(time.perf_counter() - began)
        for sequence in sequences:
            self._tell(sequence)
        return True

    def _join(self, texts: list[ServedText]) -> None:
        if self._add(texts) is not None:
            for served in texts:  # one of them may fit
                if (refusal := self._add([served])) is not None:
                    served.tell(refusal)
        self._joining = []

    def _add(self, texts: list[ServedText]) -> Refusal | None:
        """Add texts to the engine; returns the refusal of texts that the memory does not hold."""
        try:
            sequences = self._engine.add([served.request for served in texts])
        except UserError as error:  # `BodyParser` has checked the requests
            return Refusal(str(error), status=503)
        with self._changed:
            self._running.update(zip(sequences, texts, strict=True))
            self._joining = [served for served in self._joining if served not in texts]
        for sequence, served in zip(sequences, texts, strict=True):
            self._meters.prompt_tokens.inc(len(served.request.prompt))
            served.began_at = time.perf_counter()
            self._meters.first_token.observe(served.began_at - served.asked_at)
            self._tell(sequence)
        return None

    def _tell(self, sequence: TextSequence) -> None:
        served, now = self._running[sequence], time.perf_counter()
        self._meters.tokens.inc(len(sequence.token_ids) - served.tokens)
        served.tokens = len(sequence.token_ids)
        if sequence.finish_reason is None and now < served.quiet_until:
            return
        served.quiet_until = now + _QUIET_SECONDS
        fresh = sequence.fresh()
        text, done = "".join(fresh.pieces), None
        if sequence.finish_reason is not None:
            done = sequence.generation()
            # Adds an incomplete character.
            text += (done.text or "")[served.length + len(text) :]
            self._meters.drafts(done)
            del self._running[sequence]
        served.length += len(text)
        if fresh.token_ids or done:
            served.tell(News(text=text, fresh=fresh, seconds=now - served.began_at, done=done))


def _ending() -> Refusal:
    return Refusal("The server is ending: ask again when it is back.", status=503, code="ending")
