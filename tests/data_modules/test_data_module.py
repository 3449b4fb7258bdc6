"""The data module: from the config to batches, prompts, summary and errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

import data_modules
from data_modules import TokenDataModule
from data_modules.sources import SyntheticSource
from data_modules.tokenizers import BPETokenizer, ByteTokenizer
from data_modules.windows import WindowBatch

CONF = Path(data_modules.__file__).parents[1] / "conf"
SOURCES = sorted(
    path.stem
    for path in (CONF / "data").glob("*.yaml")
    # A model's own texts are tested with the model, in tests/experiment; tokens are not a source.
    if path.stem not in ("base", "task", "self_generated", "tokens")
    and "tasks" not in path.read_text(encoding="utf-8")
)


def small(folder: Path, **options) -> TokenDataModule:
    options = {"seq_len": 32, "batch_size": 4, "depth": 2, "cache_dir": folder} | options
    tokenizer = options.pop("tokenizer", None) or ByteTokenizer()
    return TokenDataModule(SyntheticSource(size=20_000, documents=40), tokenizer, **options)


def compose_config(folder: Path, *overrides: str):
    """The data and tokenizer groups in a root config with the keys they read from elsewhere."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        groups = compose(overrides=list(overrides))
    root = {"seed": 3, "mtp": {"depth": 2}, "trainer": {"accumulate_grad_batches": 2}}
    return OmegaConf.merge(root, {"paths": {"cache_dir": str(folder)}}, groups)


def test_a_training_batch_is_one_optimizer_step(tmp_path):
    data = small(tmp_path, accumulate=3)
    data.prepare()
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, WindowBatch)
    assert batch.tokens.shape == (12, 35) and batch.depth == 2 and batch.documents is None
    # Accumulation changes nothing: 3 x 4 windows are the 1 x 12 windows.
    whole = next(iter(small(tmp_path, batch_size=12).train_dataloader()))
    assert torch.equal(batch.tokens, whole.tokens)
    assert next(iter(data.val_dataloader())).tokens.shape == (4, 35)
    assert next(iter(small(tmp_path, eval_batch_size=7).val_dataloader())).tokens.shape == (7, 35)


def test_document_mask_separates_documents_after_end_of_text(tmp_path):
    data = small(tmp_path, document_mask=True)
    eot = data.tokenizer.eot_id
    changes = set()
    for batch in data.train_dataloader():
        steps = batch.documents.diff()
        # A new document starts exactly after each end-of-text token.
        assert torch.equal(steps, (batch.tokens[:, :-1] == eot).long())
        changes.add(int(steps.sum(1).max()))
    assert changes >= {1}
    # A target in another document does not count; nothing else is masked at depth 0.
    assert torch.equal(batch.targets(0) == -100, batch.tokens[:, :32] == eot)


def test_tokenizer_is_trained_once_and_shared(tmp_path):
    data = small(tmp_path, tokenizer=BPETokenizer(300))
    assert data.tokenizer.vocab_size == 300
    again = small(tmp_path, tokenizer=BPETokenizer(300), seed=9, depth=0)
    assert again.fingerprint == data.fingerprint
    assert again.tokenizer.fingerprint() == data.tokenizer.fingerprint()
    # A run's stored tokenizer on the same text: the same ids.
    stored = small(tmp_path, tokenizer=data.tokenizer)
    assert (stored.store["val"].tokens() == data.store["val"].tokens()).all()


def test_the_summary_counts_documents_tokens_bytes_and_windows(tmp_path):
    data = small(tmp_path, tokenizer=BPETokenizer(300))
    summary = json.loads(json.dumps(data.summary()))
    assert summary["source"]["name"] == "synthetic" and summary["fingerprint"] == data.fingerprint
    assert summary["tokenizer"]["kind"] == "bpe" and summary["tokenizer"]["vocab_size"] == 300
    for split in ("train", "val"):
        documents = list(data.split.documents(split))
        ids = sum(len(data.tokenizer.encode(d)) + 1 for d in documents)
        assert summary[split]["documents"] == len(documents) and summary[split]["tokens"] == ids
        expected = sum(len(d.encode()) for d in documents) / ids
        assert math.isclose(summary[split]["bytes_per_token"], expected) and expected > 1.3
    assert summary["val"]["lines_in_training"] == 0  # invented sentences do not come twice
    train_windows = sum(len(batch) for batch in small(tmp_path, batch_size=1).train_dataloader())
    assert small(tmp_path).summary()["train"]["windows"] == train_windows


