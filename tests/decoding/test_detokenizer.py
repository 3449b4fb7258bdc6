"""The detokenizer: text in pieces against the text of all tokens at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from data_modules.tokenizers import BPETokenizer, ByteTokenizer, SymbolTokenizer
from data_modules.tokenizers.pretrained import PretrainedTokenizer
from mtp_lightning.decoding.detokenizer import Detokenizer
from mtp_lightning.decoding.options import Request
from mtp_lightning.decoding.sequence import TextSequence

LETTERS = "a \u00e9\u4f60\U0001f600\ufffd"
TOKENIZERS = {
    "byte": ByteTokenizer(),
    "bpe": BPETokenizer(vocab_size=300).train(
        ["\u00e9t\u00e9 \u4f60\u597d, a text \U0001f600 "] * 9
    ),
    "symbols": SymbolTokenizer(["end", *"abcdefg"]),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=30)
@given(data=strategies.data())
def test_the_pieces_of_any_ids_join_to_the_text(name: str, data: strategies.DataObject) -> None:
    """Few of the ids are whole characters; an incomplete end is left out."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(strategies.lists(strategies.integers(0, tokenizer.vocab_size - 1)))
    if data.draw(strategies.booleans()) and tokenizer.reads_text:
        ids += tokenizer.encode(data.draw(strategies.text(LETTERS))).tolist()
    detokenizer, text = Detokenizer(tokenizer, [], tokenizer.end_ids), ""
    for token in ids:
        text += detokenizer.add(token)
    whole = tokenizer.decode([i for i in ids if i != tokenizer.eot_id])
    assert whole.startswith(text) and not whole[len(text) :].strip("\ufffd")


def test_a_character_comes_with_the_last_of_its_tokens() -> None:
    tokenizer = ByteTokenizer()
    detokenizer = Detokenizer(tokenizer, [], tokenizer.end_ids)
    pieces = [detokenizer.add(byte) for byte in "a\u4f60b".encode()]
    assert pieces == ["a", "", "", "\u4f60", "b"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> PretrainedTokenizer:
    """A tokenizer like those of Llama 2 and Mistral: words begin with a space, which the first
    word drops, and other characters are spelled in bytes."""
    words = ["\u2581", "\u2581is", "\u2581Paris", *"aisPrb"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [("\u2581", "i"), ("\u2581i", "s")]
    merges += [("\u2581", "P"), ("\u2581P", "a"), ("\u2581Pa", "r"), ("\u2581Par", "i")]
    merges += [("\u2581Pari", "s")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    library = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    library.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    folder: Path = tmp_path_factory.mktemp("llama")
    library.save(str(folder / "tokenizer.json"))
    return PretrainedTokenizer(str(folder))


def sequence(tokenizer: Any, prompt: list[int], ids: list[int], *stop: str) -> TextSequence:
    """The text of tokens that come one by one."""
    request = Request(prompt=prompt, max_new_tokens=len(ids), stop=stop)
    text = TextSequence(request, 0, tokenizer)
    for token in ids:
        if text.finish_reason is None:
            text.extend([token], 0, torch.zeros(1, tokenizer.vocab_size))
    return text


TOKENS = [0, 1, 2, 3 + ord("x"), *range(259, 268)]
PIECES = ["a", " is", " Paris", "\n", "\u4f60", "\U0001f600"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=strategies.lists(strategies.sampled_from(PIECES), min_size=1, max_size=4).map("".join),
    text=strategies.lists(strategies.sampled_from(PIECES), min_size=1, max_size=6).map("".join),
    stop=strategies.sampled_from([*PIECES, " Paris is", "\n\u4f60"]),
)
def test_a_continuation_keeps_its_first_space_and_ends_before_a_stop_string(
    llama: PretrainedTokenizer, before: str, text: str, stop: str
) -> None:
    """The streamed pieces join to the same text."""
    whole = llama.encode(before + text).tolist()
    prompt, ids = next(
        (whole[:n], whole[n:]) for n in range(len(whole)) if llama.decode(whole[:n]) == before
    )
    assert "\ufffd" not in text and llama.decode(whole) == before + text
    done = sequence(llama, prompt, ids)
    assert done.generation().text == "".join(done.fresh().pieces) == text
    done = sequence(llama, prompt, ids, stop)
    expected, stopped, _ = text.partition(stop)
    assert done.generation().text == "".join(done.fresh().pieces) == expected
    assert done.finish_reason == ("stop" if stopped else "length")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=strategies.lists(strategies.sampled_from([*((i,) for i in TOKENS), (198, 172)])))
@example(groups=[(259,), (261,), (262,)])
def test_a_text_after_an_end_token_keeps_its_spaces(
    llama: PretrainedTokenizer, groups: list[tuple[int, ...]]
) -> None:
    """The first token may be a space that the decoder drops."""
    detokenizer, ids = Detokenizer(llama, [2], [2]), [i for group in groups for i in group]
    streamed = "".join(detokenizer.add(token) for token in ids)
    assert streamed == llama.decode([token for token in ids if token != 2])


@pytest.mark.parametrize("name", ["byte", "llama"])
def test_a_text_that_ends_within_a_character_keeps_the_ones_before(
    name: str, llama: PretrainedTokenizer
) -> None:
    """Llama's decoder alone would spoil all bytes of a run that is cut."""
    tokenizer = {"llama": llama, **TOKENIZERS}[name]
    first = 3 if name == "llama" else 0
    ids = [first + byte for byte in "\u65e5\U0001f600\u65e5".encode()[:-1]]
    done = sequence(tokenizer, [], ids)
    left = 2 if name == "llama" else 1  # one for each byte, or for the part of a character
    assert done.generation().text == "\u65e5\U0001f600" + left * "\ufffd"
    assert "".join(done.fresh().pieces) == "\u65e5\U0001f600"


@pytest.mark.parametrize("name", ["byte", "llama"])
def test_bytes_that_are_no_text_are_decoded_a_few_times_each(
    name: str, llama: PretrainedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, text, decoded = {"llama": llama, **TOKENIZERS}[name], 100 * b"\x80\xf0\x9f", 0
    ids = [3 + byte for byte in text] if name == "llama" else [*text, *"\u4f60".encode()]
    whole, decode = tokenizer.decode(ids), tokenizer.decode

    def counting(window: list[int]) -> str:
        nonlocal decoded
        decoded += len(window)
        return decode(window)

    monkeypatch.setattr(tokenizer, "decode", counting)
    detokenizer = Detokenizer(tokenizer, [], [])
    assert "".join(map(detokenizer.add, ids)) + detokenizer.rest() == whole
    assert decoded < 30 * len(ids)


def test_a_token_that_begins_before_the_stop_string_is_cut_there() -> None:
    tokenizer = TOKENIZERS["bpe"]
    ids = tokenizer.encode("a text ").tolist()
    pieces = [tokenizer.decode([i]) for i in ids]
    word, number = next((piece, n) for n, piece in enumerate(pieces) if len(piece) > 2)
    done = sequence(tokenizer, [1], ids, word[1:])
    fresh = done.fresh()
    assert fresh.pieces == [*pieces[:number], word[0]]
    assert done.generation().new_tokens == number + 1
    assert fresh.token_ids == ids[: number + 1]


def test_a_stop_string_is_found_after_tokens_without_text() -> None:
    class Padded(ByteTokenizer):
        def decode(self, ids: Any) -> str:
            return super().decode([i for i in ids if i < 257])

    done = sequence(Padded(), [1], [*b"a", 300, 301, 302, *b"bc"], "ab")
    assert done.finish_reason == "stop" and done.generation().text == ""
