"""conf/experiment: every preset has its command in its header and trains when shortened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.helpers import CONF, composed, train_here, typed

PRESETS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))

TASKS = {
    "copy", "countdown", "group", "hmm", "induction", "mqar", "polynomial", "sat", "sibling",
    "star_graph",
}  # fmt: skip
TEXT = {
    "data": "synthetic", "tokenizer": "byte", "data.source.size": 60_000,
    "data.source.documents": 30, "data.seq_len": 32, "data.val_fraction": 0.05,
}  # fmt: skip
# Texts that a small model generates.
SELF_GENERATED = {
    "data.n_prompts": 80, "data.prompt_tokens": 4, "data.new_tokens": 12, "data.chat_share": 0,
    "data.seq_len": 16, "data.val_fraction": 0.3, "tokenizer": "byte",
    "callbacks.speculative_eval.n_prompts": 1, "callbacks.speculative_eval.prompt_tokens": 4,
}  # fmt: skip
# The settings that shorten every preset.
SHORT = {
    "data.batch_size": 4, "data.num_workers": 0, "trainer.max_steps": 4,
    "trainer.val_check_interval": 2, "trainer.num_threads": 1, "trainer.accelerator": "cpu",
    "trainer.compile": "false", "model.n_layers": 2, "model.d_model": 48,
    "callbacks.throughput.measure_matmul": "false", "callbacks.speculative_eval.new_tokens": 8,
}  # fmt: skip


def run(folder: Path, cache: Path, name: str, more: dict[str, object]) -> dict[str, object]:
    from mtp_lightning.experiment.training import train

    data = {"data.eval_examples": 20} if name in TASKS else TEXT
    data = SELF_GENERATED if name == "smollm2_heads" else data
    settings = {"experiment": name, **data, **SHORT, **more}
    settings |= {"paths.cache_dir": cache, "paths.output_dir": folder}
    return train(composed("config", [f"{key}={value}" for key, value in settings.items()]))


def test_documented_presets_exist() -> None:
    assert {"main_job", "drafting", "posthoc_heads", "deepseek", "gpu"} | TASKS <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_header_has_its_command_and_duration(name: str) -> None:
    lines = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_"
    header = " ".join(line.lstrip("# ") for line in lines[1:6] if line.startswith("#"))
    assert f"python train.py experiment={name}" in header
    assert "minutes" in header or "Not run" in header


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_shortened_preset_trains(tmp_path: Path, cache: Path, name: str) -> None:
    more: dict[str, object] = {}
    if name in ("posthoc_heads", "smollm2_heads"):
        size = "model.n_layers=2 model.d_model=48 model.n_heads=3 model.d_ff=256"
        trunk = typed(f"{size} mtp=none mtp.depth trainer.max_steps=2")
        train_here(tmp_path / "trunk", cache, trunk)
        more = {"init_from": tmp_path / "trunk"}
    if name == "smollm2_heads":
        texts = [f'{{"text": "{word} and more of it, a line of text"}}' for word in range(200)]
        (tmp_path / "prompts.jsonl").write_text("\n".join(texts))
        more |= {"data.prompts.paths": tmp_path / "prompts.jsonl", "objective.draft_vocab": 200}
    summary = run(tmp_path / "run", cache, name, more)
    assert summary["step"] == 4 and "val/loss_depth_1" in summary
    assert ("val/exact_match" in summary) == (name in TASKS)
