"""Chat: the template of a tokenizer, and messages by OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_modules.tokenizers import PretrainedTokenizer
from mtp_lightning.chat_template import ChatTemplate
from mtp_lightning.errors import UserError
from mtp_lightning.opening import OpenedModel
from tests.serving.conftest import NAME, Serving, assert_refused, generation, serving

pytestmark = pytest.mark.extras

MESSAGES = [
    {"role": "system", "content": "Be  brief. "},
    {"role": "user", "content": "\u4f60\u597d <b>\n"},
]


@pytest.fixture(scope="module")
def served(chat_model: OpenedModel) -> Iterator[Serving]:
    with serving(chat_model, batch_size=2) as server:
        yield server


def test_templates_may_use_generation_tags_and_tools() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    source += "{% if tools is not none %}tools{% endif %}"
    assert ChatTemplate(source, {}).render([{"content": "a"}, {"content": "b"}]) == "ab"


def test_a_model_with_a_broken_template_still_completes_texts(
    chat_folder: Path, chat_model: OpenedModel, caplog: pytest.LogCaptureFixture
) -> None:
    state = {**chat_model.tokenizer_state, "beside": {"chat_template.jinja": "{% nope %}"}}
    with serving(replace(chat_model, tokenizer_state=state)) as api:
        assert "Chats are refused: the model's chat template is not valid Jinja" in caplog.text
        answer = api.post({"prompt": "a", "max_tokens": 2})
        assert answer.status_code == 200


def test_a_template_with_too_many_nested_blocks_is_refused() -> None:
    nested = "{% for i in x %}" * 25 + "{% endfor %}" * 25
    with pytest.raises(UserError, match="not valid Jinja: too many statically nested blocks"):
        ChatTemplate(nested, {})


def test_developer_messages_and_parts_equal_a_system_text(served: Serving) -> None:
    parts = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]
    developer = [{"role": "developer", "content": parts}, MESSAGES[1]]
    system = [{"role": "system", "content": "Be\nbrief."}, MESSAGES[1]]
    fields = {"model": NAME, "max_tokens": 9, "temperature": 0}
    answers = [
        served.client().chat.completions.create(**fields, messages=messages)
        for messages in (developer, system)
    ]
    assert answers[0].choices[0].message == answers[1].choices[0].message
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens


def test_fields_that_change_nothing_are_accepted(served: Serving) -> None:
    message = {"role": "assistant", "content": "b", "refusal": None}
    with_extras = [*MESSAGES, {**message, "annotations": [], "tool_calls": []}, MESSAGES[1]]
    plain = [*MESSAGES, message, MESSAGES[1]]
    tools = [{"type": "function", "function": {"name": "f"}}]
    texts = set()
    for fields in (
        {"messages": plain},
        {"messages": with_extras},
        {"messages": [{**m, "name": "me"} for m in plain]},
        {"messages": plain, "tools": tools, "tool_choice": "none"},
        {"messages": plain, "tools": [], "tool_choice": "auto"},
        {"messages": plain, "tool_choice": "auto"},
    ):
        body = {"max_tokens": 9, "temperature": 0, **fields}
        answer = served.post(body, path="chat/completions")
        assert answer.status_code == 200, answer.text
        texts.add(answer.json()["choices"][0]["message"]["content"])
    assert len(texts) == 1


def test_templates_may_read_names(chat_model: OpenedModel) -> None:
    template = "{% for m in messages %}{{ m.name }}{% endfor %}"
    state = {**chat_model.tokenizer_state, "beside": {"chat_template.jinja": template}}
    with serving(replace(chat_model, tokenizer_state=state)) as api:
        messages = [{"role": "user", "content": "a", "name": "me"}]
        body = {"messages": messages, "max_tokens": 2}
        answer = api.post(body, path="chat/completions").json()
    assert answer["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize("half", ["{{ '\\ud800' }}", "{{ raise_exception('\\ud800\\n') }}"])
def test_half_a_character_of_a_template_is_refused(chat_model: OpenedModel, half: str) -> None:
    state = {**chat_model.tokenizer_state, "beside": {"chat_template.jinja": half}}
    with serving(replace(chat_model, tokenizer_state=state)) as api:
        answer = api.post({"messages": MESSAGES, "max_tokens": 2}, path="chat/completions")
    assert_refused(answer, 400, "The model's chat template does not take these messages")


def test_the_prompt_equals_that_of_transformers(chat_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(chat_folder)
    tokenizer = PretrainedTokenizer(str(chat_folder))
    template = ChatTemplate.of(tokenizer.state())
    assert template is not None
    text = template.render(MESSAGES)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text == expected and "<|im_start|>assistant" in text and "Be  brief.<" in text
    assert tokenizer.encode_specials(text).tolist() == theirs(text).input_ids


def test_the_default_template_of_a_tokenizer_config_is_read() -> None:
    assert ChatTemplate.of({"kind": "byte"}) is None
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    for value, expected in (("x", "x"), (named, "d")):
        config = json.dumps({"chat_template": value})
        template = ChatTemplate.of({"beside": {"tokenizer_config.json": config}})
        assert template is not None and template.render([]) == expected
    with pytest.raises(ValueError, match="not valid Jinja"):
        ChatTemplate("{% if %}", {})


@pytest.mark.parametrize("value", [3, {}, [1], [{"name": [1], "template": "x"}]])
def test_values_that_are_not_templates_or_tokens_are_ignored(value: Any) -> None:
    odd = json.dumps({"chat_template": value, "bos_token": value})
    assert ChatTemplate.of({"beside": {"tokenizer_config.json": odd}}) is None
    files = {"tokenizer_config.json": odd, "chat_template.jinja": "<{{ bos_token }}>"}
    template = ChatTemplate.of({"beside": files})
    assert template is not None and template.render([]) == "<>"


def test_templates_cannot_reach_python_or_files() -> None:
    for source in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
    ):
        with pytest.raises(ValueError, match="does not take these messages"):
            ChatTemplate(source, {}).render([{"role": "user", "content": "a"}])
        assert ChatTemplate(source, {}).around() is None


def test_around_is_the_text_before_and_after_a_question(chat_folder: Path) -> None:
    template = ChatTemplate.of(PretrainedTokenizer(str(chat_folder)).state())
    assert template is not None
    before, after = template.around() or ("", "")
    assert before + "Why?" + after == template.render([{"role": "user", "content": "Why?"}])
    for source in ("{{ messages[0]['content'] * 2 }}.", "{{ messages[0]['content'] }}", "hello"):
        assert ChatTemplate(source, {}).around() is None


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.8, "seed": 3}], ids=str)
def test_answers_equal_generates(chat_model: OpenedModel, served: Serving, settings: Any) -> None:
    template = ChatTemplate.of(chat_model.tokenizer_state)
    assert template is not None
    prompt = chat_model.tokenizer.encode_specials(template.render(MESSAGES)).tolist()
    expected = generation(chat_model, prompt, 50, **settings)
    api = served.client().chat.completions
    fields = {"model": NAME, "messages": MESSAGES, "max_completion_tokens": 50, **settings}
    whole = api.create(**fields, logprobs=True, top_logprobs=2)
    (choice,) = whole.choices
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert whole.usage.prompt_tokens == len(prompt)
    assert whole.usage.completion_tokens == expected.new_tokens
    parts = [[{"type": "text", "text": m["content"]}] for m in MESSAGES]
    in_parts = [{**m, "content": part} for m, part in zip(MESSAGES, parts, strict=True)]
    chunks = list(api.create(**{**fields, "messages": in_parts}, logprobs=True, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant" and chunks[0].object == "chat.completion.chunk"
    assert "".join(delta.content or "" for delta in deltas) == expected.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == [
        choice.finish_reason
    ]
    logprobs = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    tokens = [token for part in logprobs for token in part]
    assert [t.token for t in tokens] == [t.token for t in choice.logprobs.content]
    text = b"".join(bytes(t.bytes) for t in choice.logprobs.content)
    assert text.decode("utf-8", "replace") == expected.text
    assert all(len(t.top_logprobs) == 2 for t in choice.logprobs.content)


def test_chats_without_max_tokens_may_be_long(served: Serving) -> None:
    answer = served.client().chat.completions.create(model=NAME, messages=MESSAGES, seed=1)
    assert answer.usage.completion_tokens > 16 or answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "at least one message"),
        ({"messages": "hi"}, "at least one message"),
        ({"messages": ["hi"]}, 'A message must be an object, not "hi"'),
        ({"messages": [{"role": "king", "content": "a"}]}, "A role must be one of assistant"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "A role must be one of"),
        ({"messages": [{"role": "user"}]}, "content must be a string, not null"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "not known here"),
        (
            {"messages": [{"role": "user", "content": "a", "name": 5}]},
            "name must be a string, not 5",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "of type text"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "A user speaks first"),
        ({"top_logprobs": 2}, "needs logprobs=true"),
        ({"logprobs": 2}, "logprobs must be true or false"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "differ"),
        ({"tools": [{"type": "function"}]}, "tools=a list of 1 is not supported"),
        ({"tools": [], "tool_choice": "required"}, 'tool_choice="required" is not supported'),
        ({"response_format": {"type": "json_object"}}, "response_format=an object is not"),
        ({"reasoning_effort": "high"}, "not known here"),
        ({"prompt": "a"}, "not known here"),
    ],
    ids=str,
)
def test_wrong_fields_are_refused(served: Serving, fields: dict[str, Any], message: str) -> None:
    body = {"model": NAME, "messages": MESSAGES, **fields}
    assert_refused(served.post(body, path="chat/completions"), 400, message, param=[*fields][-1])


def test_prompts_are_encoded_while_texts_are_decoded(served: Serving) -> None:
    """A tokenizer of the library cannot change, as it does for special tokens, while it decodes."""
    api = served.client()

    def ask(seed: int) -> str:
        answer = api.chat.completions.create(
            model=NAME, messages=MESSAGES * 2, seed=seed % 4, max_tokens=20, stop=["never"]
        )
        return answer.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(64)))
    assert texts == texts[:4] * 16 and len(set(texts)) == 4
