"""A real server on loopback, over a small random model, in a thread of the test's process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from mtp_lightning.decoding import generate
from mtp_lightning.decoding.engine import Engine
from mtp_lightning.opening import OpenedModel, pretrained_state
from mtp_lightning.paths import CONF
from tests.decoding.models import opened_model, small_model
from tests.integration.conftest import cache, finished, once  # noqa: F401

SEQ_LEN = 2048
NAME = "tiny"
CHAT_TEMPLATE = """{%- if messages[0]['role'] == 'assistant' %}
    {{- raise_exception('A user speaks first') }}
{%- endif %}
{% for message in messages %}
    {%- if loop.index0 > 5 %}{% break %}{% endif %}
    {{- bos_token + '<|im_start|>' + message['role'] + ' ' }}
    {{- message['content'] | trim + eos_token }}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif -%}
"""


@pytest.fixture(scope="session")
def run() -> OpenedModel:
    """Its texts are random bytes."""
    torch.manual_seed(0)
    return opened_model(3, seq_len=SEQ_LEN, path=Path(NAME))


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with special tokens and a template, as a Hugging Face folder has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = tmp_path_factory.mktemp("chat")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|begin|>"])
    library.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<|begin|>", "__type": "AddedToken"},
        "eos_token": "<|im_end|>",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return path


@pytest.fixture(scope="session")
def chat_model(chat_folder: Path, run: OpenedModel) -> OpenedModel:
    model = small_model(5, 2, vocab=259)
    return replace(run, model=model, tokenizer_state=pretrained_state(chat_folder))


def config(**settings: Any) -> Any:
    """``conf/serve.yaml`` with settings, and with the model's depth as the number of drafts."""
    cfg = OmegaConf.load(CONF / "serve.yaml")
    for name in ("hydra", "defaults"):
        del cfg[name]
    cfg.checkpoint, cfg.grace = NAME, 5
    cfg.draft_depth = None if "tree" in settings else 2
    return OmegaConf.merge(cfg, settings)


class Serving:
    """A running server and its address."""

    def __init__(self, server: Any, port: int) -> None:
        self.server = server
        self.port = port
        self.base_url = f"http://127.0.0.1:{port}/v1"

    def client(self) -> Any:
        """OpenAI's own client."""
        from openai import OpenAI

        return OpenAI(base_url=self.base_url, api_key="none", max_retries=0)

    def get(self, path: str, **headers: str) -> Any:
        import httpx2

        return httpx2.get(f"http://127.0.0.1:{self.port}/{path}", headers=headers)

    def post(self, body: Any, kind: str = "application/json", path: str = "completions") -> Any:
        """The answer to a body of bytes, or of an object as JSON."""
        import httpx2

        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": kind}
        return httpx2.post(f"{self.base_url}/{path}", content=content, headers=headers, timeout=60)

    def stream(self, **fields: Any) -> list[dict[str, Any]]:
        """The events of a text."""
        import httpx2

        url, body = f"{self.base_url}/completions", {**fields, "stream": True}
        with httpx2.stream("POST", url, json=body, timeout=60) as answer:
            return list(events(answer.iter_lines()))

    def meter(self, name: str) -> float:
        """A value of /metrics, 0 where it has not been counted yet."""
        text = self.get("metrics").text
        lines = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        return float(lines[0].split()[1]) if lines else 0.0

    def wait_for(self, name: str, value: float) -> None:
        """Until a meter has a value."""
        wait_until(lambda: self.meter(name) == value, f"{name} == {value}")


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The objects of a stream of server-sent events."""
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def assert_refused(response: Any, status: int, message: str, *, param: str | None = None) -> None:
    """Checks that a response is an error of one short sentence, about the field ``param``."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert message in error["message"], error["message"]
    assert param in (None, error["param"]), error
    assert "\n" not in error["message"] and len(error["message"]) < 400


def generation(run: OpenedModel, prompt: str | list[int], max_tokens: int, **settings: Any) -> Any:
    """The answer of generate()."""
    ids = run.tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else prompt
    settings["tokenizer"] = run.tokenizer
    (generation,) = generate(run.model, [ids], max_new_tokens=max_tokens, **settings)
    return generation


def wait_until(condition: Callable[[], bool], message: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"not in 60 s: {message}"
        time.sleep(0.01)


@contextmanager
def serving(run: OpenedModel, **settings: Any) -> Iterator[Serving]:
    from mtp_lightning.serving.server import Server
    from mtp_lightning.serving.start import listen

    with listen("127.0.0.1", 0) as listener:
        server = Server(config(**settings), run, name=NAME)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait_until(lambda: server.started, "the server has started")
            yield Serving(server, listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """An event: no decoding round begins before it is set."""
    event = threading.Event()
    step = Engine.step

    def gated_step(self: Engine) -> Any:
        if self.sequences:
            assert event.wait(60)
        return step(self)

    monkeypatch.setattr(Engine, "step", gated_step)
    yield event
    event.set()
