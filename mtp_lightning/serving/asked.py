"""From a body to what is asked of the engine, or to the sentence that refuses it."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mtp_lightning.decoding.options import Request
from mtp_lightning.opening import OpenedModel
from mtp_lightning.serving import fields as of
from mtp_lightning.serving.chat import ChatTemplate
from mtp_lightning.serving.refusal import Refusal
from mtp_lightning.settings import is_whole

_COMMON = {
    *("model", "max_tokens", "seed", "stop", "stream", "stream_options"),
    *("temperature", "top_k", "top_p", "logprobs"),
}
_COMPLETION = _COMMON | {"prompt"}
_CHAT = _COMMON | {"messages", "max_completion_tokens", "top_logprobs"}
_ROLES = ("assistant", "developer", "system", "user")
# OpenAI's: what a completion gets that does not say how long it shall be.
_SHORT = 16
_MOST_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A body that was understood.

    Attributes:
        request: for the engine.
        chat: whether it is answered as a message.
        stream: whether it is answered token by token.
        usage: whether a stream ends with the counts of tokens.
    """

    request: Request
    chat: bool
    stream: bool
    usage: bool


class Reader:
    """Understands bodies; safe to call from several threads.

    Args:
        run: the model and its tokenizer.
        name: what clients call it.
        max_tokens: the most that a request may ask for.
        max_prompt: most tokens of a prompt.
        room: tokens that a prompt and its text may have together; None for no bound.

    Raises:
        UserError: a chat template that is none.
    """

    def __init__(
        self, run: OpenedModel, *, name: str, max_tokens: int, max_prompt: int, room: int | None
    ) -> None:
        self.name = name
        self.template = ChatTemplate.of(run.tokenizer_state)
        # One of its own: encode_specials changes it, which must not be while the worker decodes.
        self._tokenizer = replace(run).tokenizer
        self._vocab = run.model.config.trunk.vocab_size
        self._max_tokens = max_tokens
        self._max_prompt = max_prompt
        self._room = room
        # Nor may two threads encode in two ways.
        self._encoding = threading.Lock()

    def read(self, body: bytes, *, chat: bool) -> Asked:
        """A request for the engine.

        Args:
            body: as it was sent.
            chat: to which of the two endpoints.

        Raises:
            Refusal: anything in it that is wrong, or that cannot be done.
        """
        fields = of.parse(body)
        of.check_known(fields, _CHAT if chat else _COMPLETION)
        self._check_model(fields)
        prompt = self._chat_prompt(fields) if chat else self._prompt(fields)
        stream = of.flag(fields, "stream")
        try:
            request = Request(
                prompt=prompt,
                max_new_tokens=self._new_tokens(fields, len(prompt), chat=chat),
                **_sampling(fields),
                seed=_seed(fields),
                stop=of.stops(fields),
                logprobs=_chat_logprobs(fields) if chat else _logprobs(fields),
            )
        except ValueError as error:
            raise Refusal(str(error)) from error
        return Asked(request=request, chat=chat, stream=stream, usage=_usage(fields, stream))

    def _check_model(self, fields: Mapping[str, Any]) -> None:
        if fields.get("model", self.name) != self.name:
            asked = of.shown(fields["model"])
            raise Refusal(
                f"The model {asked} is not here, only {self.name}.",
                status=404,
                param="model",
                code="model_not_found",
            )

    def _prompt(self, fields: Mapping[str, Any]) -> list[int]:
        given = fields.get("prompt")
        if isinstance(given, list) and len(given) == 1 and isinstance(given[0], str | list):
            (given,) = given
        if isinstance(given, str):
            return self._checked(self._encoded(of.text(given, "prompt"), specials=False))
        if not isinstance(given, list) or any(isinstance(part, str | list) for part in given):
            wanted = "one string or one list of token ids: send a request for each prompt"
            raise Refusal(f"prompt must be {wanted}.", param="prompt")
        for token in given:
            if not is_whole(token) or not 0 <= token < self._vocab:
                ids = f"the model's are 0 to {self._vocab - 1}"
                raise Refusal(f"{of.shown(token)} is no token id: {ids}.", param="prompt")
        return self._checked(given)

    def _chat_prompt(self, fields: Mapping[str, Any]) -> list[int]:
        if self.template is None:
            raise Refusal(
                f"{self.name} has no chat template: ask it by /v1/completions.", code="no_chat"
            )
        given = fields.get("messages")
        if not isinstance(given, list) or not given:
            raise Refusal("messages must be a list of at least one message.", param="messages")
        text = self.template.render([_message(message) for message in given])
        return self._checked(self._encoded(text, specials=True), "messages")

    def _encoded(self, text: str, *, specials: bool) -> list[int]:
        encode = self._tokenizer.encode_specials if specials else self._tokenizer.encode
        try:
            with self._encoding:
                return list(map(int, encode(text)))
        except ValueError as error:
            raise Refusal(str(error), param="messages" if specials else "prompt") from error

    def _checked(self, ids: list[int], param: str = "prompt") -> list[int]:
        if not ids:
            raise Refusal(f"{param} is empty: give at least one token.", param=param)
        if len(ids) > self._max_prompt:
            told = f"has {len(ids)} tokens, and at most {self._max_prompt} are read"
            raise Refusal(
                f"The prompt {told}: shorten it.", param=param, code="context_length_exceeded"
            )
        return ids

    def _new_tokens(self, fields: Mapping[str, Any], prompt: int, *, chat: bool) -> int:
        both = [name for name in ("max_tokens", "max_completion_tokens") if name in fields]
        if len(both) == 2 and fields["max_tokens"] != fields["max_completion_tokens"]:
            raise Refusal("max_tokens and max_completion_tokens differ: give one of them.")
        name = both[-1] if both else "max_tokens"
        # The last new token is never read.
        room = self._max_tokens if self._room is None else self._room - prompt + 1
        default = min(self._max_tokens, room) if chat else min(_SHORT, self._max_tokens, room)
        wanted = of.whole(fields, name, least=1, most=self._max_tokens, default=default)
        assert wanted is not None
        if wanted > room:
            raise Refusal(
                f"The prompt has {prompt} tokens and {name}={wanted} more are asked for, but there "
                f"is room for {room}: shorten it or lower {name}.",
                param=name,
                code="context_length_exceeded",
            )
        return wanted


