"""How a text and its drafts are shown: on a terminal, in a pipe, as JSON."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO, StringIO, TextIOWrapper
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from data_modules.tokenizers import ByteTokenizer
from mtp_lightning.decoding import Generation, generate
from mtp_lightning.errors import UserError
from mtp_lightning.experiment import generating
from mtp_lightning.experiment.text_stream import (
    Brackets,
    Colors,
    TextStream,
    cost_line,
    ends_at_once,
)
from mtp_lightning.opening import OpenedModel
from mtp_lightning.paths import CONF
from tests.decoding.models import generation, opened_model

WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0},
    {"tree": [3, 2]},
    {"tree": [3, 2], "temperature": 1.0},
    {"speculative": False},
)


class Letters(ByteTokenizer):
    """Each token is one character, so that a test can split the shown text into tokens."""

    @property
    def eot_id(self) -> int:
        return -1

    def decode(self, ids: Any) -> str:
        return "".join(chr(0x100 + int(i)) for i in ids)


@pytest.fixture(scope="module")
def opened() -> OpenedModel:
    return opened_model(3, seq_len=256)


def shown(opened: OpenedModel, marks: Any, **options: Any) -> tuple[str, Generation]:
    tokenizer = Letters()
    stream = TextStream(tokenizer, StringIO(), "a>", terminal=False, marks=marks)
    (generation,) = generate(
        opened.model,
        [[1, 2]],
        max_new_tokens=40,
        tokenizer=tokenizer,
        on_tokens=lambda _, fresh: stream.add(fresh),
        **options,
    )
    stream.end(generation)
    return stream.out.getvalue(), generation  # type: ignore[attr-defined]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_marks_show_every_draft_around_the_unchanged_text(opened, way):
    text, done = shown(opened, Brackets(), **way)
    plain = re.sub(r"\[-\d:(.)-\]", "", text)
    accepted = [int(depth) for depth in re.findall(r"\{\+(\d):", plain)]
    assert re.sub(r"\{\+\d:(.)\+\}", r"\1", plain) == f"a>{done.text}\n"
    counts = [sum(depth == k for depth in accepted) for k in (1, 2)]
    assert counts == (done.drafts_accepted or [0, 0])
    rejected = [(int(k), ord(c) - 0x100) for k, c in re.findall(r"\[-(\d):(.)-\]", text)]
    inside = [draft for draft in done.rejected if draft.at < len(done.token_ids)]
    assert rejected == [(draft.depth, draft.token) for draft in inside]
    assert done.drafts == sum(done.accepted_mask) + len(done.rejected)
    colored, again = shown(opened, Colors(), **way)
    assert re.sub(r"\x1b\[\d+;9m.\x1b\[0m|\x1b\[\d*m", "", colored) == f"a>{again.text}\n"
    assert colored.count(";9m") == len(inside)


def test_drafts_looked_up_in_the_text_have_other_marks(opened: OpenedModel) -> None:
    text, done = shown(opened, Brackets(), lookup=8)
    inside = [draft for draft in done.rejected if draft.at < len(done.token_ids)]
    assert text.count("*:") == done.lookups - (len(done.rejected) - len(inside))
    starred = [star == "*" for star in re.findall(r"\{\+\d(\*?):", text)]
    pairs = zip(done.accepted_mask, done.lookup_mask, strict=True)
    assert starred == [looked_up for accepted, looked_up in pairs if accepted]
    assert sum(done.lookup_mask) == done.lookups_accepted > 0
    assert {draft.looked_up for draft in done.rejected} == {True, False}
    colored, _ = shown(opened, Colors(), lookup=8)
    assert len(re.findall(r"\x1b\[\d+;4(?:;9)?m", colored)) == text.count("*:")
    for marks in (Brackets(), Colors()):
        assert marks.legend(8, lookups=True).endswith(": looked up in the text")
        assert "looked up" not in marks.legend(8)


def test_every_pass_drafts_as_many_tokens_as_set(opened: OpenedModel) -> None:
    """Only near the end of the text, fewer have room."""
    for way, each in (({}, 2), ({"tree": [3, 2]}, 9), ({"speculative": False}, 0)):
        _, done = shown(opened, None, **way)
        full = done.verify_passes * each
        assert full - 2 * max(each - 1, 0) - 3 * each <= done.drafts <= full, way


def test_the_cost_line_counts_tokens_passes_and_drafts() -> None:
    done = generation([25, 18], [36, 25], 36, 80, drafts=72)
    done = replace(done, text="x", accepted_mask=[True] * 43 + [False] * 37)
    assert cost_line(done) == "80 tokens in 37 passes, 2.16 per pass; 43 drafts accepted of 72"
    plain = replace(done, token_ids=[0], verify_passes=0, drafts=0)
    assert cost_line(plain) == "1 token in 1 pass"
    assert ends_at_once(done) is None
    assert "first token is the end" in (
        ends_at_once(replace(done, text="", finish_reason="eot")) or ""
    )
    assert "a stop string" in (ends_at_once(replace(done, text="", finish_reason="stop")) or "")


@pytest.fixture
def generate_app(opened: OpenedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that runs ``generate.py`` with keys, in this process."""
    monkeypatch.setattr(generating, "open_model", lambda *args, **options: opened)

    def ask(**keys: Any) -> None:
        cfg = OmegaConf.load(CONF / "generate.yaml")
        for name in ("hydra", "defaults"):
            del cfg[name]
        cfg.checkpoint, cfg.max_new_tokens = "x", 20
        generating.generate_text(OmegaConf.merge(cfg, keys))

    yield ask


