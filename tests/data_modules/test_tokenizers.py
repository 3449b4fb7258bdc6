"""Tokenizers: round trips, determinism, and state that needs no other file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library
from tokenizers.processors import TemplateProcessing

from data_modules.sources import SyntheticSource
from data_modules.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    PretrainedTokenizer,
    SymbolTokenizer,
    Tokenizer,
    bpe,
    tokenizer_from_state,
)
from data_modules.tokenizers.library import bytes_of_pieces
from mtp_lightning.errors import UserError
from mtp_lightning.interop.writing import write_tokenizer

TEXTS = [
    "def f(x):\n    return x + 1\n\n\n\tdone  ", "Stra\u00dfe \u4e16\u754c \U0001f600\u200d\n\r\n",
    "<|endoftext|> stays text\x00\x1f", "", " " * 200 + "x" * 300 + "9" * 130,
]  # fmt: skip


DOCUMENTS = [*SyntheticSource(size=60_000, documents=3).documents(), *TEXTS]


@pytest.fixture(scope="module")
def trained_bpe() -> BPETokenizer:
    return BPETokenizer(400).train(DOCUMENTS)


any_character = st.characters(exclude_categories=["Cs"])
any_text = st.text(any_character | st.sampled_from(" \n\t\r\x0b\x85\xa0ab_9.'"))


@settings(deadline=None, max_examples=100)
@given(text=any_text)
@example(text=TEXTS[2])
@example(text=TEXTS[4])
def test_bpe_is_lossless_and_equals_the_library(trained_bpe, text):
    ids = trained_bpe.encode(text)
    assert trained_bpe.decode(ids) == text
    assert ids.dtype == np.int64 and trained_bpe.eot_id not in ids
    assert ids.tolist() == trained_bpe._library.encode(text, add_special_tokens=False).ids


@settings(deadline=None, max_examples=50)
@given(text=any_text)
def test_byte_tokens_are_lossless(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.encode_batch([text, "a"])[0].tolist() == list(text.encode())


def test_token_bytes_join_to_the_text(trained_bpe):
    text = "naïve  text, \tsome of it – 漢字 🙂 – again and again and again.\n"
    for tokenizer in (ByteTokenizer(), trained_bpe):
        table = tokenizer.token_bytes()
        assert len(table) == tokenizer.vocab_size
        assert b"".join(table[i] for i in tokenizer.encode(text)) == text.encode()
        assert table[tokenizer.eot_id] == b"<|endoftext|>"


def test_bytes_of_words_and_their_pieces_are_those_of_the_decoded_text():
    """A space separates words; ``##`` and ``</w>`` stand for nothing else."""
    text = "the players played, and the end of all plays. don't play on"
    bert, suffix = pre_tokenizers.BertPreTokenizer(), {"end_of_word_suffix": "</w>"}
    clip = pre_tokenizers.Sequence([bert, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for model, trainer, splitter, decoder, options in (
        (models.WordPiece, trainers.WordPieceTrainer, bert, decoders.WordPiece(), {}),
        (models.BPE, trainers.BpeTrainer, bert, decoders.BPEDecoder(), suffix),
        (models.WordLevel, trainers.WordLevelTrainer, bert, None, {}),
        (models.BPE, trainers.BpeTrainer, clip, decoders.ByteLevel(), suffix),
    ):
        library = Library(model(unk_token="?", **options))
        library.pre_tokenizer = splitter
        if decoder is not None:
            library.decoder = decoder
        trained = trainer(vocab_size=32, special_tokens=["?"], show_progress=False, **options)
        library.train_from_iterator([text], trained)
        pieces, ids = bytes_of_pieces(library.to_str(), 32), library.encode(text).ids
        assert 0 not in ids
        decoded = library.decode(ids).replace("</w>", " ").strip()
        assert b"".join(pieces[i] for i in ids).decode().strip() == decoded


def test_byte_decoding_shows_end_of_text_and_broken_bytes():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (257, 256)
    assert tokenizer.decode([97, 256, 0xC3, 256]) == "a<|endoftext|>\ufffd<|endoftext|>"


def test_ids_that_only_a_larger_model_has_are_without_text():
    assert ByteTokenizer().decode([97, 300, 98]) == "ab"
    assert SymbolTokenizer(["end", "a"]).decode([1, 7, 1]) == " a a"


def test_bpe_word_cache_can_overflow(trained_bpe, monkeypatch):
    tokenizer = tokenizer_from_state(trained_bpe.state())
    expected = [trained_bpe.encode(text).tolist() for text in TEXTS * 2]
    monkeypatch.setattr(bpe, "CACHED_WORDS", 3)
    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS * 2)] == expected


