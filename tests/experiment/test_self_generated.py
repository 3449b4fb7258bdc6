"""``data=self_generated``: texts that a trunk generates, as data for heads on it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_modules.sources import SyntheticSource
from data_modules.splitting import DocumentSplit
from data_modules.token_store import TokenStore
from data_modules.tokenizers import ByteTokenizer
from data_modules.windows import WindowBatch
from mtp_lightning.experiment.self_generated import KeptTexts, SelfGenerated, _until, trunk_digest
from mtp_lightning.opening import open_model
from tests import deepseek
from tests.integration import helpers
from tests.interop import folders

EOT = 256
TRUNK = helpers.typed(
    "mtp=none mtp.depth data.seq_len=48 model.n_layers=2 trainer.max_steps=30 "
    "trainer.val_check_interval=30"
)
GENERATED = helpers.typed(
    "data=self_generated data.prompts._target_=data_modules.sources.SyntheticSource "
    "+data.prompts.size=40000 +data.prompts.documents=90 data.n_prompts=40 data.prompt_tokens=8 "
    "data.new_tokens=40 data.val_fraction=0.2 data.seq_len=24 model.n_layers=2 "
    "mtp.freeze_trunk=true trainer.max_steps=4 trainer.val_check_interval=2"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained trunk and a cache."""
    folder = tmp_path_factory.mktemp("self_generated")
    helpers.train_here(folder / "trunk", folder / "cache", TRUNK)
    return folder


def source() -> SyntheticSource:
    return SyntheticSource(size=40_000, documents=90)


def corpus(base: Path, cache: Path, **changes: Any) -> SelfGenerated:
    settings: dict[str, Any] = {
        "model": str(base / "trunk"), "n_prompts": 12, "prompt_tokens": 8, "new_tokens": 20,
        "val_fraction": 0.25, "seq_len": 16, "batch_size": 2, "cache_dir": cache,
        "accelerator": "cpu", "eval_bytes": "all", **changes,
    }  # fmt: skip
    return SelfGenerated(source(), settings.pop("tokenizer", ByteTokenizer()), **settings)


def documents(store: TokenStore) -> dict[str, list[list[int]]]:
    """The texts of each split, without their end-of-text tokens."""
    splits = {}
    for name, file in store.splits.items():
        tokens, ends = file.tokens(), [*file.starts()[1:], file.n_tokens]
        splits[name] = [
            tokens[start : end - 1].tolist() for start, end in zip(file.starts(), ends, strict=True)
        ]
        assert all(tokens[end - 1] == EOT for end in ends)
    return splits


def test_texts_are_prompts_and_the_trunks_greedy_continuations(base: Path, tmp_path: Path) -> None:
    """Greedy texts are compared with a loop that computes the whole text again for every token."""
    data = corpus(base, tmp_path, temperature=0.0)
    model = open_model(base / "trunk").model
    splits = documents(data.store)
    assert {name: len(texts) for name, texts in splits.items()} == {"train": 9, "val": 3}
    documents_of: dict[str, list[bytes]] = {"train": [], "val": []}
    for name, document in DocumentSplit(source(), val_fraction=0.25):
        documents_of[name].append(document.encode())
    for name, texts in splits.items():
        for text in texts:
            assert any(bytes(text[:8]) in document for document in documents_of[name])
            ids = text[:8]
            while len(ids) < 28:
                with torch.no_grad():
                    hidden = model(WindowBatch(torch.tensor([[*ids, 0]]), 0))[0]
                    ids.append(int(model.head(hidden[:, -1]).argmax()))
                if ids[-1] == EOT:
                    ids.pop()
                    break
            assert text == ids
    prompts = [bytes(text[:8]) for texts in splits.values() for text in texts]
    assert len(set(prompts)) == 12


def test_a_generated_question_ends_before_the_formats_next_words() -> None:
    """Without an end token, the model continues with the format's next words and an answer."""
    byte = ByteTokenizer()

    def question(text: str) -> str:
        return byte.decode(_until("[/INST]", byte.encode(text).tolist(), byte))

    assert question(" why? [/INST] so [/INST]") == " why? " and question(" why?") == " why?"
    assert _until("", [1, 2], byte) == [1, 2]


def test_texts_depend_on_the_seed_and_not_on_the_batch_size(base: Path, tmp_path: Path) -> None:
    def files(where: str, **changes: Any) -> dict[str, bytes]:
        store = corpus(base, tmp_path / where, **changes).store
        return {name: file.path.read_bytes() for name, file in store.splits.items()}

    first = files("a", decode_batch_size=5)
    assert files("b", decode_batch_size=1) == files("c", decode_batch_size=64) == first
    assert files("d", sample_seed=1) != first
    assert files("e", temperature=0.5) != first and files("f", top_p=0.5) != first
    assert files("g", top_p=1.0) == first


