"""Malformed requests are refused in one sentence, and the server still answers."""

from __future__ import annotations

import http.client
import json
import random
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from mtp_lightning.opening import OpenedModel
from mtp_lightning.serving.schemas import Body, ChatBody, CompletionBody, parse
from tests.serving.conftest import NAME, SEQ_LEN, Serving, assert_refused, serving

pytestmark = pytest.mark.extras

BODY_LIMIT = 100_000


@pytest.fixture(scope="module")
def served(run: OpenedModel) -> Iterator[Serving]:
    with serving(run, batch_size=2, max_body=BODY_LIMIT, hosts=["other.example"]) as server:
        yield server


RAW = {
    "empty": (b"", 400, "not JSON"),
    "a list": (b"[1, 2]", 400, "must be a JSON object, not a list of 2"),
    "deep": (b'{"prompt": ' + b"[" * 40_000, 400, "nested too deeply"),
    "bad UTF-8": (b'{"prompt": "\xff\xfe"}', 400, "not UTF-8"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), 400, "not UTF-8"),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', 400, "NaN is not a number in JSON"),
    "infinity": (b'{"prompt": "a", "top_p": -Infinity}', 400, "not a number in JSON"),
    "overflow": (b'{"prompt": "a", "temperature": 1e999}', 400, "temperature must be"),
    "many digits": (
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        400,
        "more than 4300 digits: shorten it",
    ),
    "a long seed": (b'{"prompt": "a", "seed": ' + b"9" * 500 + b"}", 400, "seed must be"),
    "half a character": (b'{"prompt": "\\ud800"}', 400, "surrogate"),
    "an odd name": (b'{"prompt": "a", "\\ud800": 1}', 400, "not known"),
    "huge": (b'{"prompt": "' + b"a" * BODY_LIMIT + b'"}', 413, f"more than {BODY_LIMIT} bytes"),
}


@pytest.mark.parametrize("name", RAW)
def test_malformed_bodies_are_refused(served: Serving, name: str) -> None:
    body, status, message = RAW[name]
    assert_refused(served.post(body), status, message)


def test_random_bytes_and_bodies_cut_anywhere_are_refused(served: Serving) -> None:
    sound, chance = json.dumps({"prompt": "ab", "max_tokens": 3}).encode(), random.Random(0)
    bodies = [sound[:n] for n in range(len(sound))]
    bodies += [chance.randbytes(chance.randrange(1, 5000)) for _ in range(40)]
    for body in bodies:
        assert_refused(served.post(body), 400, "")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": 5}, "prompt must be one string or one list of token ids"),
        ({"prompt": ["a", "b"]}, "send a request for each prompt"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": None}, "prompt must be"),
        ({"prompt": [1, 257]}, "257 is not a token id: the model's are 0 to 256"),
        ({"prompt": [-1]}, "-1 is not a token id"),
        ({"prompt": [True]}, "true is not a token id"),
        ({"prompt": [1.5]}, "1.5 is not a token id"),
        ({"prompt": "a" * (SEQ_LEN + 1)}, f"has 2049 tokens, and at most {SEQ_LEN} are read"),
        ({"prompt": "a" * SEQ_LEN, "max_tokens": 2}, "there is room for 1"),
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1 to 1024, not 0"),
        ({"max_tokens": 10**9}, "not 1000000000"),
        ({"temperature": -1}, "temperature must be a number from 0 to 100, not -1"),
        ({"temperature": "hot"}, 'temperature must be a number from 0 to 100, not "hot"'),
        ({"draft_depth": 3}, "draft_depth must be a whole number from 0 to 2, not 3"),
        ({"draft_depth": -1}, "draft_depth must be"),
        ({"draft_depth": True}, "draft_depth must be"),
        ({"top_p": -0.1}, "top_p must be a number from 0 to 1, not -0.1"),
        ({"top_k": -2}, "top_k must be a whole number from 1 to 2147483648, not -2"),
        ({"top_k": False}, "top_k must be a whole number from 1"),
        ({"seed": 1.5}, "seed must be"),
        ({"seed": -(2**63)}, "seed must be a whole number from"),  # the engine's are one fewer
        ({"stop": 5}, "stop must be a string or a list, not 5"),
        ({"stop": [""]}, "stop must be a string of 1 to 256 characters"),
        ({"stop": ["a" * 300]}, "stop must be a string of 1 to 256 characters"),
        ({"stop": ["a"] * 17}, "stop holds 17 strings"),
        ({"stop": [{}]}, "stop must be a string, not an object"),
        ({"logprobs": 21}, "logprobs must be a whole number from 0 to 20"),
        ({"logprobs": True}, "logprobs must be"),
        ({"stream": "yes"}, 'stream must be true or false, not "yes"'),
        ({"stream_options": {"include_usage": True}}, "stream_options is for stream=true"),
        ({"stream": True, "stream_options": []}, "stream_options must be an object"),
        ({"n": 2}, "n=2 is not supported, only 1"),
        ({"n": True}, "n=true is not supported"),
        ({"suffix": "b"}, 'suffix="b" is not supported'),
        ({"logit_bias": {"5": 1}}, "logit_bias=an object is not supported"),
        ({"messages": []}, 'field "messages" is not known'),
        ({"max_completion_tokens": 5}, "not known here: give max_tokens."),
        ({"ignore_eos": True}, "ignore_eos=true is not supported, only false"),
        ({"typical_p": 0.1}, 'field "typical_p" is not known here'),
    ],
    ids=str,
)
def test_wrong_fields_are_refused(served: Serving, fields: dict[str, Any], message: str) -> None:
    answer = served.post({"model": NAME, "prompt": "a", **fields})
    assert_refused(answer, 400, message, param=[*fields][-1])


