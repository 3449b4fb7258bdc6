"""Requests to a server: fields of wrong kinds, bytes that are not JSON, clients that hang up.

The server answers each in a sentence with an HTTP status, and stays alive.
"""

from __future__ import annotations

import atexit
import http.client
import importlib.util
import json
import os
import random
import re
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.chaos.cases import Case, hold
from tests.chaos.given import Finished
from tests.chaos.processes import Process

Answer = tuple[int, bytes]

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "jinja2")
# What each field takes: the kinds of JSON, by the names in _VALUES.
_FIELDS = {
    "prompt": ("string", "list"), "max_tokens": ("whole",), "temperature": ("whole", "number"),
    "top_p": ("whole", "number"), "top_k": ("whole",), "seed": ("whole",),
    "stop": ("string", "list"), "stream": ("bool",), "stream_options": ("object",),
    "logprobs": ("whole",), "n": ("whole",), "echo": ("bool",), "suffix": ("string",),
    "logit_bias": ("object",), "model": ("string",),
}  # fmt: skip
_VALUES: dict[str, list[Any]] = {
    "whole": [3, -3], "number": [1.5, -1.5, 1e300],
    "string": ["many", "\x1b]0;title\x07", "<script>"], "bool": [True],
    "list": [["a", 1], [[[[]]]]], "object": [{"a": {"b": []}}],
}  # fmt: skip
_MEMORY = 300 << 20  # bytes that all requests together may add


def cases(folder: Path) -> list[Case]:
    """One case for each kind of request; none if a package for serving is missing."""
    if any(importlib.util.find_spec(name) is None for name in _PACKAGES):
        return []
    served = Served(folder / "served", Finished(folder / "finished", folder / "cache"))
    made: dict[str, Callable[[random.Random], list[bytes]]] = {}
    for field, taken in _FIELDS.items():
        for kind, values in _VALUES.items():
            if kind not in taken:
                bodies = [{"prompt": "ab", "max_tokens": 3, field: value} for value in values]
                made[f"{field} that is a {kind}"] = _same([json.dumps(b).encode() for b in bodies])
    sound = json.dumps({"prompt": "ab", "max_tokens": 3}).encode()
    made |= {
        "a body that is cut": lambda chance: [sound[: chance.randrange(len(sound))]],
        "random bytes": lambda chance: [chance.randbytes(chance.randrange(1, 5000))],
        "a body in a million brackets": _same([b"[" * 1_000_000, b'{"prompt": ' + b"[" * 10**6]),
        "a body of ten megabytes": _same([b'{"prompt": "' + b"a" * 10**7 + b'"}']),
        "a number of a million digits": _same([b'{"prompt": "a", "seed": ' + b"9" * 10**6 + b"}"]),
    }
    found = [
        Case("requests", name, partial(_refused, served, bodies)) for name, bodies in made.items()
    ]
    timed = {
        "a client that hangs up": partial(_sent, served, _part_of_a_request, "its rows are free"),
        "bytes that are not HTTP": partial(_sent, served, _random_bytes, "it answers others"),
        "many at once": partial(_many, served),
    }
    return found + [Case("requests", name, a, timed=True) for name, a in timed.items()]


