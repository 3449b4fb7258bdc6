"""Runs on files of token ids train, resume, generate and are evaluated as runs on text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from data_modules.sources import SyntheticSource
from tests.data_modules.token_formats import llm_c, megatron
from tests.integration import helpers
from tests.integration.helpers import ROOT, evaluated, execute, train_here, typed

GENERATE = [sys.executable, str(ROOT / "generate.py")]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """Settings of a run on three shards of bytes, and a validation text of Megatron's."""
    documents = [[*d.encode(), 256] for d in SyntheticSource(size=9000, documents=30).documents()]
    for i in range(3):
        llm_c(tmp_path / f"shard{i}.bin", documents[8 * i : 8 * i + 8])
    megatron(tmp_path / "val.bin", documents[24:])
    paths = f"data.path={tmp_path}/shard*.bin data.val_path={tmp_path}/val"
    return typed(f"data=tokens data.val_fraction {paths}")


@pytest.mark.slow
def test_a_run_on_token_files_resumes_and_is_evaluated(tmp_path, files) -> None:
    cache = tmp_path / "cache"
    # The files hold about 110 steps, so an epoch ends.
    settings = files | typed(
        "trainer.max_steps=150 trainer.val_check_interval=75 callbacks.checkpoints.every_n_steps=20"
    )
    whole = train_here(tmp_path / "whole", cache, settings)
    helpers.resume_from_previous(tmp_path / "whole", tmp_path / "parts", cache, settings)
    assert whole["val/bits_per_byte"] > 0 and whole["evaluation"]["bytes"] >= 400
    metrics = evaluated(tmp_path / "whole" / "checkpoints" / "last.ckpt")
    for name in ("val/loss_depth_0", "val/loss_depth_2", "val/bits_per_byte"):
        assert metrics[name] == whole[name]
    assert metrics["evaluation"] == whole["evaluation"]


@pytest.mark.slow
def test_ids_without_a_tokenizer_train_evaluate_and_generate(tmp_path, files) -> None:
    ids = "tokenizer=ids tokenizer.vocab_size=300 tokenizer.eot_id=256 data.document_mask=true"
    settings = files | typed(ids)
    summary = train_here(tmp_path / "run", tmp_path / "cache", settings)
    assert summary["data"]["tokenizer"]["vocab_size"] == 300
    assert not [name for name in summary if "bits_per_byte" in name]
    run = f"checkpoint={tmp_path / 'run'}"
    assert "bits_per_byte" not in str(evaluated(tmp_path / "run"))
    done = execute([*GENERATE, run, "prompt=72 101", "max_new_tokens=4", "num_threads=1"], code=0)
    words = done.stdout.split()
    assert len(words) == 6 and all(word.isdigit() for word in words)
    done = execute([*GENERATE, run, "prompt=hello", "num_threads=1"], code=1)
    assert "'hello' is not an id" in done.stderr
