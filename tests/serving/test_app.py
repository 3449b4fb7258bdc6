"""``python serve.py``: its first lines, settings that it refuses, and its end by a signal."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtp_lightning.errors import UserError
from mtp_lightning.opening import OpenedModel
from mtp_lightning.serving import start
from tests.decoding.models import opened_model
from tests.integration.helpers import ROOT, environment
from tests.serving.conftest import config, events

APP = [sys.executable, str(ROOT / "serve.py")]
FIELDS = {"prompt": "def ", "temperature": 0, "stream": True}


@contextmanager
def app(*settings: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The process, the model's name and the address."""
    process = subprocess.Popen(
        [*APP, "port=0", "num_threads=1", *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.fullmatch(
            r"(\S+) \(page: http://127\.0\.0\.1:\d+/\) answers at (http://127\.0\.0\.1:\d+/v1)\n",
            line,
        )
        assert match, line + (process.communicate(timeout=60)[1] if not line else "")
        assert re.fullmatch(r"context: \d+ tokens\n", process.stdout.readline())
        assert process.stdout.readline().startswith("CPU layers by ")
        yield process, match[1], match[2]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.extras
@pytest.mark.parametrize(
    ("grace", "number", "code"), [(60, signal.SIGTERM, 143), (0, signal.SIGINT, 130)]
)
def test_a_signal_ends_the_server(finished: Path, grace: int, number: int, code: int) -> None:
    """Waiting and new requests get 503; running texts end, or are cut after ``grace`` seconds."""
    import httpx2

    settings = [f"checkpoint={finished}", f"grace={grace}", "batch_size=1", "long=slide"]
    body = {**FIELDS, "max_tokens": 4000}
    statuses: list[int] = []
    with app(*settings, "max_new_tokens=4000") as (process, name, url):
        assert name == finished.name
        with httpx2.stream("POST", f"{url}/completions", json=body, timeout=120) as response:
            stream = events(response.iter_lines())
            chunks = [next(stream)]

            def post() -> None:
                statuses.append(httpx2.post(f"{url}/completions", json=body).status_code)

            thread = threading.Thread(target=post)
            thread.start()
            metrics = f"{url.removesuffix('/v1')}/metrics"
            while "mtp_queue_length 1.0" not in httpx2.get(metrics).text:
                time.sleep(0.01)
            process.send_signal(number)
            thread.join(60)
            if grace:  # the socket stays open until the running text has ended
                assert httpx2.get(metrics.replace("metrics", "health")).status_code == 503
                assert httpx2.post(f"{url}/completions", json=body).status_code == 503
            chunks += list(stream)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == code and statuses == [503]
    if grace:
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert errors == "ended; no text was cut short.\n"
    else:
        assert chunks[-1]["error"]["code"] == "ending" and len(chunks) < 4000
        assert errors == "ended; 1 text was cut short.\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70000}, "port must be"),
        ({"max_prompt": 0}, "max_prompt must be"),
        ({"hosts": "evil.example"}, "hosts must be a list, not 'evil.example'"),
        ({"hosts": [8000]}, "hosts must be a list of names"),
        ({"name": " "}, "name must be a name or null"),
        ({"tree": [2], "cache": "single"}, "does not go together with cache=single"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start.serve(config(**settings))


@pytest.mark.extras
def test_a_setting_that_does_not_fit_the_model_is_refused(run: OpenedModel) -> None:
    from mtp_lightning.serving.server import Server

    with pytest.raises(UserError, match="draft_depth=7, but the model drafts 2 tokens"):
        Server(config(draft_depth=7), run, name="x")


@pytest.mark.extras
def test_max_prompt_beyond_the_context_is_refused_at_the_start() -> None:
    from mtp_lightning.serving.parsing import BodyParser

    run = opened_model(0, seq_len=64)
    with pytest.raises(UserError, match=r"max_prompt=65, but .* on 64 tokens: use at most 64, or"):
        BodyParser(config(max_prompt=65), run, name="x", max_draft=0)
    BodyParser(config(max_prompt=65, long="slide"), run, name="x", max_draft=0)


def test_the_context_of_heads_on_an_imported_trunk_is_shown() -> None:
    run = opened_model(0, seq_len=64)
    imported = replace(run, brings_trunk=True)
    assert start._context(run) == start._context(imported) == "context: 64 tokens"
    assert "64 tokens, the window of its training" in start._context(replace(imported, step=5))


def test_an_unknown_host_is_refused() -> None:
    with pytest.raises(UserError, match="host=no.such.host.invalid port=0 is not available"):
        start.listen("no.such.host.invalid", 0)
    with pytest.raises(UserError, match=r"host=a\.\.b port=0 is not available"):
        start.listen("a..b", 0)


def test_models_are_named_after_their_folder_file_or_run(tmp_path: Path) -> None:
    folder, file = tmp_path / "Llama-3.2-1B", tmp_path / "small.Q4_1.gguf"
    folder.mkdir()
    last = tmp_path / "run.1" / "checkpoints" / "last.ckpt"
    names = [start._name(config(), path) for path in (folder, file, last)]
    assert names == ["Llama-3.2-1B", "small.Q4_1", "run.1"]


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"port={port} is not available .*in use"):
            start.listen("127.0.0.1", port)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: name if name != "uvicorn" else None
    )
    with pytest.raises(UserError, match=r"package uvicorn: pip install uvicorn .*'\.\[serve\]'"):
        start.serve(config())