def _message(given: Any) -> dict[str, str]:
    if not isinstance(given, dict):
        raise Refusal(f"A message must be an object, not {of.shown(given)}.", param="messages")
    for name, value in given.items():
        if name not in ("role", "content") and value is not None:
            told = f"A message's field {of.shown(name)} is not known here"
            raise Refusal(f"{told}: leave it out.", param="messages")
    role, content = given.get("role"), given.get("content")
    if role not in _ROLES:
        told = f"not {of.shown(role)}"
        raise Refusal(f"A role must be one of {', '.join(_ROLES)}, {told}.", param="messages")
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    return {"role": role, "content": of.text(content, "content")}


def _part(given: Any) -> str:
    if not isinstance(given, dict) or given.get("type") != "text":
        raise Refusal("The parts of a content must be of type text.", param="messages")
    return of.text(given.get("text"), "text")


def _sampling(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "temperature": of.number(fields, "temperature", least=0, most=100, default=1),
        "top_k": of.whole(fields, "top_k", least=1, most=2**31),
        "top_p": of.number(fields, "top_p", least=0, most=1, default=1),
    }


def _seed(fields: Mapping[str, Any]) -> int:
    # One of its own where none is given.
    seed = of.whole(fields, "seed", least=-(2**63), most=2**63 - 1, default=secrets.randbits(31))
    assert seed is not None
    return seed


def _logprobs(fields: Mapping[str, Any]) -> int | None:
    if fields.get("logprobs") is False:
        return None
    return of.whole(fields, "logprobs", least=0, most=_MOST_LOGPROBS)


def _chat_logprobs(fields: Mapping[str, Any]) -> int | None:
    top = of.whole(fields, "top_logprobs", least=0, most=_MOST_LOGPROBS, default=0)
    if of.flag(fields, "logprobs"):
        return top
    if top:
        raise Refusal("top_logprobs needs logprobs=true.", param="top_logprobs")
    return None


def _usage(fields: Mapping[str, Any], stream: bool) -> bool:
    options = fields.get("stream_options", {})
    known = {"include_usage", "include_obfuscation"}
    if not isinstance(options, dict) or not options.keys() <= known:
        raise Refusal(
            "stream_options must be an object with include_usage.", param="stream_options"
        )
    if options and not stream:
        raise Refusal("stream_options is for stream=true: leave it out.", param="stream_options")
    return of.flag(options, "include_usage")
