"""The decoding thread answers every request, even if the server ends."""

from __future__ import annotations

import asyncio
import random
from threading import Event
from typing import Any

import pytest

from data_modules.tokenizers import IdTokenizer
from mtp_lightning.decoding.engine import Engine
from mtp_lightning.decoding.options import DecodingOptions, Request
from mtp_lightning.opening import OpenedModel
from mtp_lightning.serving.refusal import Refusal
from mtp_lightning.serving.responses import TokenTexts
from mtp_lightning.serving.served_text import News, ServedText

pytestmark = pytest.mark.extras


async def outcome(worker: Any, run: OpenedModel) -> str:
    """The finish reason of a text, or the code of its refusal."""
    served = ServedText(Request(prompt=[1, 2], max_new_tokens=6))
    try:
        worker.submit(served)
        return [news async for news in served.news()][-1].done.finish_reason
    except Refusal as refusal:
        return str(refusal.code)


def worker_of(run: OpenedModel) -> Any:
    from mtp_lightning.serving.meters import Meters
    from mtp_lightning.serving.worker import Worker

    options = DecodingOptions(batch_size=2, max_context=run.seq_len)
    engine = Engine(run.model, options, tokenizer=run.tokenizer)
    worker = Worker(engine, queue=9, meters=Meters(), on_failure=lambda: None)
    worker.start()
    return worker


def test_running_and_waiting_requests_end_when_time_is_up(run: OpenedModel, gate: Event) -> None:
    async def both() -> list[str]:
        worker = worker_of(run)
        tasks = [asyncio.create_task(outcome(worker, run))]
        while not worker._running:
            await asyncio.sleep(0.001)
        tasks.append(asyncio.create_task(outcome(worker, run)))
        while not worker._waiting:
            await asyncio.sleep(0.001)
        worker.hurry()
        gate.set()
        return await asyncio.wait_for(asyncio.gather(*tasks), 60)

    assert asyncio.run(both()) == ["ending", "ending"]


def test_every_request_is_answered_when_the_worker_closes(run: OpenedModel) -> None:
    async def close_after(seconds: float) -> list[str]:
        worker = worker_of(run)
        tasks = [asyncio.create_task(outcome(worker, run)) for _ in range(5)]
        await asyncio.sleep(seconds)
        worker.close(grace=0)
        outcomes = await asyncio.wait_for(asyncio.gather(*tasks), 60)
        worker.join(60)
        assert not worker.is_alive() and worker.failure is None
        return outcomes

    generator, longest, outcomes = random.Random(0), 0.04, []
    for _ in range(30):
        outcomes += asyncio.run(close_after(generator.random() * longest))
        if "length" not in outcomes:
            longest *= 1.5  # too busy a machine: no text has ended yet
    assert set(outcomes) == {"length", "ending"}, outcomes


def test_between_two_news_of_a_text_is_time(
    run: OpenedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtp_lightning.serving import worker as module

    async def told() -> list[News]:
        worker = worker_of(run)
        served = ServedText(Request(prompt=[1, 2], max_new_tokens=40))
        worker.submit(served)
        news = [item async for item in served.news()]
        worker.close(grace=0)
        return news

    for quiet in (1e9, 0.0):
        monkeypatch.setattr(module, "_QUIET_SECONDS", quiet)
        news = asyncio.run(told())
        done = news[-1].done
        assert done is not None
        # The first token, which the prompt's pass gives, and the passes after it.
        assert len(news) == (2 if quiet else 1 + done.verify_passes)
        assert [i for item in news for i in item.fresh.token_ids] == done.token_ids
        assert "".join(item.text for item in news) == done.text


def test_ids_without_text_are_written_as_numbers() -> None:
    assert [TokenTexts(IdTokenizer(9, 0)).drafted(token) for token in (5, 0)] == [
        " 5",
        "<end of text>",
    ]
