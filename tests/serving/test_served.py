"""OpenAI's own client against the server: texts, streams, counts and disconnects."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.opening import OpenedModel, pretrained_state
from tests.decoding.models import small_model
from tests.serving.conftest import (
    NAME,
    SEQ_LEN,
    Serving,
    assert_refused,
    generation,
    serving,
    wait_until,
)

pytestmark = pytest.mark.extras

PROMPTS = (
    "def main(",
    "import os",
    "x = ",
    "\u00e9t\u00e9 \u4f60\u597d",
    "a",
    "class A:\n    def ",
)
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.7, "top_p": 0.8, "seed": 2**40},
    {"temperature": 1.3, "seed": -1, "stop": ["e", "\n"]},
)


@pytest.fixture(scope="module")
def served(run: OpenedModel) -> Iterator[Serving]:
    with serving(run, batch_size=4) as server:
        yield server


def test_sixteen_streams_equal_the_texts_of_generate(run: OpenedModel) -> None:
    from openai import AsyncOpenAI

    requests = [
        {"prompt": PROMPTS[i % len(PROMPTS)], "max_tokens": 20 + 7 * i, **SETTINGS[i % 4]}
        for i in range(16)
    ]

    async def read(api: AsyncOpenAI, fields: dict[str, Any]) -> tuple[str, str, int]:
        text, reason, tokens = "", "", 0
        usage = {"include_usage": True}
        stream = await api.completions.create(
            model=NAME, stream=True, stream_options=usage, **fields
        )
        async for chunk in stream:
            if chunk.choices:
                assert not reason, "nothing comes after the end"
                text += chunk.choices[0].text
                reason = chunk.choices[0].finish_reason or ""
            else:
                tokens = chunk.usage.completion_tokens
        return text, reason, tokens

    async def read_all() -> list[tuple[str, str, int]]:
        async with AsyncOpenAI(base_url=served.base_url, api_key="none", max_retries=0) as api:
            return await asyncio.gather(*(read(api, fields) for fields in requests))

    expected = [generation(run, **fields) for fields in requests]
    with serving(run, batch_size=4) as served:
        answers = asyncio.run(read_all())
        served.wait_for('mtp_requests_total{status="200"}', 16)
        assert served.meter("mtp_tokens_total") == sum(w.new_tokens for w in expected)
        for position in (1, 2):
            label = f'{{position="{position}"}}'
            reached = sum(w.drafts_reached[position - 1] for w in expected)
            accepted = sum(w.drafts_accepted[position - 1] for w in expected)
            assert served.meter(f"mtp_drafts_reached_total{label}") == reached > 0
            assert served.meter(f"mtp_drafts_accepted_total{label}") == accepted
        assert served.meter("mtp_rows") == served.meter("mtp_queue_length") == 0
        assert served.meter("mtp_first_token_seconds_count") == 16
        assert 0 < served.meter("mtp_round_seconds_sum") < 60
    assert [text for text, _, _ in answers] == [w.text for w in expected]
    assert [n for _, _, n in answers] == [w.new_tokens for w in expected]
    reasons = [{"eot": "stop"}.get(w.finish_reason, w.finish_reason) for w in expected]
    assert [reason for _, reason, _ in answers] == reasons
    assert len({w.text for w in expected}) == 16 and {"stop", "length"} <= set(reasons)


def test_seeded_samples_do_not_depend_on_the_load(run: OpenedModel) -> None:
    """The number of drafts is measured once, at the start; greedy text does not depend on it."""
    from openai import AsyncOpenAI

    sampled = {"prompt": PROMPTS[0], "max_tokens": 40, "temperature": 0.9, "seed": 7}
    greedy = {"prompt": PROMPTS[0], "max_tokens": 40, "temperature": 0.0}

    async def texts(requests: list[dict[str, Any]]) -> list[str]:
        async with AsyncOpenAI(base_url=served.base_url, api_key="none", max_retries=0) as api:
            answers = await asyncio.gather(
                *(api.completions.create(model=NAME, **fields) for fields in requests)
            )
        return [answer.choices[0].text for answer in answers]

    with serving(run, draft_depth=None, batch_size=4) as served:
        alone = asyncio.run(texts([sampled]))
        loaded = asyncio.run(texts([sampled, *[greedy] * 3, {**sampled, "seed": 8}, sampled]))
    assert loaded[0] == loaded[5] == alone[0] != loaded[4]
    assert set(loaded[1:4]) == {generation(run, **greedy).text}


def test_metrics_count_looked_up_drafts_separately(run: OpenedModel) -> None:
    prompt = PROMPTS[0] * 6
    expected = generation(run, prompt, 100, temperature=0.0, lookup=8, draft_depth=2)
    with serving(run, lookup=8) as served:
        fields = {"model": NAME, "prompt": prompt, "max_tokens": 100, "temperature": 0}
        details = served.client().completions.create(**fields).usage.completion_tokens_details
        meters = [served.meter(f"mtp_lookups{end}_total") for end in ("", "_accepted")]
        accepted = served.get("metrics").text.split("\nmtp_drafts_accepted_total{")[1:]
    assert meters == [expected.lookups, expected.lookups_accepted] and 0 < meters[1] < meters[0]
    modules = sum(float(line.split()[1]) for line in accepted)
    assert modules + meters[1] == details.accepted_prediction_tokens


def test_answers_have_the_log_probabilities_of_generate(run: OpenedModel, served: Serving) -> None:
    fields = {"prompt": "import os", "max_tokens": 30, "temperature": 0.9, "seed": 6}
    answer = served.client().completions.create(model=NAME, logprobs=3, **fields)
    expected = generation(run, **fields, logprobs=3)
    (choice,) = answer.choices
    assert choice.text == expected.text and choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == 9 and answer.usage.total_tokens == 39
    drafts = answer.usage.completion_tokens_details
    assert drafts.accepted_prediction_tokens == sum(expected.accepted_mask)
    assert drafts.rejected_prediction_tokens == expected.drafts - sum(expected.accepted_mask) > 0
    logprobs = choice.logprobs
    assert logprobs.token_logprobs == pytest.approx([p.logprob for p in expected.logprobs])
    assert len(logprobs.tokens) == 30
    # The chosen token is always among the alternatives, as one more if it is not likely.
    chosen = zip(logprobs.tokens, logprobs.token_logprobs, strict=True)
    for (token, value), top in zip(chosen, logprobs.top_logprobs, strict=True):
        assert top[token] == value and len(top) == 3 + (value < sorted(top.values())[-3])
    assert {len(top) for top in logprobs.top_logprobs} == {3, 4}
    # Part of a character is named by its bytes.
    names = {bytes([b]).decode() if b < 128 else f"bytes:\\x{b:02x}" for b in expected.token_ids}
    assert set(logprobs.tokens) == names and len(names) > 10
    for token, begin in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text.startswith(token, begin)
    ids = served.client().completions.create(
        model=NAME, **{**fields, "prompt": list(b"import os")}, logprobs=0
    )
    assert ids.choices[0].text == expected.text
    assert [list(top) for top in ids.choices[0].logprobs.top_logprobs] == [
        [token] for token in ids.choices[0].logprobs.tokens
    ]


def test_streams_have_the_log_probabilities_of_whole_answers(served: Serving) -> None:
    fields = {"model": NAME, "prompt": "a", "max_tokens": 25, "seed": 4, "logprobs": 1}
    whole = served.client().completions.create(**fields).choices[0].logprobs
    streamed = [
        c.choices[0].logprobs for c in served.client().completions.create(**fields, stream=True)
    ]
    parts = [part for part in streamed if part is not None]
    assert [t for part in parts for t in part.tokens] == whole.tokens
    assert [o for part in parts for o in part.text_offset] == whole.text_offset
    assert [p for part in parts for p in part.token_logprobs] == pytest.approx(whole.token_logprobs)


def test_offsets_leave_out_the_space_that_a_text_does_not_begin_with(
    run: OpenedModel, tmp_path: Path
) -> None:
    """SentencePiece's decoder drops it, and a text begins after a prompt's end of text."""
    from tokenizers import Tokenizer, decoders, models

    words = {"</s>": 0} | {f"\u2581w{i}": i for i in range(1, 259)}
    library = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    library.decoder = decoders.Metaspace()
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    model = small_model(5, 2, vocab=259)
    spaced = replace(run, model=model, tokenizer_state=pretrained_state(tmp_path))
    with serving(spaced) as served:
        for stream in (False, True):
            body = {"prompt": [7, 0], "max_tokens": 6, "logprobs": 0, "seed": 1, "stream": stream}
            answers = served.stream(**body) if stream else [served.post(body).json()]
            choices = [choice for answer in answers for choice in answer["choices"]]
            text = "".join(choice["text"] for choice in choices)
            shown = [choice["logprobs"] for choice in choices if choice["logprobs"]]
            tokens = [token for part in shown for token in part["tokens"]]
            assert text == "".join(tokens)[1:] and len(tokens) == 6
            ends = itertools.accumulate(map(len, tokens), initial=-1)
            offsets = [offset for part in shown for offset in part["text_offset"]]
            assert offsets == [max(end, 0) for end in ends][:-1]


def test_samples_without_a_seed_differ(served: Serving) -> None:
    fields = {"model": NAME, "prompt": "a", "max_tokens": 30}
    texts = {served.client().completions.create(**fields).choices[0].text for _ in range(3)}
    assert len(texts) == 3


def test_models_are_listed(served: Serving) -> None:
    from openai import NotFoundError

    api = served.client()
    assert [model.id for model in api.models.list()] == [NAME]
    assert api.models.retrieve(NAME).owned_by == "mtp-lightning"
    with pytest.raises(NotFoundError, match="only tiny"):
        api.models.retrieve("gpt-4")
    with pytest.raises(NotFoundError, match="only tiny"):
        api.completions.create(model="gpt-4", prompt="a")


@pytest.mark.parametrize(("long", "most"), [("refuse", SEQ_LEN), ("slide", 5000)])
def test_the_listed_max_tokens_fit_into_the_context(run: OpenedModel, long: str, most: int) -> None:
    with serving(run, max_new_tokens=5000, long=long) as served:
        (model,) = served.get("v1/models").json()["data"]
        assert model["mtp"]["max_tokens"] == most
        chunks = served.stream(prompt="a", max_tokens=most)
        assert "error" not in chunks[0]


def test_chats_without_a_template_are_refused(served: Serving) -> None:
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match="no chat template: ask it by /v1/completions"):
        served.client().chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "a"}]
        )


def test_a_disconnect_frees_a_row_and_a_place_in_the_queue(
    run: OpenedModel, gate: threading.Event
) -> None:
    fields = {"model": NAME, "prompt": "a", "max_tokens": 1000, "temperature": 0}
    disconnects = 'mtp_requests_total{status="499"}'
    with serving(run, batch_size=1) as server, server.client() as api, server.client() as other:
        running = api.completions.create(**fields, stream=True)
        server.wait_for("mtp_rows", 1)
        waiting = threading.Thread(target=_ask_and_drop, args=(server, fields))
        waiting.start()  # disconnects while it waits for the row
        server.wait_for("mtp_queue_length", 1)
        waiting.join()
        server.wait_for("mtp_queue_length", 0)
        assert server.meter("mtp_rows") == 1
        running.close()
        server.wait_for(disconnects, 2)
        gate.set()
        server.wait_for("mtp_rows", 0)
        answer = other.completions.create(**{**fields, "max_tokens": 5})
        assert answer.choices[0].text == generation(run, "a", 5).text
        assert server.meter("mtp_tokens_total") < 1000


def test_a_disconnect_before_a_stream_begins_is_counted(run: OpenedModel) -> None:
    """The server cancels the sending of the head, before it asks for the first event."""

    async def ask(server: Serving) -> None:
        head = asyncio.Event()
        body = json.dumps({"prompt": "a", "max_tokens": 5, "stream": True}).encode()
        incoming = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            if (message := next(incoming, None)) is not None:
                return message
            await head.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            assert message["type"] == "http.response.start"
            head.set()
            await asyncio.sleep(60)

        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        scope |= {"query_string": b"", "client": None}
        await server.server.config.app(scope, receive, send)

    with serving(run) as server:
        asyncio.run(ask(server))
        assert server.meter('mtp_requests_total{status="499"}') == 1
        server.wait_for("mtp_rows", 0)


def _ask_and_drop(server: Serving, fields: dict[str, Any]) -> None:
    import httpx2

    patience = httpx2.Timeout(60, read=0.3)
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{server.base_url}/completions", json=fields, timeout=patience)


def test_a_full_queue_is_answered_with_retry_after(run: OpenedModel, gate: threading.Event) -> None:
    from openai import RateLimitError

    fields = {"model": NAME, "prompt": "a", "max_tokens": 10, "temperature": 0}
    with (
        serving(run, batch_size=1, queue=2) as server,
        server.client() as api,
        ThreadPoolExecutor(3) as pool,
    ):
        answers = [pool.submit(api.completions.create, **fields) for _ in range(3)]
        server.wait_for("mtp_queue_length", 2)
        with pytest.raises(RateLimitError, match="2 requests are waiting already") as error:
            api.completions.create(**fields)
        assert error.value.response.headers["retry-after"] == "1"
        gate.set()
        texts = [answer.result(30).choices[0].text for answer in answers]
        assert texts == [generation(run, "a", 10).text] * 3
        server.wait_for('mtp_requests_total{status="429"}', 1)


def test_a_text_that_the_memory_does_not_hold_is_refused_alone(
    run: OpenedModel, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four texts: the first is decoded when the others join it, one of them too long."""
    pad, texts = F.pad, [40, 50, 1000, 30]
    fields = [{"prompt": PROMPTS[i], "max_tokens": n, **SETTINGS[i]} for i, n in enumerate(texts)]
    layers: list[Tensor] = []

    def pad_few(x: Tensor, padding: tuple[int, ...], **how: Any) -> Tensor:
        layers.extend([x] if padding[-1] > 500 else [])
        if len(layers) > 1:  # the storage of the first layer has grown
            layers.clear()
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return pad(x, padding, **how)

    monkeypatch.setattr(F, "pad", pad_few)
    with serving(run, batch_size=4) as server, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(server.post, fields[0])]
        server.wait_for("mtp_rows", 1)
        answers += [pool.submit(server.post, more) for more in fields[1:]]
        server.wait_for("mtp_queue_length", 3)
        gate.set()
        first, second, long, fourth = (answer.result(60) for answer in answers)
        message = "tokens of a text, in 4 slots, do not fit into the memory: shorten the prompt"
        assert_refused(long, 503, message)
        assert_refused(server.post({**fields[2], "stream": True}), 503, message)
        for i, answer in ((0, first), (1, second), (3, fourth)):
            expected = generation(run, PROMPTS[i], texts[i], **SETTINGS[i])
            assert answer.json()["choices"][0]["text"] == expected.text
        server.wait_for('mtp_requests_total{status="503"}', 2)