def test_draft_depth_is_refused_without_speculation(run: OpenedModel) -> None:
    with serving(run, draft_depth=None, speculative=False) as server:
        message = "draft_depth must be left out or 0 on this server, which makes no drafts, not 1."
        assert_refused(server.post({"prompt": "a", "draft_depth": 1}), 400, message)


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
def test_neutral_and_ignored_fields_change_nothing(kind: type[Body]) -> None:
    fields = {"messages": [{"role": "user", "content": "a"}]} if kind is ChatBody else {}
    neutral = {
        "min_p": 0, "repetition_penalty": 1.0, "length_penalty": 1.0, "ignore_eos": False,
        "min_tokens": 0, "use_beam_search": False, "add_generation_prompt": True,
        "continue_final_message": False, "n": 1, "best_of": 1, "echo": False, "logit_bias": {},
        "presence_penalty": 0.0, "user": "me", "metadata": {"a": "b"}, "suffix": None, "stop": None,
        "seed": None,
    }  # fmt: skip
    bare = parse(json.dumps(fields).encode(), kind)
    for top_k in (-1, 0):
        assert parse(json.dumps({**fields, **neutral, "top_k": top_k}).encode(), kind) == bare


def test_extreme_settings_give_a_text(served: Serving) -> None:
    for fields in ({"temperature": 1e-300}, {"top_p": 0}, {"temperature": 100, "top_k": 1}):
        body = {"prompt": "a", "max_tokens": 5, "logprobs": 20, **fields}
        assert served.post(body).status_code == 200, fields


def test_wrong_paths_methods_and_content_types_are_refused(served: Serving) -> None:
    assert_refused(served.post(b"{}", kind="text/plain"), 415, "application/json")
    assert_refused(served.get("v1/completions"), 405, "Method Not Allowed")
    for path in ("v1/engines", "docs"):
        assert_refused(served.get(path), 404, "Not Found")


def test_broken_http_and_unfinished_bodies_free_their_rows(served: Serving) -> None:
    for content in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        b"content-length: 1000\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        b"content-length: -5\r\n\r\n{}",
    ):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(content)
    assert served.post({"prompt": "a", "max_tokens": 3}).status_code == 200
    served.wait_for("mtp_rows", 0)


@pytest.mark.parametrize("path", ["v1/models", "health", "metrics", "nothing"])
def test_foreign_host_headers_are_refused(served: Serving, path: str) -> None:
    """A page of another site could send them (DNS rebinding)."""
    for host in ("evil.example", "evil.example:80", "localhost.evil.example"):
        message = f'"{host}" is not allowed: start the server with hosts=[NAME]'
        assert_refused(served.get(path, host=host), 421, message)
    for host in ("localhost", f"localhost:{served.port}", "[::1]", "10.0.0.7", "Other.example:1"):
        assert served.get(path, host=host).status_code in (200, 404), host


def _closed_in_time(connection: socket.socket, seconds: float) -> bool:
    """Whether the server closes the connection in time."""
    connection.settimeout(seconds)
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


def test_slow_headers_are_cut_off(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_lightning.serving.guard._HEADER_SECONDS", 0.5)
    whole = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    for content in (b"", b"GET", b"GET /health HTTP/1.1\r\nhost: local", whole + b"GET /hea"):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(content)
            assert _closed_in_time(connection, 60), content
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        deadline = time.monotonic() + 60
        connection.sendall(b"GET /health HTTP/1.1\r\nx: ")
        with suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() < deadline:  # slow bytes without an end
                connection.sendall(b"y")
                time.sleep(0.1)
        assert time.monotonic() < deadline, "the connection stayed open"


def test_slow_bodies_and_second_requests_are_answered(
    served: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtp_lightning.serving.guard._HEADER_SECONDS", 0.5)
    body = json.dumps({"prompt": "a", "max_tokens": 3}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        for _ in range(2):
            connection.sendall(head + b"content-length: %d\r\n\r\n" % len(body))
            time.sleep(1)
            connection.sendall(body)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == 200
            assert json.loads(answer.read())["usage"]["completion_tokens"] == 3


def test_the_server_still_answers(served: Serving) -> None:
    """The last test of this file, after all requests above."""
    import httpx2

    assert served.get("health").json() == {"status": "ok"}
    head = httpx2.head(f"http://127.0.0.1:{served.port}/health")
    assert head.status_code == 200 and head.content == b""
    answer = served.post({"prompt": "a", "max_tokens": 3}).json()
    assert answer["usage"]["completion_tokens"] == 3
    assert served.server.worker.failure is None
