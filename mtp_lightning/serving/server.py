"""Starts the server with its worker. A signal stops both, after running texts have finished."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from mtp_lightning.decoding.engine import Engine
from mtp_lightning.experiment.generating import decoding_options
from mtp_lightning.opening import OpenedModel
from mtp_lightning.serving.app import Endpoint
from mtp_lightning.serving.guard import Connection
from mtp_lightning.serving.meters import Meters
from mtp_lightning.serving.worker import Worker

# Seconds for the current round, and after the last one for sending the rest.
_SPARE_SECONDS = 5


class Server(uvicorn.Server):
    """Serves one model at one address; the arguments are those of :class:`Endpoint`.

    Raises:
        UserError: an option is out of range, or the model does not support it.
    """

    def __init__(self, cfg: Any, run: OpenedModel, *, name: str) -> None:
        self.signum: int | None = None  # of the signal that stopped it; None before
        self._grace = float(cfg.grace)
        engine = Engine(run.model, decoding_options(cfg, run), tokenizer=run.tokenizer)
        meters = Meters()
        self.worker = Worker(engine, queue=cfg.queue, meters=meters, on_failure=self._stop)
        endpoint = Endpoint(cfg, run, name=name, engine=engine, worker=self.worker, meters=meters)
        config = uvicorn.Config(
            endpoint.app(),
            http=Connection,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=_SPARE_SECONDS,
        )
        super().__init__(config)

    def _stop(self) -> None:
        self.should_exit = True

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer until a signal or a defect, which is then in ``worker.failure``."""
        self.worker.start()
        try:
            super().run(sockets)
        finally:
            self.worker.close(0)
            self.worker.join(_SPARE_SECONDS)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse waiting and new requests, and give running ones the grace period."""
        self.worker.close(self._grace)
        while self.worker.is_alive() and not self.force_exit:
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM while the server runs. Unlike uvicorn, do not raise them again
        at the end, since the app reports them itself."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {n: signal.signal(n, self.handle_exit) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal stops the server gracefully, the second one at once."""
        if self.should_exit:
            self.force_exit = True
            self.worker.hurry()
        self.signum = sig
        self.should_exit = True
