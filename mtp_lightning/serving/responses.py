"""Formats finished and growing texts as objects of OpenAI's API."""

from __future__ import annotations

import time
import uuid
from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Any

from mtp_lightning.decoding.options import Request
from mtp_lightning.decoding.sequence import Generation, LogProb
from mtp_lightning.serving.schemas import Body, ChatBody
from mtp_lightning.serving.served_text import News

# OpenAI's log-probability of impossible tokens: JSON has no infinity.
_IMPOSSIBLE = -9999.0


class TokenTexts:
    """The text of single tokens of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._bytes: list[bytes] = tokenizer.token_bytes()
        if not any(self._bytes):  # ids, whose text is unknown, are written as numbers
            self._bytes = [tokenizer.decode([i]).encode() for i in range(tokenizer.vocab_size)]
        self.ends: tuple[int, ...] = tokenizer.end_ids

    def text(self, token: int) -> str:
        """A token's text, or its bytes in OpenAI's notation if it is part of a character."""
        try:
            return self.raw(token).decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.raw(token))

    def drafted(self, token: int) -> str:
        """A draft's text; a draft may also be the end of the text."""
        return "<end of text>" if token in self.ends else self.text(token)

    def raw(self, token: int) -> bytes:
        """A token's bytes."""
        return self._bytes[token] if token < len(self._bytes) else b""


class Completion:
    """The answer to one request, whole or in chunks; ``model`` is the model's name for clients."""

    def __init__(
        self, body: Body, request: Request, *, model: str, token_texts: TokenTexts
    ) -> None:
        self._stream = body.stream
        self._options = body.stream_options
        self._request = request
        self._chat = chat = isinstance(body, ChatBody)
        self._token_texts = token_texts
        self._begun = False
        # The offset of the next token in the text.
        self._offset = 0
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"{kind}.chunk" if chat and body.stream else kind,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, news: Sequence[News]) -> dict[str, Any]:
        """The object of a finished text, of which these are all news."""
        done = news[-1].done
        assert done is not None
        content: dict[str, Any] = {"text": done.text}
        if self._chat:
            content = {"message": {"role": "assistant", "content": done.text, "refusal": None}}
        choice = self._choice(content, news, done)
        return {**self._head, "choices": [choice], "usage": self._usage(done)}

    def chunks(self, news: News) -> list[dict[str, Any]]:
        """The objects of a stream for the next news; a chat's stream begins with the role."""
        first, self._begun = not self._begun, True
        done, choices, fresh = news.done, [], news.fresh
        has_content = bool(
            news.text or fresh.logprobs or (self._options.include_drafts and fresh.token_ids)
        )
        if not self._chat and (has_content or done):
            choices.append(self._choice({"text": news.text}, [news], done))
        if self._chat and first:
            choices.append(self._choice({"delta": {"role": "assistant", "content": ""}}))
        if self._chat and has_content:
            choices.append(self._choice({"delta": {"content": news.text}}, [news]))
        if self._chat and done:
            choices.append(self._choice({"delta": {}}, done=done))
        usage: dict[str, Any] = {"usage": None} if self._options.include_usage else {}
        objects = [{**self._head, "choices": [choice], **usage} for choice in choices]
        if has_content and self._options.include_drafts:
            objects[1 if self._chat and first else 0]["mtp"] = self._drafts(news)
        if done and self._options.include_usage:
            objects.append({**self._head, "choices": [], "usage": self._usage(done)})
        return objects

    def _drafts(self, news: News) -> dict[str, Any]:
        """The tokens of a chunk with their drafts: an extension of OpenAI's object."""
        fresh, tokens = news.fresh, []
        annotated = zip(fresh.pieces, fresh.depths, fresh.looked_up, fresh.rejected, strict=True)
        for text, depth, looked_up, rejected in annotated:
            refused = [
                {"depth": d.depth, "text": self._token_texts.drafted(d.token), "after": d.after}
                | _origin(d.looked_up)
                for d in rejected
            ]
            token = {"text": text, "depth": depth, **_origin(looked_up)}
            tokens.append(token | ({"rejected": refused} if refused else {}))
        return {"seconds": news.seconds, "tokens": tokens}

    def _choice(
        self, content: dict[str, Any], news: Sequence[News] = (), done: Generation | None = None
    ) -> dict[str, Any]:
        pairs = (pair for n in news for pair in zip(n.fresh.logprobs, n.fresh.pieces, strict=False))
        # A token that ends the text does not belong to it.
        in_text = [pair for pair in pairs if pair[0].token not in self._token_texts.ends]
        shown = None
        if self._request.logprobs is not None and (in_text or not self._stream):
            logprobs = [logprob for logprob, _ in in_text]
            shown = self._chat_logprobs(logprobs) if self._chat else self._logprobs(in_text)
        reason = None
        if done is not None:  # in OpenAI's words
            reason = "length" if done.finish_reason == "length" else "stop"
        return {"index": 0, **content, "logprobs": shown, "finish_reason": reason}

    def _logprobs(self, in_text: Sequence[tuple[LogProb, str]]) -> dict[str, Any]:
        """The log-probabilities of tokens, each with the characters that it completes."""
        text, offsets = self._token_texts.text, []
        for logprob, piece in in_text:
            raw, begin = self._token_texts.raw(logprob.token), self._offset
            self._offset += len(piece)
            # A character that earlier tokens left incomplete comes before this token's text.
            token_text = getincrementaldecoder("utf-8")("replace").decode(raw)
            offsets.append(max(begin, self._offset - len(token_text)))
        return {
            "tokens": [text(logprob.token) for logprob, _ in in_text],
            "token_logprobs": [_finite(logprob.logprob) for logprob, _ in in_text],
            "top_logprobs": [
                {text(t): _finite(p) for t, p in (*logprob.top, (logprob.token, logprob.logprob))}
                for logprob, _ in in_text
            ],
            "text_offset": offsets,
        }

    def _chat_logprobs(self, logprobs: Sequence[LogProb]) -> dict[str, Any]:
        content = []
        for chosen in logprobs:
            top = [self._token(token, value) for token, value in chosen.top]
            content.append({**self._token(chosen.token, chosen.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self._token_texts.text(token), self._token_texts.raw(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}

    def _usage(self, done: Generation) -> dict[str, Any]:
        prompt, new, accepted = len(self._request.prompt), done.new_tokens, sum(done.accepted_mask)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            # OpenAI's predicted tokens are our drafts: accepted ones are part of the text.
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": done.drafts - accepted,
            },
        }


def _origin(looked_up: bool) -> dict[str, bool]:
    return {"looked_up": True} if looked_up else {}


def _finite(logprob: float) -> float:
    return max(_IMPOSSIBLE, logprob)
