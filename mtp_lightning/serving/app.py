"""The HTTP routes: the page, reading bodies within limits, streaming, and disconnected clients."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from mtp_lightning.decoding.engine import Engine
from mtp_lightning.opening import OpenedModel
from mtp_lightning.serving.guard import OwnNames
from mtp_lightning.serving.meters import Meters
from mtp_lightning.serving.parsing import BodyParser
from mtp_lightning.serving.refusal import HUNG_UP, Refusal
from mtp_lightning.serving.responses import Completion, TokenTexts
from mtp_lightning.serving.schemas import shown
from mtp_lightning.serving.served_text import News, ServedText
from mtp_lightning.serving.worker import Worker

_BODY_SECONDS = 30  # the longest time for sending a body
_METRICS = "text/plain; version=0.0.4; charset=utf-8"
_UNCACHED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_DEFECT = Refusal("Internal server error.", status=500)
_PAGE = Path(__file__).with_name("page.html")


class Endpoint:
    """Answers requests with the texts of a worker, which runs the engine; ``cfg`` is the config of
    ``conf/serve.yaml``, and ``name`` the model's for clients.

    Raises:
        UserError: see :class:`BodyParser`.
    """

    def __init__(
        self,
        cfg: Any,
        run: OpenedModel,
        *,
        name: str,
        engine: Engine,
        worker: Worker,
        meters: Meters,
    ) -> None:
        self.parser = BodyParser(cfg, run, name=name, max_draft=engine.max_draft)
        self.worker = worker
        self.meters = meters
        self.token_texts = TokenTexts(run.tokenizer)
        self.max_body = cfg.max_body
        self.hosts = [str(host).lower() for host in (cfg.host, *cfg.hosts)]
        self.created = int(time.time())
        options, max_new, max_draft = engine.options, cfg.max_new_tokens, engine.max_draft
        measured = options.measured
        self.facts = {  # about the model, next to OpenAI's fields
            "draft_depth": {  # of a request that sets none
                "greedy": max_draft if measured is None else measured.greedy.best,
                "sampled": max_draft if measured is None else measured.sampled.best,
            },
            "max_draft_depth": max_draft,
            "lookup": options.lookup,
            "tree": None if options.tree is None else list(options.tree.widths),
            "chat": self.parser.template is not None,
            "max_tokens": min(max_new, run.seq_len) if cfg.long == "refuse" else max_new,
        }

    def app(self) -> FastAPI:
        """The application, without FastAPI's own pages, which load files from the internet."""
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        app.add_api_route("/", _page)
        app.add_api_route("/health", self.health, methods=["GET", "HEAD"])
        app.add_api_route("/metrics", self.metrics)
        app.add_api_route("/v1/models", self.models)
        app.add_api_route("/v1/models/{name:path}", self.model)
        app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        app.add_middleware(OwnNames, names=self.hosts)
        for kind in (Refusal, HTTPException, Exception):
            app.add_exception_handler(kind, _refused)
        return app

    async def health(self) -> JSONResponse:
        """Whether the server accepts requests."""
        alive = self.worker.alive
        return JSONResponse({"status": "ok" if alive else "ending"}, 200 if alive else 503)

    async def metrics(self) -> Response:
        """The metrics for Prometheus."""
        return Response(self.meters.text(), media_type=_METRICS)

    async def models(self) -> dict[str, Any]:
        """The list of models, which has one entry."""
        return {"object": "list", "data": [self._model()]}

    async def model(self, name: str) -> dict[str, Any]:
        """The model with a given name."""
        if name != self.parser.name:
            message = f"There is no model of that name, only {self.parser.name}."
            raise Refusal(message, status=404, param="model", code="model_not_found")
        return self._model()

    def _model(self) -> dict[str, Any]:
        fields = {"object": "model", "created": self.created, "owned_by": "mtp-lightning"}
        return {"id": self.parser.name, **fields, "mtp": self.facts}

    async def completions(self, request: Request) -> Response:
        """Continue a text."""
        return await self._counted(request, chat=False)

    async def chat(self, request: Request) -> Response:
        """Answer messages."""
        return await self._counted(request, chat=True)

    async def _counted(self, request: Request, *, chat: bool) -> Response:
        try:
            response = await self._answer(request, chat=chat)
        except Exception as error:
            self.meters.ended(error.status if isinstance(error, Refusal) else 500)
            raise
        if not isinstance(response, StreamingResponse):  # a stream counts itself when it ends
            self.meters.ended(response.status_code)
        return response

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        sent = await self._body(request)
        body, task = await asyncio.to_thread(self.parser.parse, sent, chat=chat)
        served = ServedText(task)
        completion = Completion(body, task, model=self.parser.name, token_texts=self.token_texts)
        self.worker.submit(served)
        watch = asyncio.create_task(self._watch(request, served))
        news = served.news()
        try:
            if not body.stream:
                return JSONResponse(completion.whole([item async for item in news]))
            first = await anext(news)  # an earlier refusal can still set the status
        except BaseException:
            self.worker.cancel(served)
            raise
        finally:
            if not body.stream or served.over:
                watch.cancel()
        events = self._events(served, completion, first, news)
        return _Stream(events, on_end=lambda: self._end_stream(served, watch))

    async def _events(
        self, served: ServedText, completion: Completion, first: News, news: AsyncIterator[News]
    ) -> AsyncIterator[bytes]:
        """A text as server-sent events."""
        try:
            for chunk in completion.chunks(first):
                yield _event(chunk)
            async for item in news:
                for chunk in completion.chunks(item):
                    yield _event(chunk)
            yield b"data: [DONE]\n\n"
            served.status = 200
        except Refusal as refusal:
            served.status = refusal.status
            yield _event(refusal.body)
        except Exception:  # a defect of any kind, raised again after the client has heard of it
            served.status = 500
            yield _event(_DEFECT.body)
            raise

    def _end_stream(self, served: ServedText, watch: asyncio.Task[None]) -> None:
        """Free the row of a text, and count its request."""
        watch.cancel()
        self.worker.cancel(served)
        self.meters.ended(served.status)

    async def _watch(self, request: Request, served: ServedText) -> None:
        """Free a text's slot when its client disconnects."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.worker.cancel(served)

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # another site's page cannot send this without permission
            raise Refusal("The content-type must be application/json.", status=415)
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > self.max_body:
                        too_long = f"The body has more than {self.max_body} bytes: shorten it."
                        raise Refusal(too_long, status=413)
        except TimeoutError:
            late = f"The body did not come within {_BODY_SECONDS} seconds."
            raise Refusal(late, status=408) from None
        except ClientDisconnect:
            raise Refusal("The client has hung up.", status=HUNG_UP) from None
        return bytes(body)


class _Stream(StreamingResponse):
    """A response of server-sent events that calls ``on_end`` in any case, even if the client goes
    before the first event is asked for, where no code of ``events`` runs."""

    def __init__(self, events: AsyncIterator[bytes], *, on_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_UNCACHED)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as an ASGI application."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


def _page() -> Response:
    """The page, with a content security policy that allows only its own style and script, named by
    their digests, and requests to this server; nothing else is executed or loaded."""
    html = _PAGE.read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "style-src": _digest(html, "style"),
        "script-src": _digest(html, "script"),
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(map(" ".join, policy.items())),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(html, media_type="text/html", headers=headers)


def _digest(html: str, element: str) -> str:
    (text,) = re.findall(f"<{element}>(.*?)</{element}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


async def _refused(request: Request, error: Exception) -> Response:
    """The response to an error. The traceback of a defect is on the server's standard error."""
    if isinstance(error, HTTPException):  # there is no such route or method
        message = f"{request.method} {shown(request.url.path)}: {error.detail}."
        body = Refusal(message, status=error.status_code).body
        return JSONResponse(body, error.status_code, headers=error.headers)
    if not isinstance(error, Refusal):
        error = _DEFECT
    return JSONResponse(error.body, error.status, headers=error.headers)