def test_bpe_training_is_deterministic_and_compresses(trained_bpe):
    again = BPETokenizer(400).train(iter(DOCUMENTS))
    assert again.state() == trained_bpe.state() and again.fingerprint() == trained_bpe.fingerprint()
    assert trained_bpe.vocab_size == 400
    assert len(trained_bpe.encode(DOCUMENTS[0])) < len(DOCUMENTS[0]) / 2
    assert BPETokenizer(300).train(DOCUMENTS).fingerprint() != trained_bpe.fingerprint()


def test_a_text_with_fewer_merges_than_asked_for_is_said(caplog):
    n_ids = BPETokenizer(400).train(["abab"]).vocab_size
    assert f"pairs for {n_ids} ids only, not for tokenizer.vocab_size=400" in caplog.text


def test_bpe_trains_on_the_first_bytes_only():
    tokenizer = BPETokenizer(270, train_bytes=9).train(["abababab ", "xyxyxyxyxyxy"])
    options = {"kind": "bpe", "vocab_size": 270, "train_bytes": 9}
    assert tokenizer.state() == {**options, "tokenizer_json": tokenizer.state()["tokenizer_json"]}
    assert len(tokenizer.encode("abab")) == 1 and len(tokenizer.encode("xyxy")) == 4


def test_bpe_refuses_small_vocabularies_and_use_before_training():
    with pytest.raises(ValueError, match=r"256 bytes, .* in \[257, 1048576\], not 256"):
        BPETokenizer(256)
    for use in (lambda t: t.encode("a"), lambda t: t.vocab_size, lambda t: t.state()):
        with pytest.raises(ValueError, match="not trained yet"):
            use(BPETokenizer())
    with pytest.raises(TypeError, match="byte tokenizer is not trained"):
        ByteTokenizer().train(["a"])


def test_every_tokenizer_is_restored_from_its_state_and_its_folder(trained_bpe, tmp_path):
    (tmp_path / "t.json").write_text(trained_bpe.state()["tokenizer_json"])
    for tokenizer in (ByteTokenizer(), trained_bpe, PretrainedTokenizer(str(tmp_path / "t.json"))):
        folder = tmp_path / tokenizer.kind
        tokenizer.save(folder)
        state = json.loads(json.dumps(tokenizer.state()))
        for copy in (tokenizer_from_state(state), Tokenizer.load(folder)):
            assert type(copy) is type(tokenizer)
            assert copy.fingerprint() == tokenizer.fingerprint() and copy.spec() == tokenizer.spec()
            assert (copy.vocab_size, copy.eot_id) == (tokenizer.vocab_size, tokenizer.eot_id)
            for text in TEXTS:
                assert copy.encode(text).tolist() == tokenizer.encode(text).tolist()
    with pytest.raises(ValueError, match="unknown tokenizer kind 'nope'"):
        tokenizer_from_state({"kind": "nope"})


def library_file(path, specials: list[str]) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(name, special=True) for name in specials])
    library.enable_truncation(4)
    library.save(str(path))


