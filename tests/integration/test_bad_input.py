"""What a user gets wrong ends in one readable line and exit code 1, or in Hydra's own message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_lightning.cli import readable_errors
from tests.integration.helpers import (
    CONF,
    checkpoint,
    fails,
    overrides,
    the_error,
)


def write(folder: Path, content: bytes | str, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


TEXTS = {
    "empty": (b"", ["is empty", "text.txt"]),
    "not UTF-8": (b"ab\ncd" * 100 + b"\xff\xfe more", ["not UTF-8", "text.txt", "offset 500"]),
    # T + D + 1 = 16 + 2 + 1 tokens are the least that a window needs.
    "shorter than a window": (b"short text", ["19", "tokens"]),
    "only empty lines of JSON": (b"\n\n \n", ["no text"]),
    "JSON without the field": (b'{"body": "text"}\n', ["data.field", "body"]),
    "no JSON": (b"{nothing\n", ["line 1", "not JSON"]),
}


@pytest.mark.parametrize("case", TEXTS)
def test_text(tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str], case: str) -> None:
    content, told = TEXTS[case]
    path = write(tmp_path, content, "text.jsonl" if "JSON" in case else "text.txt")
    run_dir = tmp_path / "run"
    error = fails(capfd, run_dir, cache, {"data": "text", "data.paths": path})
    for words in told:
        assert words in error
    assert not run_dir.exists(), "a run that never began leaves no folder"


def test_missing_path(tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "nowhere.txt"
    error = fails(capfd, tmp_path / "run", cache, {"data": "text", "data.paths": missing})
    assert str(missing) in error and "data.paths" in error


def test_no_path(tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    error = fails(capfd, tmp_path / "run", cache, {"data": "text"})
    assert "data.paths has no value" in error


SETTINGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "negative depth": ({"mtp.depth": -1}, ["mtp.depth", "-1"]),
    "no whole depth": ({"mtp.depth": 1.5}, ["mtp.depth", "1.5"]),
    "depth over the window": ({"mtp.depth": 17}, ["mtp.depth", "17", "data.seq_len", "16"]),
    "depth without modules": (
        {"mtp": "none", "mtp.depth": 2},
        ["mtp.depth must be 0 with this option, not 2"],
    ),
    "unknown switch": ({"mtp.concat": "both"}, ["mtp.concat", "both", "hidden_first"]),
    "heads": ({"model.n_heads": 4, "model.n_kv_heads": 3}, ["n_heads", "4", "n_kv_heads", "3"]),
    "width over heads": ({"model.d_model": 33}, ["d_model", "33", "n_heads"]),
    "lambdas": ({"mtp_lambda": "[0.3,0.2,0.1]"}, ["mtp_lambda", "3", "2"]),
    "lambda is a word": ({"mtp_lambda": "much"}, ["mtp_lambda", "much"]),
    "knots": (
        {"lambda_schedule": "knots", "lambda_schedule.knots": "'{0:[1,2,3]}'"},
        ["knots", "3"],
    ),
    "trainer key": ({"+trainer.no_such_key": 1}, ["no_such_key"]),
    "optimizer key": ({"+optimizer.no_such_key": 1}, ["no_such_key"]),
    "model key": ({"+model.no_such_key": 1}, ["no_such_key"]),
    "precision": ({"trainer.precision": "8-bit"}, ["precision", "8-bit", "bf16-mixed"]),
    "strategy": ({"trainer.strategy": "deepspeed"}, ["strategy", "deepspeed", "ddp"]),
    "devices": ({"trainer.devices": 2}, ["devices", "2", "trainer.strategy=ddp"]),
    "no devices": ({"trainer.devices": 0}, ["devices", "0"]),
    "accelerator": ({"trainer.accelerator": "tpu"}, ["accelerator", "tpu", "cpu"]),
    "no steps": ({"trainer.max_steps": 0}, ["trainer.max_steps", "0"]),
    "steps are a word": ({"trainer.max_steps": "many"}, ["trainer.max_steps", "many"]),
    "no steps between validations": ({"trainer.val_check_interval": 0}, ["val_check_interval"]),
    "batch size": ({"data.batch_size": 0}, ["data.batch_size", "0"]),
    "batch size is a word": ({"data.batch_size": "big"}, ["batch_size", "big"]),
    "accumulation": ({"trainer.accumulate_grad_batches": 0}, ["accumulate_grad_batches", "0"]),
    "threads": ({"trainer.num_threads": 0}, ["num_threads", "0"]),
    "clipping": ({"trainer.gradient_clip_val": -1}, ["gradient_clip_val", "-1"]),
    "seed": ({"seed": -1}, ["seed", "-1"]),
    "learning rate": ({"optimizer.lr": 0}, ["optimizer.lr", "0"]),
    "learning rate is a word": ({"optimizer.lr": "fast"}, ["lr", "fast"]),
    "validation share": ({"data.val_fraction": 1.5}, ["data.val_fraction", "1.5"]),
    "no validation document": (
        {"data.val_fraction": 1e-12, "data.source.documents": 100},
        ["validation split has no document", "data.val_fraction"],
    ),
    "no bytes to evaluate": ({"data.eval_bytes": 0}, ["data.eval_bytes", "at least 1, not 0"]),
    "bytes to evaluate in words": ({"data.eval_bytes": "some"}, ["data.eval_bytes", "some"]),
    "a part of the evaluation text": (
        {"+trainer.limit_val_batches": 3},
        ["trainer.limit_val_batches=3", "data.eval_bytes"],
    ),
    "learning-rate schedule": ({"optimizer.schedule.kind": "square"}, ["square", "cosine"]),
    "fewer windows than a batch": (
        {"data.batch_size": 64, "trainer.accumulate_grad_batches": 100},
        ["6400", "data.batch_size", "accumulate_grad_batches"],
    ),
    "monitor": ({"callbacks.checkpoints.monitor": "val/nothing"}, ["monitor", "val/nothing"]),
    "tokenizer file": (
        {"tokenizer": "pretrained", "tokenizer.path": "no/tokenizer.json"},
        ["no/tokenizer.json"],
    ),
    "vocabulary": ({"tokenizer": "bpe", "tokenizer.vocab_size": 7}, ["vocab_size", "7", "257"]),
    "settings of another class": (
        {"optimizer._target_": "mtp_lightning.optim.lr_schedule.LRSchedule"},
        ["optimizer.", " is not a key: ", "--help optimizer"],
    ),
    "nowhere to import from": (
        {"optimizer._target_": "my_ideas.Sophia"},
        ["my_ideas", "PYTHONPATH"],
    ),
    "a callback that is none": (
        {"+callbacks.mine._target_": "builtins.dict"},
        ["dict", "Callback is needed"],
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    settings, told = SETTINGS[case]
    error = fails(capfd, tmp_path / "run", cache, settings)
    for words in told:
        assert words in error


def test_evaluate_refuses_what_it_cannot_load(
    tmp_path: Path, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from hydra import compose, initialize_config_dir

    from mtp_lightning.experiment.evaluating import evaluate

    def refused(path: Path) -> str:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            cfg = compose("evaluate", overrides=[f"checkpoint={path}", "paths.output_dir=."])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended, readable_errors():
            evaluate(cfg)
        assert ended.value.code == 1
        return the_error(capfd.readouterr().err)

    assert str(tmp_path / "nowhere") in refused(tmp_path / "nowhere")
    assert "no intact checkpoint" in refused(tmp_path)
    assert "damaged" in refused(write(tmp_path, "no checkpoint at all", "text.ckpt"))
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "model_config" in refused(tmp_path / "other.ckpt")
    torch.save({"code": Path("/")}, tmp_path / "code.ckpt")
    assert "not loaded" in refused(tmp_path / "code.ckpt").replace("\n", " ")
    content = checkpoint(finished)
    content["state_dict"].pop("model.trunk.norm.weight")
    content["state_dict"]["model.extra"] = torch.zeros(1)
    torch.save(content, tmp_path / "part.ckpt")
    error = refused(tmp_path / "part.ckpt")
    assert "trunk.norm.weight is missing" in error and "extra is unknown" in error
    content = checkpoint(finished)
    content["config"]["data"]["source"]["_target_"] = "os.system"
    torch.save(content, tmp_path / "foreign.ckpt")
    assert "os.system is refused" in refused(tmp_path / "foreign.ckpt")


def test_defects_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), readable_errors():
        _ = 1 / 0
    assert "error:" not in capsys.readouterr().err


def test_overrides_are_what_the_helpers_say(cache: Path) -> None:
    """The settings above reach Hydra: a misspelt one would fail for another reason."""
    given = overrides(cache, {"mtp.depth": 3, "data": "text", "data.paths": "x"})
    assert "mtp.depth=3" in given and not any("source" in part for part in given)