def test_show_drafts_without_drafts_is_refused(generate_app, monkeypatch):
    with pytest.raises(ValueError, match="show_drafts=true does not go together with spec"):
        generate_app(prompt="ab", show_drafts=True, speculative=False)
    headless = opened_model(0, seq_len=64, depth=0)
    monkeypatch.setattr(generating, "open_model", lambda *args, **options: headless)
    with pytest.raises(ValueError, match="no MTP depth to draft with"):
        generate_app(prompt="ab", show_drafts=True)
    generate_app(prompt="ab", show_drafts=True, speculative=False, lookup=2)


def test_generate_prints_legend_cost_and_early_end(generate_app, capsys, monkeypatch, tmp_path):
    generate_app(prompt="ab")
    assert capsys.readouterr().err == ""  # standard output is not a terminal
    generate_app(prompt="ab", show_drafts=True)
    output = capsys.readouterr()
    assert "[-1:" in output.out and "a rejected one of depth 2" in output.err
    generate_app(prompt="ab", output="json", show_drafts=True)
    result = json.loads(capsys.readouterr().out)
    assert len(result["accepted_mask"]) == result["new_tokens"]
    assert result["rejected"][0].keys() == {"at", "depth", "token", "after", "looked_up"}
    (tmp_path / "prompts").write_text("ab\ncd\n")
    generate_app(prompts=str(tmp_path / "prompts"), show_drafts=True)
    output = capsys.readouterr()
    assert output.out.startswith("ab") and "\n\ncd" in output.out and output.out.count("[-1:") > 1
    assert "2 prompts" in output.err
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for name, value in (("TERM", "dumb"), ("NO_COLOR", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            generate_app(prompt="ab", show_drafts=True)
        output = capsys.readouterr()
        assert "[-1:" in output.out and "\x1b" not in output.out + output.err, name
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
    generate_app(prompt="ab", show_drafts=True)
    output = capsys.readouterr()
    assert "\x1b[32;9m" in output.out and "struck through" in output.err
    assert re.search(r"\n20 tokens in \d+ pass(es)?, .* per pass; \d+ drafts? accepted", output.err)
    model = generating.open_model("x").model
    (first,) = generate(model, [list(b"ab")], max_new_tokens=1, eot_id=-1)
    monkeypatch.setattr(ByteTokenizer, "eot_id", first.token_ids[0])
    generate_app(prompt="ab")
    assert "ends at once" in capsys.readouterr().err


def test_a_line_of_a_file_is_one_prompt(tmp_path):
    file = tmp_path / "prompts"
    file.write_bytes("\ufeffa\f\u2028b\r\n\r\n c \n".encode())
    assert generating.read_prompts(None, str(file), StringIO()) == ["a\f\u2028b", " c "]
    file.write_text("\n\n")
    with pytest.raises(UserError, match="/prompts is empty: give"):
        generating.read_prompts(None, str(file), StringIO())
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"text": "<|user|>\\na\\n"}\n\n{"text": "b"}\n')
    assert generating.read_prompts(None, str(chats), StringIO()) == ["<|user|>\na\n", "b"]
    upper = chats.rename(tmp_path / "CHATS.JSONL")
    assert generating.read_prompts(None, str(upper), StringIO()) == ["<|user|>\na\n", "b"]
    for content, message in (
        ('{"text": "a"}\n{"text": ""}\n', "Text 2 of .* is empty: remove it"),
        ('{"other": "a"}\n', r"has no string under 'text' .*: rename it$"),
        ("", "CHATS.JSONL is empty: give text, or leave it out of prompts"),
    ):
        upper.write_text(content)
        with pytest.raises(UserError, match=message):
            generating.read_prompts(None, str(upper), StringIO())


def test_the_time_of_a_file_of_prompts_is_without_the_measurement_of_drafts(
    generate_app, capsys, monkeypatch, tmp_path
):
    now, measured = [0.0], generating.with_measured_depth

    def slow(*args: Any, **options: Any) -> Any:
        now[0] += 60
        return measured(*args, **options)

    monkeypatch.setattr(generating, "with_measured_depth", slow)
    monkeypatch.setattr(generating, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    file = tmp_path / "prompts"
    file.write_text("a\nb\n")
    generate_app(prompts=str(file))
    assert now == [60] and "tokens in 0.0 s" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["json", "text"])
def test_finished_texts_are_printed_before_an_error(
    generate_app, capsys, monkeypatch, tmp_path, output
):
    real = generating.continue_prompts

    def broken(*args: Any, on_end: Any, **options: Any) -> Any:
        def then(i: int, generation: Any) -> None:
            on_end(i, generation)
            if i == 1:
                raise UserError("out of memory")

        return real(*args, on_end=then, **options)

    file = tmp_path / "prompts"
    file.write_text("ab\ncd\nef\n")
    generate_app(prompts=str(file), output=output, batch_size=1)
    texts = capsys.readouterr().out
    monkeypatch.setattr(generating, "continue_prompts", broken)
    with pytest.raises(UserError, match="out of memory"):
        generate_app(prompts=str(file), output=output, batch_size=1)
    begun = capsys.readouterr().out
    if output == "text":
        assert texts.startswith(begun) and "cd" in begun and "ef" not in begun
    else:  # seconds differ
        first, second, _ = (json.loads(line)["text"] for line in texts.splitlines())
        assert [json.loads(line)["text"] for line in begun.splitlines()] == [first, second]


def test_an_error_never_shares_a_line_with_the_prompt(generate_app, capsys, monkeypatch):
    real = generating.continue_prompts

    def broken(*args: Any, on_tokens: Any, **options: Any) -> Any:
        def then(i: int, fresh: Any) -> None:
            on_tokens(i, fresh)
            raise UserError("out of memory")

        return real(*args, on_tokens=then, **options)

    monkeypatch.setattr(generating, "continue_prompts", broken)
    with pytest.raises(UserError, match="out of memory"):
        generate_app(prompt="a prompt")
    output = capsys.readouterr().out
    assert output.startswith("a prompt") and output.endswith("\n")
    # An error before the first token leaves standard output empty, without the prompt.
    monkeypatch.setattr(generating, "continue_prompts", real)
    with pytest.raises(UserError, match="max_new_tokens"):
        generate_app(prompt="a prompt", max_new_tokens=-1)
    assert capsys.readouterr().out == ""


def test_standard_input_that_is_not_utf_8_is_one_sentence(generate_app, monkeypatch):
    latin1 = TextIOWrapper(BytesIO("café".encode("latin-1")), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", latin1)
    with pytest.raises(UserError, match=r"Standard input is not UTF-8: .*0xe9.*; convert it\."):
        generate_app()