def test_pretrained_finds_the_end_of_text_token(tmp_path):
    library_file(tmp_path / "tokenizer.json", ["<pad>", "</s>", "<stop>"])
    file = PretrainedTokenizer(str(tmp_path / "tokenizer.json"))
    folder = PretrainedTokenizer(str(tmp_path))
    assert (file.vocab_size, file.eot_id) == (259, 257) == (folder.vocab_size, folder.eot_id)
    # A truncation stored in the file must not cut documents, special names are text.
    assert file.decode(file.encode("longer than four</s>")) == "longer than four</s>"
    assert file.eot_id not in file.encode("a</s>")
    assert file.encode_batch(["</s>"])[0].tolist() == file.encode("</s>").tolist()
    assert PretrainedTokenizer(str(tmp_path), eot_token="<stop>").eot_id == 258
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    assert PretrainedTokenizer(str(tmp_path)).eot_id == 258
    # An exported folder names the end of text that the model was trained with.
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}")
    for chosen in ("<stop>", "</s>"):
        tokenizer = PretrainedTokenizer(str(tmp_path), eot_token=chosen)
        assert tokenizer.eot_id == {"<stop>": 258, "</s>": 257}[chosen]
        (tmp_path / "out").mkdir(exist_ok=True)
        write_tokenizer(tmp_path / "out", tokenizer, max_positions=9)
        assert PretrainedTokenizer(str(tmp_path / "out")).eot_id == tokenizer.eot_id
    # So does one whose config names none.
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    write_tokenizer(tmp_path / "out", PretrainedTokenizer(str(tmp_path)), max_positions=9)
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config == {"pad_token": "<pad>", "eos_token": "</s>"}


def test_prompts_begin_with_the_beginning_of_text_tokens(tmp_path):
    """By the file or ``add_bos_token``; a model that was trained here has none."""
    library_file(tmp_path / "tokenizer.json", ["<s>", "</s>"])
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    library = Library.from_str(json.dumps(content))
    specials = [("<s>", 256), ("</s>", 257)]
    library.post_processor = TemplateProcessing(single="<s> <s> $A </s>", special_tokens=specials)
    begins = json.loads(library.to_str())
    text = PretrainedTokenizer(str(tmp_path)).encode("a b").tolist()
    for written, config, expected in (
        (content, {}, []),
        (begins, {}, [256, 256]),
        (content, {"add_bos_token": True, "bos_token": "<s>"}, [256]),
        (content, {"add_bos_token": True}, []),  # no token to begin with
        (begins, {"add_bos_token": False, "bos_token": "<s>"}, []),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(written))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = tokenizer_from_state(PretrainedTokenizer(str(tmp_path)).state())
        assert tokenizer.encode_prompt("a b").tolist() == [*expected, *text]
        assert tokenizer.encode_prompt("").tolist() == expected
        assert tokenizer.encode("a b").tolist() == text
        # The names stand for the special tokens; a beginning in the text is not doubled.
        typed = "".join("<s>" for _ in expected) + "a b</s>"
        assert tokenizer.encode_prompt(typed).tolist() == [*expected, *text, 257]
        bare = tokenizer.without_beginning()
        assert bare.encode_prompt("a b").tolist() == text
        assert (bare is tokenizer) == (not expected)
        assert (bare.eot_id, bare.vocab_size) == (tokenizer.eot_id, tokenizer.vocab_size)
        bare.save(tmp_path / "bare")
        write_tokenizer(tmp_path / "bare", bare, max_positions=9)
        assert PretrainedTokenizer(str(tmp_path / "bare")).encode_prompt("a b").tolist() == text
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="tokenizer_config.json is damaged"):
        PretrainedTokenizer(str(tmp_path)).encode_prompt("a")