def test_memory_does_not_grow_with_requests(run: OpenedModel) -> None:
    """One request in four disconnects."""
    fields = {"model": NAME, "prompt": "a" * 40, "max_tokens": 12, "logprobs": 2, "seed": 1}

    def resident_after(server: Serving, api: Any, n: int) -> int:
        for i in range(n):
            stream = api.completions.create(**fields, stream=True)
            if i % 4:
                assert len(list(stream)) > 1
            else:
                next(iter(stream))
            stream.close()
        server.wait_for("mtp_rows", 0)
        return _resident()

    with serving(run, batch_size=2) as server, server.client() as api:
        before = resident_after(server, api, 60)
        after = resident_after(server, api, 200)
        assert not server.server.worker._running and not server.server.worker._waiting
        wait_until(lambda: server.meter('mtp_requests_total{status="200"}') >= 195, "counted")
    assert after - before < 4 * 2**20, f"{(after - before) / 2**20:.1f} MiB by 200 requests"


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_defect_ends_the_server_and_its_requests(
    run: OpenedModel, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openai import InternalServerError

    with serving(run) as running, running.client() as api:
        step = type(running.server.worker._engine).step

        def broken_step(self: Any) -> Any:
            step(self)
            raise ZeroDivisionError("a defect")

        monkeypatch.setattr(type(running.server.worker._engine), "step", broken_step)
        gate.set()
        with pytest.raises(InternalServerError, match="The server is ending"):
            api.completions.create(model=NAME, prompt="a", max_tokens=SEQ_LEN // 2)
        wait_until(lambda: running.server.should_exit, "the server ends")
        assert isinstance(running.server.worker.failure, ZeroDivisionError)


def test_a_defect_in_a_stream_is_its_last_event_and_one_traceback(
    run: OpenedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from openai import APIError

    from mtp_lightning.serving.responses import Completion

    chunks, calls = Completion.chunks, itertools.count()

    def broken_chunks(self: Completion, news: Any) -> Any:
        if next(calls) == 1:
            raise ZeroDivisionError("a defect")
        return chunks(self, news)

    monkeypatch.setattr(Completion, "chunks", broken_chunks)
    with serving(run) as server, server.client() as api:
        stream = api.completions.create(model=NAME, prompt="a", max_tokens=500, stream=True)
        with pytest.raises(APIError, match="Internal server error"):
            list(stream)
        server.wait_for('mtp_requests_total{status="500"}', 1)
        server.wait_for("mtp_rows", 0)
        assert server.post({"prompt": "a", "max_tokens": 2}).status_code == 200
    assert capsys.readouterr().err.count("ZeroDivisionError: a defect") == 1
