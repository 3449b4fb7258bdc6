"""One request on its way through the worker, and what it hears from it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

from mtp_lightning.decoding.detokenizer import Detokenizer
from mtp_lightning.decoding.options import Request
from mtp_lightning.decoding.sequence import Fresh, Generation
from mtp_lightning.serving.refusal import Refusal


@dataclass(frozen=True, kw_only=True)
class News:
    """What a text has grown by.

    Attributes:
        text: characters that are whole; joined, the text.
        fresh: the tokens since the last news.
        pieces: of each of them, the characters that it makes whole.
        seconds: since the text's first token.
        done: the finished text, with the last news.
    """

    text: str
    fresh: Fresh
    pieces: list[str]
    seconds: float
    done: Generation | None = None


class Job:
    """Made on the event loop that listens; told by the worker's thread.

    Args:
        request: what is wanted.
        detokenizer: of its tokens.

    Attributes:
        asked_at: when it came, by ``time.perf_counter()``.
        over: whether nobody listens any more, or there is nothing more to hear.
        began_at: when its first token came.
        detokenizer, length, tokens: the worker's own, on how far it is.
    """

    def __init__(self, request: Request, detokenizer: Detokenizer) -> None:
        self.request = request
        self.asked_at = time.perf_counter()
        self.began_at = self.asked_at
        self.over = False
        self.detokenizer = detokenizer
        self.length = 0  # characters told
        self.tokens = 0  # counted
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[News | Refusal] = asyncio.Queue()

    def tell(self, news: News | Refusal) -> None:
        """Hand on what happened, from any thread."""
        if self.over:
            return
        self.over = isinstance(news, Refusal) or news.done is not None
        # A loop that was forced to end has nobody on it who listens.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._told.put_nowait, news)

    async def news(self) -> AsyncIterator[News]:
        """All that is told, to the end.

        Raises:
            Refusal: it was refused, or ended before its time.
        """
        done = False
        while not done:
            told = await self._told.get()
            if isinstance(told, Refusal):
                raise told
            done = told.done is not None
            yield told