def test_held_out_prompts_begin_validation_documents(tmp_path):
    data = small(tmp_path)
    documents = list(data.split.documents("val"))
    n = len(documents)
    prompts = data.held_out_prompts(n + 1, 16)
    assert all(prompt.dtype == torch.int64 and prompt.shape == (16,) for prompt in prompts)
    texts = [data.tokenizer.decode(prompt) for prompt in prompts]
    assert texts[:n] == [document[:16] for document in documents]
    assert texts[n] == documents[0][16:32]
    longest = max(map(len, documents))
    assert data.tokenizer.decode(data.held_out_prompts(1, longest)[0]) in documents
    with pytest.raises(ValueError, match="hold only 0 prompts .* 1 were asked"):
        data.held_out_prompts(1, longest + 1)
    fewer = data.held_out_prompts(1000, 16, fewer=True)
    assert n < len(fewer) < 1000
    assert all(map(torch.equal, fewer[: n + 1], prompts))
    with pytest.raises(ValueError, match="hold only 0 prompts .* 1 were asked"):
        data.held_out_prompts(1000, longest + 1, fewer=True)


def test_too_little_text_names_the_minimum(tmp_path):
    (tmp_path / "short.txt").write_text("far too short")

    def data(**options):
        return TokenDataModule.from_text(
            str(tmp_path / "short.txt"), ByteTokenizer(), cache_dir=tmp_path / "c", **options
        )

    with pytest.raises(ValueError, match="training split has .* at least 258 .*data.seq_len"):
        data(depth=1).prepare()
    # One character to validate on is enough.
    data(depth=1, seq_len=2, batch_size=1).prepare()
    # Validation alone needs no training step's worth of windows.
    few = data(seq_len=2, batch_size=500, val_fraction=0.5)
    few.prepare("validate")
    with pytest.raises(ValueError, match="one step needs 500"):
        few.prepare()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": -1}, "mtp.depth must be a whole number of at least 0, not -1"),
        ({"depth": 33}, "mtp.depth=33 x mtp.stride=1 reaches beyond"),
        ({"seq_len": 0, "depth": 0}, "data.seq_len must be a whole number of at least 1, not 0"),
        ({"batch_size": 0}, "data.batch_size must be a whole number of at least 1, not 0"),
        ({"accumulate": 0}, "accumulate_grad_batches must be a whole number of at least 1"),
        ({"eval_batch_size": -2}, "eval_batch_size must be a whole number of at least 1, not -2"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"num_workers": -1}, "num_workers must be a whole number of at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **options)


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_composes_and_builds(tmp_path, source):
    needs = {"text": ["data.paths=[x.txt]"], "huggingface": ["data.source.path=parquet"]}
    config = compose_config(tmp_path, f"+data={source}", "+tokenizer=byte", *needs.get(source, []))
    data = instantiate(config.data)
    assert isinstance(data, TokenDataModule) and data.source.name == source
    assert (data.depth, data.accumulate, data.seed, data.seq_len) == (2, 2, 3, 256)
    assert data.batch_size == data.eval_batch_size == 4 and data.cache_dir == tmp_path


def test_token_files_have_the_options_of_text(tmp_path):
    chosen = ["+data=tokens", "data.path=x.bin", "data.train_windows=100", "+tokenizer=byte"]
    assert instantiate(compose_config(tmp_path, *chosen).data).train_windows == 100


def test_text_from_the_config_to_a_batch(tmp_path):
    rows = "".join(json.dumps({"body": f"row {i} " * 30}) + "\n" for i in range(100))
    (tmp_path / "rows.jsonl").write_text(rows)
    words = "+data=text +tokenizer=bpe tokenizer.vocab_size=270 data.field=body data.seq_len=16"
    overrides = [*words.split(), "data.batch_size=2", "data.val_fraction=0.2"]
    config = compose_config(tmp_path / "cache", *overrides, f"data.paths=['{tmp_path}/*.jsonl']")
    data = instantiate(config.data)
    data.prepare()
    assert next(iter(data.train_dataloader())).tokens.shape == (4, 19)
    assert data.tokenizer.vocab_size == 270 and data.summary()["source"]["files"] == 1
    assert data.tokenizer.decode(data.held_out_prompts(1, 5)[0]).startswith("row ")
