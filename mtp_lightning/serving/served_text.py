"""A text for a client, and the news of it that the worker sends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

from mtp_lightning.decoding.options import Request
from mtp_lightning.decoding.sequence import Fresh, Generation
from mtp_lightning.serving.refusal import HUNG_UP, Refusal


@dataclass(frozen=True, kw_only=True)
class News:
    """The growth of a text."""

    text: str  # new complete characters; all of them joined are the text
    fresh: Fresh  # the tokens since the last news
    seconds: float  # since the text's first token
    done: Generation | None = None  # the finished text; only in the last news


class ServedText:
    """A text that the worker's thread reports to the event loop on which this object was made."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.asked_at = time.perf_counter()  # when the request came
        self.began_at = self.asked_at  # when its first token came, once it has
        self.over = False  # whether the text has ended or the client has gone
        self.length = 0  # characters sent
        self.tokens = 0  # tokens counted
        self.quiet_until = 0.0  # no news before this time, unless the text ends
        self.status = HUNG_UP  # that a stream ends with; another one when its last event is sent
        self._loop = asyncio.get_running_loop()
        self._sent: asyncio.Queue[News | Refusal] = asyncio.Queue()

    def tell(self, news: News | Refusal) -> None:
        """Send news to the event loop, from any thread."""
        if self.over:
            return
        self.over = isinstance(news, Refusal) or news.done is not None
        # The loop may have been closed by force.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._sent.put_nowait, news)

    async def news(self) -> AsyncIterator[News]:
        """All news, to the end of the text.

        Raises:
            Refusal: the request was refused, or its text was cut short.
        """
        done = False
        while not done:
            item = await self._sent.get()
            if isinstance(item, Refusal):
                raise item
            done = item.done is not None
            yield item
