"""Runs that start from the model and the tokenizer of a folder."""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from data_modules.sources import SyntheticSource
from data_modules.tokenizers import PretrainedTokenizer
from mtp_lightning.decoding import generate
from mtp_lightning.experiment import compose
from mtp_lightning.experiment.generating import generate_text
from mtp_lightning.experiment.self_generated import SelfGenerated
from mtp_lightning.nn.attention import GroupedQueryConfig
from mtp_lightning.nn.moe import ExpertsConfig
from mtp_lightning.opening import open_model
from tests import deepseek
from tests.integration import helpers
from tests.interop import folders
from tests.interop.folders import read_folder

SHORT = {**helpers.FROM_FOLDER, "trainer.max_steps": 4, "trainer.val_check_interval": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A Llama folder, a DeepSeek folder, and a cache."""
    path = tmp_path_factory.mktemp("start")
    (path / "cache").symlink_to(cache)
    folders.write(
        path / "llama", deepseek.build(folders.dense(attention=GroupedQueryConfig(qkv_bias=True)))
    )
    folders.write(path / "deepseek", deepseek.build(folders.TRUNKS["deepseek"], depth=1))
    return path


def command_line(*overrides: str) -> Any:
    """Hydra's description of the command line."""
    task, runtime = SimpleNamespace(task=[*overrides]), SimpleNamespace(choices={})
    described = SimpleNamespace(overrides=task, runtime=runtime)
    return SimpleNamespace(initialized=lambda: True, get=lambda: described)


def test_modules_are_trained_on_a_frozen_trunk_and_decode_the_same_text(
    base: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line may repeat the model's settings, and say how it is computed."""
    model_settings = {"model.d_ff": 48, "model.recompute": "true", "model.init_std": 0.1}
    overrides = (f"{key}={value}" for key, value in model_settings.items())
    monkeypatch.setattr(compose, "HydraConfig", command_line(*overrides))
    settings = {**SHORT, **model_settings, "init_from": base / "llama", "mtp.freeze_trunk": "true"}
    settings |= {"mtp.depth": 2}
    with caplog.at_level(logging.INFO):
        summary = helpers.train_here(base / "run", base / "cache", settings)
    assert "new: mtp.depths.0, mtp.depths.1" in caplog.text
    assert summary["init_from"] == str(base / "llama")
    run = open_model(base / "run")
    expected = read_folder(base / "llama")
    assert replace(run.model.config.trunk, recompute=False, init_std=0.02) == replace(
        expected.config.trunk, init_std=0.02
    )
    assert run.model.config.trunk.vocab_size == folders.ROWS > run.tokenizer.vocab_size
    assert isinstance(run.tokenizer, PretrainedTokenizer) and run.tokenizer.eot_id == 256
    for name, tensor in expected.weights.items():
        assert torch.equal(run.model.state_dict()[name], tensor), f"{name} moved"
    prompt = [1, 2, 3]
    plain, drafted = (
        generate(run.model, [prompt], max_new_tokens=20, speculative=speculative)[0].token_ids
        for speculative in (False, True)
    )
    assert plain == drafted
    folder_run = open_model(base / "llama")
    assert plain == generate(folder_run.model, [prompt], max_new_tokens=20)[0].token_ids


@pytest.mark.slow
def test_mtp_layers_are_trained_further(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {
        **SHORT, "init_from": base / "deepseek", "mtp.depth": 2,
        "+model.feed_forward.bias_rate": 0.0, "model.recompute": "true",
    }  # fmt: skip
    with caplog.at_level(logging.INFO):
        helpers.train_here(base / "more", base / "cache", settings)
    assert "kept: mtp.depths.0; new: mtp.depths.1" in caplog.text
    trunk = open_model(base / "more").model.config.trunk
    assert isinstance(trunk.feed_forward, ExpertsConfig) and trunk.recompute
    assert trunk.feed_forward.bias_rate == 0.0, "the run decides how it is trained"
    assert trunk.feed_forward.n_routed == 8

    again = {**SHORT, "init_from": base / "more", "mtp.depth": 2}
    helpers.train_here(base / "again", base / "cache", again)
    assert open_model(base / "again").model.config.trunk.vocab_size == folders.ROWS


def test_a_run_resumes_after_its_folder_is_deleted(base: Path) -> None:
    shutil.copytree(base / "llama", base / "gone")
    settings = {**SHORT, "init_from": base / "gone", "mtp.depth": 1}
    helpers.train_here(base / "halves", base / "cache", {**settings, "trainer.max_steps": 2})
    shutil.rmtree(base / "gone")
    summary = helpers.train_here(base / "halves", base / "cache", settings)
    assert summary["step"] == 4
    config = (base / "halves" / "config.yaml").read_text()
    assert f"vocab_size: {folders.ROWS}" in config and "d_ff: 48" in config


def test_a_run_may_bring_the_tokenizer(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(base / "llama", base / "bare")
    (base / "bare" / "tokenizer.json").unlink()
    settings = {**SHORT, "init_from": base / "bare", "tokenizer": "byte", "trainer.max_steps": 2}
    helpers.train_here(base / "own", base / "cache", settings)
    assert "holds no tokenizer.json" in caplog.text
    assert open_model(base / "own").tokenizer.kind == "byte"
    with pytest.raises(ValueError, match=r"300 ids and the model only 264 rows"):
        helpers.train_here(
            base / "not",
            base / "cache",
            {**settings, "tokenizer": "bpe", "tokenizer.vocab_size": 300},
        )
    with pytest.raises(ValueError, match=r"bare holds no tokenizer.json"):
        open_model(base / "bare")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=nano", "model=nano does not fit init_from="),
        ("model.d_ff=64", "with model.d_ff=48: leave model.d_ff= out"),
        ("tokenizer=byte", "this run's tokenizer settings do not ask for"),
    ],
)
def test_another_model_on_the_command_line_is_refused(
    base: Path, override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose, "HydraConfig", command_line(override, "seed=1"))
    key, value = override.split("=")
    settings = {**helpers.FROM_FOLDER, "init_from": base / "llama", key: value}
    with pytest.raises(ValueError, match=message):
        helpers.train_here(tmp_path / "run", base / "cache", settings)
    assert not (tmp_path / "run").exists()


def test_evaluate_reads_a_folder(base: Path, tmp_path: Path) -> None:
    folder = base / "deepseek"
    options = ["decode.n_prompts=0", f"paths.cache_dir={base / 'cache'}"]
    text = ["data=synthetic", "data.source.size=60000", "data.val_fraction=0.05", "data.seq_len=16"]
    with pytest.raises(ValueError, match="deepseek has no validation text of its own: give one"):
        helpers.evaluated(folder, *options)
    metrics = helpers.evaluated(folder, *options, *text)
    depths = read_folder(folder).config.mtp.depth
    assert [k for k in range(9) if f"val/loss_depth_{k}" in metrics] == list(range(depths + 1))
    assert metrics["val/bits_per_byte"] > 0 and metrics["checkpoint"] == str(folder)


def run_generate(folder: Path, **settings: Any) -> None:
    """What ``generate.py`` does, in this process."""
    defaults = {"checkpoint": str(folder), "output": "json", "accelerator": "cpu", "num_threads": 1}
    config = OmegaConf.load(helpers.CONF / "generate.yaml")
    generate_text(OmegaConf.merge(config, defaults, settings))


def test_a_file_of_prompts_is_continued_and_timed(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, file = ["abc", "d", "efg h"], tmp_path / "prompts"
    file.write_text("\n".join(prompts))
    run_generate(base / "deepseek", prompts=str(file), max_new_tokens=6, batch_size=2)
    captured = capsys.readouterr()
    model = open_model(base / "deepseek").model
    expected = [generate(model, [list(p.encode())], max_new_tokens=6)[0] for p in prompts]
    token_ids = [json.loads(line)["token_ids"] for line in captured.out.splitlines()]
    assert token_ids == [g.token_ids for g in expected]
    counts = re.fullmatch(
        r"3 prompts, (\d+) new tokens in [\d.]+ s: \d+ tokens/s.*\n", captured.err
    )
    assert counts and int(counts[1]) == sum(g.new_tokens for g in expected)


def test_prompts_begin_with_the_bos_token_of_the_folder(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In generated texts, in the texts that heads are trained on, and in the decoding of a run on
    this trunk. A model that was trained here has no such token."""
    shutil.copytree(base / "llama", tmp_path / "begins")
    file = tmp_path / "begins" / "tokenizer.json"
    library = Tokenizer.from_file(str(file))
    library.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    library.save(str(file))
    prompt = Tokenizer.from_file(str(file)).encode("ab").ids
    assert prompt == [256, 97, 98]

    def continued(folder: Path) -> list[int]:
        capsys.readouterr()
        run_generate(folder, prompt="ab", max_new_tokens=6)
        return json.loads(capsys.readouterr().out)["token_ids"]  # type: ignore[no-any-return]

    model = open_model(tmp_path / "begins").model
    expected = generate(model, [prompt], max_new_tokens=6)[0].token_ids
    assert continued(tmp_path / "begins") == expected

    heads = {**SHORT, "init_from": tmp_path / "begins", "mtp.freeze_trunk": "true"}
    helpers.train_here(tmp_path / "run", base / "cache", {**heads, "mtp.depth": 1})
    assert continued(tmp_path / "run") == expected
    texts = SelfGenerated(
        SyntheticSource(size=20_000, documents=20), PretrainedTokenizer(str(file)),
        model=str(tmp_path / "begins"), n_prompts=12, prompt_tokens=6, new_tokens=20,
        seq_len=16, batch_size=2, cache_dir=base / "cache", accelerator="cpu",
    ).store["train"]  # fmt: skip
    assert (texts.tokens()[texts.starts()] == 256).all()

    settings = {"tokenizer": "pretrained", "tokenizer.path": file, "tokenizer.vocab_size": None}
    helpers.train_here(tmp_path / "own", base / "cache", {"trainer.max_steps": 2, **settings})
    assert open_model(tmp_path / "own").tokenizer.encode_prompt("ab").tolist() == [97, 98]


def test_eos_ids_of_config_json_end_a_text(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "llama", tmp_path / "older")
    (tmp_path / "older" / "generation_config.json").unlink()
    folders.change_config(tmp_path / "older", eos_token_id=[256, 65])
    assert open_model(tmp_path / "older").tokenizer.end_ids == (256, 65)
