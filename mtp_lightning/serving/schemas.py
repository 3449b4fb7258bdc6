"""Schemas of request bodies: the part of OpenAI's API that this server supports.

pydantic checks the types, and :func:`parse` turns its errors into sentences. A field that
would change the text but is not supported is refused, not ignored. A null counts as missing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from mtp_lightning.errors import UserError, suggestion
from mtp_lightning.serving.refusal import Refusal
from mtp_lightning.settings import is_whole

# Fields that do not change the text.
_IGNORED = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "user",
}  # fmt: skip
# Unsupported fields, each accepted only with the value that changes nothing.
_NEUTRAL: Mapping[str, Any] = {
    "n": 1,
    "add_generation_prompt": True,
    "best_of": 1,
    "continue_final_message": False,
    "echo": False,
    "frequency_penalty": 0,
    "function_call": "none",
    "functions": [],
    "ignore_eos": False,
    "length_penalty": 1,
    "logit_bias": {},
    "min_p": 0,
    "min_tokens": 0,
    "modalities": ["text"],
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "response_format": {"type": "text"},
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
    "use_beam_search": False,
}
_SHOWN = 60  # characters of a client's value in a message
_MOST_STOPS, _LONGEST_STOP = 16, 256
# What a field must be, by the type of pydantic's error; numbers get their bounds from the schema.
_WANTED = {
    "bool_type": "true or false",
    "list_type": "a string or a list",
    **dict.fromkeys(["string_type", "missing"], "a string"),
    **dict.fromkeys(
        ["string_too_short", "string_too_long"], f"a string of 1 to {_LONGEST_STOP} characters"
    ),
}

Role = Literal["assistant", "developer", "system", "user"]


def _encodable(text: Any) -> Any:
    """Refuse half of a surrogate pair, which cannot be encoded as UTF-8."""
    if isinstance(text, str):
        text.encode("utf-8")  # a UnicodeEncodeError is a ValueError, which pydantic reports
    return text


def _unwrapped(prompt: Any) -> Any:
    """The prompt of a list with one prompt."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        return prompt[0]
    return prompt


