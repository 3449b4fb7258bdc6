"""A sharded model (trainer.strategy=fsdp) trains, validates, decodes and resumes as a whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.conftest import Once
from tests.integration.helpers import checkpoint, rows, train_here, weights
from tests.integration.several import run_all

TWO = {"trainer.devices": 2, "trainer.strategy": "fsdp", "data.batch_size": 4}
FOUR = {"trainer.devices": 4, "trainer.strategy": "fsdp", "data.batch_size": 2}
COPIES = FOUR | {"trainer.shard_size": 2}
ALONE = {"data.batch_size": 8}
COMMON = {
    "trainer.max_steps": 6,
    "trainer.val_check_interval": 3,
    "model.n_layers": 2,
    "callbacks.speculative_eval.n_prompts": 1,
    "callbacks.speculative_eval.new_tokens": 8,
    "callbacks.speculative_eval.prompt_tokens": 4,
}
MOE = {
    "model": "deepseek_nano",
    "model.n_kv_heads": None,
    "model.attention.kv_rank": 12,
    "model.attention.d_nope": 8,
    "model.attention.d_rope": 4,
    "model.attention.d_value": 8,
    "model.feed_forward.n_routed": 4,
    "model.feed_forward.d_expert": 16,
    "model.feed_forward.sequence_loss": 0.01,
}
TASK = {
    "data": "star_graph",
    "tokenizer": None,
    "data.seq_len": None,
    "data.eval_bytes": None,
    "data.val_fraction": None,
    "data.examples": 400,
    "data.eval_examples": 24,
}
CASES: dict[str, dict[str, Any]] = {
    "sequential": {},
    "untied": {"model.tie_embeddings": "false"},
    "recomputed": {"model.recompute": "true", "+model.attention.qk_norm": "true"},
    "masked": {"data.document_mask": "true", "data.source.documents": 1200},
    "parallel": {"mtp": "parallel"},
    "linear": {"mtp": "linear", "mtp.correction": "mlp"},
    "parameter_free": {"mtp": "parameter_free"},
    "none": {"mtp": "none", "mtp.depth": None},
    "shared_layers": {"mtp.share_layers": "true", "mtp.hidden_state_mixing": "true"},
    "detached": {"mtp.detach": "all"},
    "curriculum": {"lambda_schedule": "forward_curriculum"},
    "joint": {"mtp": "joint"},
    "nextlat": {"mtp": "nextlat"},
    "registers": {"mtp": "registers", "mtp.depth": None},
    "bag": {"mtp": "bag", "mtp.depth": None},
    "top": {"mtp": "top", "mtp.depth": None, "mtp.lookahead": 8},
    "teacher": {"objective": "kl"},
    "teacher_parallel": {"mtp": "parallel", "objective": "js"},
    "coupled": {"objective": "e2e_tv"},
    "confidence": {"objective": "ce", "objective.confidence": "true"},
    "experts": MOE,
    "muon": {"optimizer": "muon", "optimizer.lr": None},
    "uncertainty": {"balance": "uncertainty"},
    "dwa": {"balance": "dwa"},
    "compiled": {"trainer.compile": "true"},
    "alone_in_bf16": {"trainer.precision": "bf16-mixed"},
    "double": {"trainer.precision": "64-true"},
    "task": TASK,
    "long_range": {"callbacks": "[default,long_range]"},
}
ACCUMULATED = {"masked", "experts"}

SPLIT = {"data.batch_size": 2, "trainer.accumulate_grad_batches": 2}
