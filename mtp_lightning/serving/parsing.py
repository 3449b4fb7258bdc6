"""Turns a body into a request to the engine, or refuses it."""

from __future__ import annotations

import logging
import secrets
import threading
from typing import Any

from mtp_lightning.chat_template import ChatTemplate
from mtp_lightning.decoding.options import Request
from mtp_lightning.errors import UserError, counted
from mtp_lightning.opening import OpenedModel
from mtp_lightning.serving.refusal import Refusal
from mtp_lightning.serving.schemas import (
    Body,
    ChatBody,
    CompletionBody,
    Message,
    limited,
    parse,
    shown,
)
from mtp_lightning.settings import is_whole

log = logging.getLogger(__name__)

# OpenAI's default of max_tokens for completions.
_SHORT = 16


class BodyParser:
    """Parses bodies; thread-safe. ``cfg`` is the config of ``conf/serve.yaml``, ``name`` the
    model's for clients, and ``max_draft`` the most drafts per round.

    Raises:
        UserError: the prompts asked for are longer than the context.
    """

    def __init__(self, cfg: Any, run: OpenedModel, *, name: str, max_draft: int) -> None:
        self.name = name
        self.template: ChatTemplate | None = None
        try:
            self.template = ChatTemplate.of(run.tokenizer_state)
        except UserError as error:
            log.warning("Chats are refused: %s", error)
        self._tokenizer = run.tokenizer
        self._vocab = run.model.config.trunk.vocab_size
        self._max_tokens = cfg.max_new_tokens
        self._completion = limited(CompletionBody, self._max_tokens, max_draft)
        self._chat = limited(ChatBody, self._max_tokens, max_draft)
        self._max_prompt = run.seq_len if cfg.max_prompt is None else cfg.max_prompt
        self._room: int | None = None  # most tokens of a prompt and its text together
        if cfg.long == "refuse":
            self._room = run.seq_len
            if self._max_prompt > run.seq_len:
                raise UserError(
                    f"max_prompt={cfg.max_prompt}, but the model was trained on {run.seq_len} "
                    f"tokens: use at most {run.seq_len}, or set long=slide."
                )
        # One thread encodes at a time, since encode_specials changes a setting of the tokenizer
        # during the call. Decoding does not read that setting.
        self._encoding = threading.Lock()

    def parse(self, sent: bytes, *, chat: bool) -> tuple[Body, Request]:
        """Parse the bytes of a body. Returns its fields, and the request to the engine.

        Raises:
            Refusal: the body is invalid, or asks for something that this server cannot do.
        """
        body = parse(sent, self._chat if chat else self._completion)
        if body.model not in (None, self.name):
            message = f"The model {shown(body.model)} is not here, only {self.name}."
            raise Refusal(message, status=404, param="model", code="model_not_found")
        if isinstance(body, ChatBody):
            if body.top_logprobs and not body.logprobs:
                raise Refusal("top_logprobs needs logprobs=true.", param="top_logprobs")
            prompt = self._chat_prompt(body.messages)
            logprobs = body.top_logprobs if body.logprobs else None
        else:
            prompt, logprobs = self._prompt(body.prompt), body.logprobs
        request = Request(
            prompt=prompt,
            max_new_tokens=self._new_tokens(body, len(prompt)),
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            # Without a seed, every request gets a random one.
            seed=secrets.randbits(31) if body.seed is None else body.seed,
            stop=tuple(body.stop),
            logprobs=logprobs,
            draft_depth=body.draft_depth,
        )
        if body.stream_options.model_fields_set and not body.stream:
            message = "stream_options is for stream=true: leave it out."
            raise Refusal(message, param="stream_options")
        return body, request

    def _prompt(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self._checked(self._encoded(prompt, specials=False))
        if not isinstance(prompt, list) or any(isinstance(part, str | list) for part in prompt):
            form = "one string or one list of token ids: send a request for each prompt"
            raise Refusal(f"prompt must be {form}.", param="prompt")
        for token in prompt:
            if not is_whole(token) or not 0 <= token < self._vocab:
                id_range = f"the model's are 0 to {self._vocab - 1}"
                raise Refusal(f"{shown(token)} is not a token id: {id_range}.", param="prompt")
        return self._checked(prompt)

    def _chat_prompt(self, messages: list[Message]) -> list[int]:
        if self.template is None:
            message = f"{self.name} has no chat template: ask it by /v1/completions."
            raise Refusal(message, param="model", code="no_chat")
        fields = [m.model_dump(exclude_none=True) for m in messages]
        for message_fields in fields:
            if message_fields["role"] == "developer":  # templates know it by its older name
                message_fields["role"] = "system"
        try:
            text = self.template.render(fields)
        except UserError as error:
            raise Refusal(str(error), param="messages") from error
        return self._checked(self._encoded(text, specials=True), "messages")

    def _encoded(self, text: str, *, specials: bool) -> list[int]:
        encode = self._tokenizer.encode_specials if specials else self._tokenizer.encode_prompt
        try:
            with self._encoding:
                return list(map(int, encode(text)))
        except ValueError as error:
            raise Refusal(str(error), param="messages" if specials else "prompt") from error

    def _checked(self, ids: list[int], param: str = "prompt") -> list[int]:
        if not ids:
            raise Refusal(f"{param} is empty: give at least one token.", param=param)
        if len(ids) > self._max_prompt:
            most = f"at most {self._max_prompt} are read"
            message = f"The prompt has {len(ids)} tokens, and {most}: shorten it."
            raise Refusal(message, param=param, code="context_length_exceeded")
        return ids

    def _new_tokens(self, body: Body, prompt_len: int) -> int:
        # The model never reads the last new token.
        room = self._max_tokens if self._room is None else self._room - prompt_len + 1
        name, n_new, default = "max_tokens", body.max_tokens, _SHORT
        if isinstance(body, ChatBody):
            default = self._max_tokens
            if body.max_completion_tokens is not None:
                if n_new not in (None, body.max_completion_tokens):
                    message = "max_tokens and max_completion_tokens differ: give one of them."
                    raise Refusal(message, param="max_completion_tokens")
                name, n_new = "max_completion_tokens", body.max_completion_tokens
        if n_new is None:
            return min(default, self._max_tokens, room)
        if n_new > room:
            raise Refusal(
                f"After a prompt of {counted(prompt_len, 'token')} there is room for {room} more, "
                f"and {name}={n_new}: shorten the prompt or lower {name}.",
                param=name,
                code="context_length_exceeded",
            )
        return n_new