def _joined(content: Any) -> Any:
    """The joined text of a content that consists of parts."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        raise Refusal("The parts of a content must be of type text.", param="messages")
    texts = [part.get("text") for part in content]
    for text in texts:
        if not isinstance(text, str):
            raise Refusal(f"text must be a string, not {shown(text)}.", param="messages")
    return "\n".join(texts)


Text = Annotated[str, AfterValidator(_encodable)]
Stop = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]
Stops = Annotated[
    list[Stop],
    Field(max_length=_MOST_STOPS),
    BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
]
Alternatives = Annotated[int, Field(ge=0, le=20)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    # Fields that are dropped if they are empty lists, as in OpenAI's answers.
    unused: ClassVar[Collection[str]] = ()

    @model_validator(mode="before")
    @classmethod
    def _without_unused(cls, fields: Any) -> Any:
        """The fields that are neither null nor unused."""
        if not isinstance(fields, dict):
            return fields
        fields = {name: value for name, value in fields.items() if value is not None}
        return {n: value for n, value in fields.items() if n not in cls.unused or value != []}


class Message(_Strict):
    """One message of a chat."""

    unused = ("annotations", "tool_calls")

    role: Role
    content: Annotated[Text, BeforeValidator(_joined)]
    name: Text | None = None


class StreamOptions(_Strict):
    """The contents of a stream besides the text."""

    include_usage: bool = False
    include_drafts: bool = False
    include_obfuscation: Any = None


class Body(_Strict):
    """The fields of both endpoints."""

    model: Any = None
    max_tokens: int | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_k: Annotated[
        Annotated[int, Field(ge=1, le=2**31)] | None,
        BeforeValidator(lambda k: None if is_whole(k) and k in (-1, 0) else k),  # vLLM's words
    ] = None
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=1 - 2**63, le=2**63 - 1)] | None = None
    draft_depth: int | None = None
    stop: Stops = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _only_supported(cls, fields: Any) -> Any:
        """Drop fields that do not change the text, and refuse unsupported ones that would."""
        supported, choice = {}, fields.get("tool_choice")
        unused = {"tools"} if choice == "none" else set()
        if choice == "auto" and not fields.get("tools"):
            unused = {"tool_choice"}
        for name, value in fields.items():
            if value is None or name in _IGNORED | unused:
                continue
            if name in cls.model_fields:
                supported[name] = value
            elif name not in _NEUTRAL:
                remedy = suggestion(name, cls.model_fields, "leave it out.")
                if name == "max_completion_tokens":  # a chat's
                    remedy = "give max_tokens."
                message = f"The field {shown(name)} is not known here: {remedy}"
                raise Refusal(message, param=shown(name).strip('"'))
            elif not _same(value, _NEUTRAL[name]):
                message = f"{shown(value)} is not supported, only {json.dumps(_NEUTRAL[name])}"
                raise Refusal(f"{name}={message}.", param=name)
        return supported


class CompletionBody(Body):
    """The body of ``/v1/completions``."""

    prompt: Annotated[Any, BeforeValidator(_unwrapped), AfterValidator(_encodable)] = None
    logprobs: Annotated[
        Alternatives | None, BeforeValidator(lambda n: None if n is False else n)
    ] = None


class ChatBody(Body):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Alternatives = 0


AnyBody = TypeVar("AnyBody", bound=Body)


def limited(kind: type[AnyBody], max_tokens: int, max_draft: int) -> type[AnyBody]:
    """A body with upper bounds for new tokens and for drafts per round."""
    length = Annotated[int, Field(ge=1, le=max_tokens)] | None
    names = {"max_tokens", "max_completion_tokens"} & kind.model_fields.keys()
    fields: dict[str, Any] = {name: (length, None) for name in names}
    fields["draft_depth"] = (Annotated[int, Field(ge=0, le=max_draft)] | None, None)
    return create_model(kind.__name__, __base__=kind, **fields)


def parse(body: bytes, kind: type[AnyBody]) -> AnyBody:
    """Parse a body.

    Raises:
        Refusal: the body is not a JSON object in UTF-8, or a field is invalid.
    """
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError:
        raise Refusal("The body is not UTF-8: send JSON in UTF-8.") from None
    except RecursionError:
        raise Refusal("The body is nested too deeply: nest it less.") from None
    except (json.JSONDecodeError, UserError) as error:
        raise Refusal(f"The body is not JSON: {error}.") from None
    except ValueError:
        most = sys.get_int_max_str_digits()
        raise Refusal(f"The body holds a number of more than {most} digits: shorten it.") from None
    if not isinstance(content, dict):
        raise Refusal(f"The body must be a JSON object, not {shown(content)}.")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _refusal(kind, error) from error


def _no_number(name: str) -> None:
    raise UserError(f"{name} is not a number in JSON")


def _same(value: Any, neutral: Any) -> bool:
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _refusal(kind: type[Body], errors: ValidationError) -> Refusal:
    """The first of pydantic's errors as a sentence."""
    error = errors.errors(include_url=False)[0]
    code, (field, *inside) = error["type"], error["loc"]
    value: Any = None if code == "missing" else error["input"]
    name = str(inside[-1] if field in ("messages", "stream_options") and inside else field)
    if code in ("value_error", "string_unicode"):
        message = f"{name} holds half of a surrogate pair, no character."
    elif field == "messages" and not inside:
        message = "messages must be a list of at least one message."
    elif field == "messages" and len(inside) == 1:
        message = f"A message must be an object, not {shown(value)}."
    elif field == "messages" and code == "extra_forbidden":
        message = f"A message's field {shown(name)} is not known here: leave it out."
    elif name == "role":
        message = f"A role must be one of {', '.join(get_args(Role))}, not {shown(value)}."
    elif field == "stream_options" and (not inside or code == "extra_forbidden"):
        message = "stream_options must be an object with include_usage or include_drafts."
    elif field == "stop" and code == "too_long":
        message = f"stop holds {len(value)} strings: give at most {_MOST_STOPS}."
    else:
        message = f"{name} must be {_WANTED.get(code) or _number(kind, name)}, not {shown(value)}."
    return Refusal(message, param=str(field))


def _number(kind: type[Body], name: str) -> str:
    """The numbers that a field accepts, in words."""
    schema = kind.model_json_schema()["properties"][name]
    schema = next((part for part in schema.get("anyOf", ()) if part["type"] != "null"), schema)
    if name == "draft_depth" and schema["maximum"] == 0:
        return "left out or 0 on this server, which makes no drafts"
    number = "a whole number" if schema["type"] == "integer" else "a number"
    return f"{number} from {schema['minimum']} to {schema['maximum']}"


def shown(value: Any) -> str:
    """A client's value, shortened to fit into a sentence."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    if is_whole(value) and abs(value) >= 10**_SHOWN:
        return "a number of more digits than fit here"
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}.."
