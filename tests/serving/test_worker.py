"""The thread that decodes: whoever asked hears something, whenever it ends."""

from __future__ import annotations

import asyncio
import random
from threading import Event
from typing import Any

import pytest

from mtp_lightning.decoding.engine import Engine
from mtp_lightning.decoding.options import DecodingOptions, Request
from mtp_lightning.opening import OpenedModel
from mtp_lightning.serving.refusal import Refusal
from mtp_lightning.serving.served_text import ServedText

pytestmark = pytest.mark.extras


async def heard(worker: Any, run: OpenedModel) -> str:
    """How a text ended, or what it was refused with."""
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


def test_who_waits_for_a_free_place_when_time_is_up(run: OpenedModel, gate: Event) -> None:
    async def both() -> list[str]:
        worker = worker_of(run)
        tasks = [asyncio.create_task(heard(worker, run))]
        while not worker._running:
            await asyncio.sleep(0.001)
        tasks.append(asyncio.create_task(heard(worker, run)))
        while not worker._waiting:
            await asyncio.sleep(0.001)
        worker.hurry()
        gate.set()
        return await asyncio.wait_for(asyncio.gather(*tasks), 60)

    assert asyncio.run(both()) == ["ending", "ending"]


def test_nobody_is_forgotten_at_the_end(run: OpenedModel) -> None:
    async def one(seconds: float) -> list[str]:
        worker = worker_of(run)
        tasks = [asyncio.create_task(heard(worker, run)) for _ in range(5)]
        await asyncio.sleep(seconds)
        worker.close(grace=0)
        told = await asyncio.wait_for(asyncio.gather(*tasks), 60)
        worker.join(60)
        assert not worker.is_alive() and worker.failure is None
        return told

    drawn, longest, told = random.Random(0), 0.04, []
    for _ in range(30):
        told += asyncio.run(one(drawn.random() * longest))
        if "length" not in told:
            longest *= 1.5  # a machine so slow, or so busy, that nobody has ended yet
    assert set(told) == {"length", "ending"}, told