class Served:
    """A server of a finished run, started at its first use."""

    def __init__(self, folder: Path, finished: Finished) -> None:
        self._folder, self._finished = folder, finished
        self._process: Process | None = None
        self._owner = os.getpid()  # forks, too, run functions registered with atexit
        self._port = self._memory = 0

    def start(self) -> None:
        """Unless it runs."""
        if self._process is not None:
            return
        given = ["port=0", "batch_size=2", "queue=4", "max_new_tokens=8", "num_threads=1"]
        arguments = ["serve.py", f"checkpoint={self._finished.run}", *given]
        log = self._folder / "log"
        log.parent.mkdir(parents=True)
        log.touch()
        self._process = Process(arguments, log)
        atexit.register(self.end)
        until = time.monotonic() + 120
        while (found := re.search(r"127\.0\.0\.1:(\d+)", log.read_text())) is None:
            hold(not self._process.ended(), f"it ends: {log.read_text()[-1500:]}")
            hold(time.monotonic() < until, "it does not begin to answer")
            time.sleep(0.05)
        self._port = int(found[1])
        self._memory = self._held()

    def end(self) -> None:
        """By SIGTERM."""
        if self._process is not None and os.getpid() == self._owner:
            self._process.signal(signal.SIGTERM)
            if not self._process.sleep(60):
                self._process.signal(signal.SIGKILL)
            self._process = None

    def begin(self) -> http.client.HTTPConnection:
        """A client."""
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)

    def connect(self) -> socket.socket:
        """To it."""
        return socket.create_connection(("127.0.0.1", self._port), timeout=60)

    def ask(self, body: bytes) -> Answer:
        """The status and the body of the answer to a request for a text."""
        connection = self.begin()
        try:
            _send(connection, body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (BrokenPipeError, ConnectionResetError):  # it had seen enough of a long body
            return 413, b""
        finally:
            connection.close()

    def lives(self) -> None:
        """Hold that it still answers, and that its memory is within the limit."""
        assert self._process is not None
        hold(not self._process.ended(), "the server ended")
        body = json.dumps({"prompt": "ab", "max_tokens": 3, "temperature": 0}).encode()
        until = time.monotonic() + 60
        while (answer := self.ask(body))[0] == 429:
            hold(time.monotonic() < until, "its rows are not freed")
            time.sleep(0.05)
        hold(answer[0] == 200, f"a sound request gives {answer}")
        log = self._process.log.read_text(errors="replace")
        hold("Traceback" not in log and "\x1b]" not in log, f"it says {log[-1500:]}")
        more = self._held() - self._memory
        hold(more < _MEMORY, f"{more >> 20} MiB more than at its start")

    def _held(self) -> int:
        assert self._process is not None
        pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * 4096


def _send(connection: http.client.HTTPConnection, body: bytes) -> None:
    kind = {"content-type": "application/json"}
    connection.request("POST", "/v1/completions", body, kind)


def _same(bodies: list[bytes]) -> Callable[[random.Random], list[bytes]]:
    return lambda chance: bodies


def _refused(
    served: Served,
    make: Callable[[random.Random], list[bytes]],
    folder: Path,
    chance: random.Random,
) -> str:
    served.start()
    sentence = ""
    for body in make(chance):
        status, answer = served.ask(body)
        hold(400 <= status < 500, f"{body[:200]!r} gives {status}: {answer[:300]!r}")
        if answer:
            sentence = str(json.loads(answer)["error"]["message"])
            hold("\n" not in sentence and len(sentence) < 500, f"it says {sentence[:800]}")
    served.lives()
    return sentence


def _sent(
    served: Served,
    make: Callable[[random.Random], bytes],
    outcome: str,
    folder: Path,
    chance: random.Random,
) -> str:
    """Bytes of clients that wait for no answer."""
    served.start()
    for _ in range(8):
        with served.connect() as connection:
            connection.sendall(make(chance))
            time.sleep(chance.uniform(0, 0.05))
    served.lives()
    return outcome


def _random_bytes(chance: random.Random) -> bytes:
    return chance.randbytes(chance.randrange(1, 20_000))


def _part_of_a_request(chance: random.Random) -> bytes:
    body = json.dumps({"prompt": "ab", "max_tokens": 8, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    sent = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    return sent[: chance.randrange(1, len(sent) + 1)]


def _many(served: Served, folder: Path, chance: random.Random) -> str:
    """More requests than slots and queue places: each gets a text or 429."""
    served.start()
    body = json.dumps({"prompt": "ab", "max_tokens": 8}).encode()
    connections = [served.begin() for _ in range(12)]
    for connection in connections:
        _send(connection, body)
    codes = [connection.getresponse().status for connection in connections]
    for connection in connections:
        connection.close()
    hold(set(codes) <= {200, 429}, f"codes {codes}")
    served.lives()
    return f"{codes.count(200)} texts, {codes.count(429)} refused"