def test_a_stopped_build_continues_after_its_last_text(base, tmp_path, monkeypatch):
    whole = documents(corpus(base, tmp_path / "whole").store)
    add, stop_at, written = KeptTexts.add, [0], []

    def stopping(self: KeptTexts, part: str, index: int, ids: list[int]) -> None:
        add(self, part, index, ids)
        written.append((part, index))
        if len(written) == stop_at[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(KeptTexts, "add", stopping)
    for stop_at[0] in (4, 9):
        with pytest.raises(KeyboardInterrupt):
            _ = corpus(base, tmp_path / "own", decode_batch_size=2).store
        assert list((tmp_path / "own" / "stores").iterdir()) == [], "no half store"
        (file,) = (tmp_path / "own" / "texts").iterdir()
        with file.open("a") as lines:
            lines.write('["texts", 1')  # the process was killed while it wrote
    assert documents(corpus(base, tmp_path / "own", decode_batch_size=3).store) == whole
    assert len(written) == len(set(written)) == 12
    assert not list((tmp_path / "own" / "texts").iterdir())


def test_kept_texts_are_rewritten_only_without_a_half_line(tmp_path: Path) -> None:
    file = tmp_path / "texts"
    KeptTexts(file).add("texts", 0, [1, 2])
    before = file.stat()
    KeptTexts(file)
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    for half in ('["texts", 1', "half", '["texts", 1, [3]]'):
        with file.open("a") as lines:
            lines.write(half)
        damaged = file.stat()
        again = KeptTexts(file)
        assert again.of("texts") == {0: [1, 2]} and file.stat().st_size == before.st_size
        assert file.stat().st_ino != damaged.st_ino, "replaced as a whole"
    file.write_text("half")
    KeptTexts(file).add("texts", 3, [4])
    assert KeptTexts(file).of("texts") == {3: [4]}


def test_a_store_is_reused_unless_a_setting_of_its_texts_changes(base, tmp_path):
    first = corpus(base, tmp_path)
    # Settings without an influence: training order, windows, the batch size of decoding.
    again = corpus(base, tmp_path, seed=7, seq_len=8, decode_batch_size=3)
    assert again.store.folder == first.store.folder
    assert (tmp_path / "stores").is_dir() and len(list((tmp_path / "stores").iterdir())) == 1
    changes: list[dict[str, Any]] = [
        {"temperature": 0.0}, {"top_p": 0.9}, {"sample_seed": 1}, {"new_tokens": 19},
        {"prompt_tokens": 7}, {"n_prompts": 13}, {"val_fraction": 0.3}, {"split_seed": 1},
    ]  # fmt: skip
    names = {corpus(base, tmp_path, **change).fingerprint for change in changes}
    assert len(names | {first.fingerprint}) == len(changes) + 1


def test_other_weights_change_the_digest(base: Path) -> None:
    model = open_model(base / "trunk").model
    before = trunk_digest(model)
    with torch.no_grad():
        model.trunk.blocks[0].attention.out.weight[0, 0] += 1e-3
    assert trunk_digest(model) != before


@pytest.mark.slow
def test_heads_are_trained_and_evaluated_on_generated_texts(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "trunk", base / "gone")
    settings = {**GENERATED, "init_from": base / "gone"}
    cache = tmp_path / "cache"
    summary = helpers.train_here(tmp_path / "run", cache, settings)
    digest = trunk_digest(open_model(base / "trunk").model)
    facts = summary["data"]
    assert facts["source"]["name"] == "self_generated" and facts["source"]["weights"] == digest
    assert (facts["train"]["documents"], facts["val"]["documents"]) == (32, 8)
    assert summary["val/bits_per_byte"] > 0 and summary["evaluation"]["bytes"] > 0

    def evaluated() -> dict[str, Any]:
        few = ("decode.n_prompts=2", "decode.prompt_tokens=4", "decode.new_tokens=4")
        last = tmp_path / "run" / "checkpoints" / "last.ckpt"
        return helpers.evaluated(last, f"paths.cache_dir={cache}", *few)

    for name, value in evaluated().items():
        if name in summary and name.startswith(("val/", "evaluation")):
            assert value == summary[name], name
    # The texts are generated again, and are the same.
    shutil.rmtree(cache)
    assert evaluated()["evaluation"] == summary["evaluation"]

    # A run continues, and is evaluated, without the model that it started from.
    shutil.rmtree(base / "gone")
    more = helpers.train_here(tmp_path / "run", cache, {**settings, "trainer.max_steps": 6})
    assert more["step"] == 6 and more["evaluation"] == summary["evaluation"]
    assert evaluated()["evaluation"] == summary["evaluation"]
    shutil.rmtree(cache)
    with pytest.raises(FileNotFoundError, match="no checkpoint or run folder at"):
        evaluated()


def test_texts_of_changed_weights_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has other weights now than when this run's texts"):
        corpus(base, tmp_path, weights="0" * 32).prepare()


def test_ids_without_a_text_have_no_bits_per_byte(base: Path, tmp_path: Path) -> None:
    """A trunk may generate ids that its tokenizer does not have."""
    pytest.importorskip("safetensors", reason="Hugging Face folders need it")
    folders.write(tmp_path / "llama", deepseek.build(folders.dense()))
    settings = {**GENERATED, **helpers.FROM_FOLDER, "init_from": tmp_path / "llama"}
    summary = helpers.train_here(tmp_path / "run", tmp_path / "cache", settings)
    store = TokenStore(Path(summary["data"]["store"]))
    ids = np.unique(np.concatenate([store[name].tokens() for name in ("train", "val")]))
    assert ids.max() > EOT and ids.max() < folders.ROWS
    assert "val/loss_depth_0" in summary and "val/bits_per_byte" not in summary
    assert "bytes" not in summary["evaluation"]


def test_a_run_without_init_from_takes_the_models_tokenizer(base: Path, tmp_path: Path) -> None:
    bpe = {"tokenizer": "bpe", "tokenizer.vocab_size": 300, "trainer.max_steps": 4}
    helpers.train_here(base / "bpe", base / "cache", {**TRUNK, **bpe})
    settings = {**GENERATED, **bpe, "data.model": base / "bpe", "mtp.freeze_trunk": None}
    helpers.train_here(tmp_path / "run", tmp_path / "cache", settings)
    first, second = (helpers.checkpoint(f)["tokenizer"] for f in (base / "bpe", tmp_path / "run"))
    assert first == second
    with pytest.raises(ValueError, match=r"another vocabulary \(tokenizer bpe, 300 ids\) than"):
        corpus(base, tmp_path, model=str(base / "bpe")).prepare()
    other = {**settings, "tokenizer.vocab_size": 280}
    with pytest.raises(ValueError, match="another vocabulary"):
        helpers.train_here(tmp_path / "other", tmp_path / "cache", other)


def test_a_missing_or_unsuitable_model_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model to generate its texts: set init_from"):
        corpus(base, tmp_path, model=None).prepare()
    task = helpers.NO_TEXT | {"data": "star_graph", "data.eval_examples": 8}
    task |= {"trainer.max_steps": 1, "trainer.val_check_interval": 1}
    helpers.train_here(base / "task", base / "cache", task)
    with pytest.raises(ValueError, match="was trained on a task, whose symbols are not text"):
        corpus(base, tmp_path, model=str(base / "task")).prepare()
    with pytest.raises(ValueError, match=r"prompt_tokens=8 and data.new_tokens=42 make 49 tokens"):
        corpus(base, tmp_path, new_tokens=42).prepare()
    for key, value in (
        ("n_prompts", 1), ("prompt_tokens", 0), ("new_tokens", 0.5), ("sample_seed", -1),
        ("decode_batch_size", 0), ("temperature", -1.0), ("top_p", -0.1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=key):
            corpus(base, tmp_path, **{key: value})
    assert not (tmp_path / "stores").exists()


@pytest.mark.slow
def test_the_command_line_reports_the_generation(base: Path, tmp_path: Path) -> None:
    settings = {**GENERATED, "init_from": base / "trunk", "mtp.init": "last_block"}
    done = helpers.train_apart(tmp_path / "run", tmp_path / "cache", settings)
    assert " tokens/s]" in done.stderr and "texts of" in done.stderr
    summary = helpers.summary_of(tmp_path / "run")
    assert summary["data"]["source"]["n_prompts"] == 40


def test_a_stored_config_cannot_allow_a_package(base: Path, tmp_path: Path) -> None:
    """Only the caller decides which packages the model may import."""
    assert corpus(base, tmp_path).allow == ()
    with pytest.raises(TypeError, match="allow"):
        corpus(base, tmp_path, allow=["evil"])


@pytest.mark.parametrize("kind", ["run", "folder"])
def test_runs_and_folders_are_evaluated_on_their_generated_texts(base, tmp_path, kind):
    model = base / "trunk"
    if kind == "folder":
        pytest.importorskip("safetensors", reason="Hugging Face folders need it")
        model = tmp_path / "llama"
        folders.write(model, deepseek.build(folders.dense()))
    small = ("data.n_prompts=20", "data.new_tokens=12", "decode.n_prompts=0")
    texts = ("data=self_generated", f"data.model={model}", f"paths.cache_dir={tmp_path / 'cache'}")
    metrics = helpers.evaluated(model, *texts, *small)
    assert metrics["data"]["source"]["name"] == "self_generated"
    assert metrics["evaluation"]["documents"] >= 1 and metrics["val/loss_depth_0"] > 0
