"""Formats messages with the chat template of the model's tokenizer.

A template is an untrusted program from the model's author. It runs in Jinja's immutable sandbox, as
in transformers: it reads the messages, cannot change them, and has no access to Python.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mtp_lightning.errors import UserError
from mtp_lightning.stored import kept_json, special_token

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class _Generation(Extension):
    """The block ``{% generation %}``, with which transformers marks the model's own words."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes of the block's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Turns messages into the text that the model was trained on, by the Jinja source of a template
    and the text of special tokens by name, such as ``bos_token``.

    Raises:
        UserError: the template is invalid.
    """

    def __init__(self, source: str, specials: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # also Python's own errors, of nested blocks
            raise UserError(f"the model's chat template is not valid Jinja: {error}.") from error
        self._specials = dict(specials)

    @classmethod
    def of(cls, tokenizer_state: Mapping[str, Any]) -> ChatTemplate | None:
        """The template in the ``tokenizer_state`` of an opened model; None if it has none.

        Raises:
            UserError: the template is invalid.
        """
        files = tokenizer_state.get("beside", {})
        if (source := source_of(files)) is None:
            return None
        specials = {role: special_token(files, role) for role in _SPECIAL}
        return cls(source, {role: text for role, text in specials.items() if text is not None})

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for the model's answer to messages, each with ``role`` and ``content``, and
        perhaps ``name``.

        Raises:
            UserError: the template does not take these messages.
        """
        try:
            none = dict.fromkeys(("tools", "documents"))  # as transformers says it
            given = {"messages": list(messages), "add_generation_prompt": True}
            text = self._template.render(**given, **none, **self._specials)
            text.encode()  # refuses half of a surrogate pair
            return text
        except Exception as error:  # an untrusted program may raise anything
            reason = " ".join(str(error).encode(errors="replace").decode().split()).rstrip(".")
            reason = reason or type(error).__name__
            raise UserError(
                f"The model's chat template does not take these messages: {reason}."
            ) from error

    def around(self) -> tuple[str, str] | None:
        """The texts before a first question, and between it and the answer; None if the template
        refuses a single question or changes it."""
        question = "What is it?"
        with suppress(UserError):
            before, *after = self.render([{"role": "user", "content": question}]).split(question)
            if len(after) == 1 and after[0]:
                return before, after[0]
        return None


def source_of(files: Mapping[str, str]) -> str | None:
    """The chat template's source in the files of a tokenizer's folder, by name; None without one.
    Of several, it is the one named ``default``."""
    source: Any = files.get("chat_template.jinja")
    if source is None:
        source = kept_json(files, "tokenizer_config.json").get("chat_template")
    if isinstance(source, list):
        templates = (entry for entry in reversed(source) if isinstance(entry, dict))
        source = next((e.get("template") for e in templates if e.get("name") == "default"), None)
    return source if isinstance(source, str) and source else None


def _raise(message: str) -> None:
    raise TemplateError(message)
