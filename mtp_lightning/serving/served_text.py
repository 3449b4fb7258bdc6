"""A text for a client, and the news of it that the worker sends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

from mtp_lightning.decoding.options import Request
from mtp_lightning.decoding.sequence import Fresh, Generation
from mtp_lightning.serving.refusal import Refusal


@dataclass(frozen=True, kw_only=True)
class News:
    """The growth of a text.

    Attributes:
        text: new complete characters; all of them joined are the text.
        fresh: the tokens since the last news.
        seconds: time since the text's first token.
        done: the finished text; only in the last news.
    """

    text: str
    fresh: Fresh
    seconds: float
    done: Generation | None = None


class ServedText:
    """A text that the worker's thread reports to the event loop on which this object was made.

    Attributes:
        asked_at: when the request came, by ``time.perf_counter()``.
        over: whether the text has ended or the client has gone.
        began_at: when its first token came.
        length, tokens: the worker's progress.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.asked_at = time.perf_counter()
        self.began_at = self.asked_at
        self.over = False
        self.length = 0  # characters sent
        self.tokens = 0  # tokens counted
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
