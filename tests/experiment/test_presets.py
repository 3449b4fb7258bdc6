"""Every stack works with every preset: ``experiment=NAME mtp=WORD``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from mtp_lightning.command_line import check_config
from mtp_lightning.errors import UserError
from mtp_lightning.experiment import build
from mtp_lightning.experiment.instantiate import instantiate
from mtp_lightning.optim.base import OptimizerConfig
from mtp_lightning.paths import CONF
from tests.integration.helpers import composed

WORDS = sorted(file.stem for file in (CONF / "mtp").glob("*.yaml"))
PRESETS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
TASKS = [preset for preset in PRESETS if (CONF / "data" / f"{preset}.yaml").exists()]
# Presets of every kind: those of tasks differ in their task and their sizes, and others in what has
# nothing to do with the stack.
KINDS = ("main_job", "deepseek", "smollm2_heads", TASKS[0])
PAIRS = [(preset, word) for preset in KINDS for word in WORDS]
# The control with presets of every kind, and each word and each preset at least once.
FAST = {(preset, "none") for preset in PRESETS if preset not in TASKS[2:]} | {
    (preset, WORDS[i % len(WORDS)]) for i, preset in enumerate(PRESETS)
}
# What is refused, and the remedy: no text can ask a question, the depths of three have a loss of
# their own, and two read keys and values of whole heads.
WHOLE_HEADS = ("eagle", "masked")
IMPOSSIBLE = {
    **dict.fromkeys(WHOLE_HEADS, "use model.attention=grouped_query"),
    "teacherless": "needs a task",
    **dict.fromkeys(["bag", "registers", "top"], "has its own loss"),
}
# A text of a moment in the place of the corpus, and no model that has to be there.
TEXT = [
    "data.source._target_=data_modules.sources.SyntheticSource",
    "+data.source.size=100000",
    "+data.source.documents=100",
    "tokenizer=byte",
]
GENERATED = ("prompts", "n_prompts", "prompt_tokens", "new_tokens", "temperature")
WHOLE_VOCABULARY = ("none", "parameter_free", "registers", "teacherless", "eagle")
CHATS = ("chat_share", "chat_before", "chat_after")


def chosen(preset: str, word: str, folder: Path) -> DictConfig:
    asked = [f"experiment={preset}", f"mtp={word}", "init_from=null", "trainer.precision=32-true"]
    asked += [f"paths.output_dir={folder}/run", f"paths.cache_dir={folder}/cache"]
    asked += ["trainer.accelerator=cpu", "trainer.compile=false"]
    if preset == "smollm2_heads":
        asked += ["data=stdlib", *(f"~data.{key}" for key in (*GENERATED, *CHATS))]
        # The texts here have fewer tokens; and some stacks train the trunk, or have a head.
        asked.append(f"objective.draft_vocab={'null' if word in WHOLE_VOCABULARY else 200}")
    return composed("config", [*asked, *([] if preset in TASKS else TEXT)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("presets")


@pytest.mark.parametrize(
    ("preset", "word"),
    [*sorted(FAST), *(pytest.param(*p, marks=pytest.mark.slow) for p in PAIRS if p not in FAST)],
)
def test_every_stack_goes_beside_every_preset(preset: str, word: str, folder: Path) -> None:
    cfg = chosen(preset, word, folder)
    check_config.check(OmegaConf.to_container(cfg), "config")  # type: ignore[arg-type]
    asked = OmegaConf.select(cfg, "stack.depth")
    begins = cfg.mtp.get("init", "random")
    assert begins == (OmegaConf.select(cfg, "stack.init") or "random") or "init" not in cfg.mtp
    if begins != "random":
        cfg.mtp.init = "random"  # what it begins from is a model that is not here
    data = build.build_data(cfg)
    cfg.data.update(data.resolved_settings())
    own_loss = preset == "smollm2_heads" and word in IMPOSSIBLE and word not in WHOLE_HEADS
    latent = preset == "deepseek" and word in WHOLE_HEADS
    with torch.device("meta"):
        if own_loss or latent or (word == "teacherless" and preset not in TASKS):
            with pytest.raises(UserError, match=IMPOSSIBLE[word]):
                build.build_module(cfg, data, stored=cfg)
            return
        module = build.build_module(cfg, data, stored=cfg)
    stack = module.model.config.mtp
    assert stack.variant == word
    fixed = {"none": 0, "teacherless": 0, "bag": 1, "registers": 1, "top": 1}
    usual = 3 if word == "eagle" else 2
    assert stack.depth == fixed.get(word, usual if asked is None else asked)
    if word == "none":
        assert stack.trains_trunk and not list(module.model.mtp.parameters())
        assert not cfg.data.get("cache_states", False)
    instantiate(cfg.optimizer, kind=OptimizerConfig)


def test_a_learning_rate_that_never_reaches_its_peak_is_reported(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for steps, kind, said in (
        (20, "warmup_decay", ""),
        (2000, "wsd", ""),
        (40, "wsd", "reaches only 38 % of its peak"),
        (110, "wsd", "reaches only 91 % of its peak"),
    ):
        caplog.clear()
        asked = [f"trainer.max_steps={steps}", f"optimizer/schedule={kind}"]
        asked += [f"paths.output_dir={folder}/run", f"paths.cache_dir={folder}/cache"]
        cfg = composed("config", [*asked, *TEXT])
        data = build.build_data(cfg)
        cfg.data.update(data.resolved_settings())
        with torch.device("meta"):
            build.build_module(cfg, data, stored=cfg)
        assert said in caplog.text and bool(said) == ("peak" in caplog.text)


def test_what_is_typed_of_a_stack_stays(folder: Path) -> None:
    typed = ["experiment=star_graph", "mtp=none", "mtp.depth=2", "trainer.accelerator=cpu"]
    cfg = composed("config", [*typed, f"paths.output_dir={folder}/run"])
    with pytest.raises(UserError, match="mtp.depth must be 0 with mtp=none, not 2"):
        check_config.check(OmegaConf.to_container(cfg), "config")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="mtp.depth must be 0 with mtp=none, not 2"):
        build.build_model_config(cfg, 300)
