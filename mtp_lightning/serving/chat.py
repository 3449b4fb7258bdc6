"""The chat template that a tokenizer came with: messages as the text that the model was trained on.

A template is a program of whoever made the model. It runs in Jinja's sandbox, as transformers runs
it: it sees the messages and nothing of Python, and can change neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.serving.refusal import Refusal

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTemplate:
    """How a model's messages are written.

    Args:
        source: of Jinja.
        specials: names of special tokens that the template may use.

    Raises:
        UserError: it is no template.
    """

    def __init__(self, source: str, specials: Mapping[str, str]) -> None:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"the model's chat template is not one of Jinja: {error}.") from error
        self._specials = dict(specials)

    @classmethod
    def of(cls, tokenizer_state: Mapping[str, Any]) -> ChatTemplate | None:
        """The one that lay beside a tokenizer, None if there was none.

        Args:
            tokenizer_state: of a :class:`~mtp_lightning.opening.OpenedModel`.

        Raises:
            UserError: it is no template.
        """
        beside = tokenizer_state.get("beside", {})
        config = json.loads(beside.get("tokenizer_config.json", "{}"))
        source = beside.get("chat_template.jinja", config.get("chat_template"))
        if isinstance(source, list):  # several by name
            named = {entry.get("name"): entry.get("template") for entry in source}
            source = named.get("default")
        if not isinstance(source, str) or not source:
            return None
        found = {name: config.get(name) for name in _SPECIAL}
        texts = {k: v["content"] if isinstance(v, dict) else v for k, v in found.items()}
        return cls(source, {name: text for name, text in texts.items() if isinstance(text, str)})

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """What the model reads before it answers.

        Args:
            messages: each with ``role`` and ``content``.

        Raises:
            Refusal: the template does not take these messages.
        """
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=True, **self._specials
            )
        except Exception as error:  # whatever a stranger's program makes of a stranger's messages
            told = str(error).strip().rstrip(".") or type(error).__name__
            raise Refusal(
                f"The model's chat template does not take these messages: {told}.", param="messages"
            ) from error


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