def test_eos_is_read_from_special_tokens_map_of_older_folders(tmp_path):
    library_file(tmp_path / "tokenizer.json", ["<s>", "</s>", "<|im_end|>"])
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    for config, eot in (
        ({}, 258),
        ({"eos_token": "</s>"}, 258),
        ({"eos_token": "</s>", "added_tokens_decoder": {}}, 257),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert PretrainedTokenizer(str(tmp_path)).eot_id == eot


def test_several_ids_may_end_a_text(tmp_path, caplog):
    """Those of ``generation_config.json``, which an export keeps."""
    library_file(tmp_path / "tokenizer.json", ["<s>", "</s>", "<|user|>"])
    file = tmp_path / "generation_config.json"
    for eos_token_id, ends in (
        (None, (257,)), (257, (257,)), (258, (257, 258)), ([258, 257], (257, 258)),
        ([258, 10**9, -1, "x", True], (257, 258)),
    ):  # fmt: skip
        file.write_text(json.dumps({"eos_token_id": eos_token_id, "temperature": 0.6}))
        tokenizer = tokenizer_from_state(PretrainedTokenizer(str(tmp_path)).state())
        assert tokenizer.end_ids == ends
        eos = {"eos_token_id": ends[0] if len(ends) == 1 else list(ends)}
        assert tokenizer.generation_config() == {"do_sample": False, "temperature": 0.6, **eos}
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "generation_config.json: [1000000000, -1, 'x', True] is not in the tokenizer" in warning
    assert ByteTokenizer().end_ids == (256,)
    assert ByteTokenizer().generation_config() == {"do_sample": False, "eos_token_id": 256}


def test_pretrained_refuses_missing_files_and_tokens(tmp_path):
    library_file(tmp_path / "tokenizer.json", ["<pad>"])
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name, eot_token, error, message in (
        ("tokenizer.json", None, ValueError, "no end-of-text token .*<pad>.*tokenizer.eot_token"),
        ("tokenizer.json", "nope", ValueError, "no token 'nope'.* as eos_token in a tok"),
        ("bad.json", None, ValueError, "bad.json is not a tokenizer.json"),
        ("nowhere.json", None, FileNotFoundError, "nowhere.json does not exist"),
        ("empty", None, FileNotFoundError, "holds no tokenizer.json"),
    ):
        with pytest.raises(error, match=message):
            PretrainedTokenizer(str(tmp_path / name), eot_token=eot_token).encode("a")


def test_damaged_files_of_a_pretrained_tokenizer_are_refused(tmp_path):
    library_file(tmp_path / "tokenizer.json", ["</s>"])
    state = PretrainedTokenizer(str(tmp_path)).state()
    for config in (3, None, "[", "[]", "[" * 5000):
        with pytest.raises(UserError, match="tokenizer_config.json is damaged"):
            tokenizer_from_state({**state, "beside": {"tokenizer_config.json": config}})
    with pytest.raises(UserError, match="the stored tokenizer of the kind pretrained is damaged"):
        tokenizer_from_state({**state, "beside": [1]})
    for name in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"\xff")
        with pytest.raises(UserError, match=f"{name} cannot be read as text: 'utf-8'"):
            PretrainedTokenizer(str(tmp_path)).encode("a")
        (tmp_path / name).unlink()
        library_file(tmp_path / "tokenizer.json", ["</s>"])
    with pytest.raises(FileNotFoundError, match="~no-such-name/x does not exist"):
        PretrainedTokenizer("~no-such-name/x").encode("a")
    with pytest.raises(UserError, match="m.gguf is not a tokenizer.json: export.py writes one"):
        PretrainedTokenizer("m.gguf").encode("a")


def test_a_hub_name_that_cannot_be_reached_is_refused(monkeypatch):
    import tokenizers

    class Offline:
        @staticmethod
        def from_pretrained(name):
            raise Exception("cannot\nreach the hub")

    monkeypatch.setattr(tokenizers, "Tokenizer", Offline)
    with pytest.raises(FileNotFoundError, match="'some/name' is neither .*cannot reach the hub"):
        PretrainedTokenizer("some/name").encode("a")
