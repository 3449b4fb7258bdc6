"""Every head works with every preset: ``experiment=NAME mtp=HEAD``."""

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

HEADS = sorted(file.stem for file in (CONF / "mtp").glob("*.yaml"))
PRESETS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
TASKS = [preset for preset in PRESETS if (CONF / "data" / f"{preset}.yaml").exists()]
# One preset of each kind: the others differ in their task, and in settings that no head reads.
KINDS = ("main_job", "deepseek", "smollm2_heads", TASKS[0])
PAIRS = [(preset, head) for preset in KINDS for head in HEADS]
# mtp=none with nearly every preset, and each head and each preset at least once.
FAST = {(preset, "none") for preset in PRESETS if preset not in TASKS[2:]} | {
    (preset, HEADS[i % len(HEADS)]) for i, preset in enumerate(PRESETS)
}
# Words of the refusals: teacherless needs questions, three heads have their own loss, and three
# others read the keys and values of whole attention heads.
WHOLE_HEADS = ("eagle", "dflash", "masked")
IMPOSSIBLE = {
    **dict.fromkeys(WHOLE_HEADS, "use a model with grouped-query attention, such as model=nano"),
    "teacherless": "needs a task",
    **dict.fromkeys(["bag", "registers", "top"], "has its own loss"),
}
# A synthetic text in place of the corpus.
TEXT = [
    "data.source._target_=data_modules.sources.SyntheticSource",
    "+data.source.size=100000",
    "+data.source.documents=100",
    "tokenizer=byte",
]
GENERATED = ("prompts", "n_prompts", "prompt_tokens", "new_tokens", "temperature")
WHOLE_VOCABULARY = ("none", "parameter_free", "registers", "teacherless", "eagle")
CHATS = ("chat_share", "chat_before", "chat_after")


def chosen(preset: str, head: str, folder: Path) -> DictConfig:
    overrides = [
        f"experiment={preset}",
        f"mtp={head}",
        "init_from=null",
        "trainer.precision=32-true",
    ]
    overrides += [f"paths.output_dir={folder}/run", f"paths.cache_dir={folder}/cache"]
    overrides += ["trainer.accelerator=cpu", "trainer.compile=false"]
    if preset == "smollm2_heads":
        overrides += ["data=stdlib", *(f"~data.{key}" for key in (*GENERATED, *CHATS))]
        # The synthetic text has fewer tokens, and some heads need the whole vocabulary.
        overrides.append(f"objective.draft_vocab={'null' if head in WHOLE_VOCABULARY else 200}")
    return composed("config", [*overrides, *([] if preset in TASKS else TEXT)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("presets")


@pytest.mark.parametrize(
    ("preset", "head"),
    [*sorted(FAST), *(pytest.param(*p, marks=pytest.mark.slow) for p in PAIRS if p not in FAST)],
)
def test_every_preset_builds_with_every_head(preset: str, head: str, folder: Path) -> None:
    cfg = chosen(preset, head, folder)
    check_config.check(OmegaConf.to_container(cfg), "config")  # type: ignore[arg-type]
    depth = OmegaConf.select(cfg, "stack.depth")
    init = cfg.mtp.get("init", "random")
    assert init == (OmegaConf.select(cfg, "stack.init") or "random") or "init" not in cfg.mtp
    if init != "random":
        cfg.mtp.init = "random"  # there is no model to copy from
    data = build.build_data(cfg)
    cfg.data.update(data.resolved_settings())
    own_loss = preset == "smollm2_heads" and head in IMPOSSIBLE and head not in WHOLE_HEADS
    latent = preset == "deepseek" and head in WHOLE_HEADS
    with torch.device("meta"):
        if own_loss or latent or (head == "teacherless" and preset not in TASKS):
            with pytest.raises(UserError, match=IMPOSSIBLE[head]):
                build.build_module(cfg, data, stored=cfg)
            return
        module = build.build_module(cfg, data, stored=cfg)
    stack = module.model.config.mtp
    assert stack.variant == head
    fixed = {"none": 0, "teacherless": 0, "bag": 1, "registers": 1, "top": 1}
    default = 3 if head in ("eagle", "dflash") else 2
    assert stack.depth == fixed.get(head, default if depth is None else depth)
    if head == "none":
        assert stack.trains_trunk and not list(module.model.mtp.parameters())
        assert not cfg.data.get("cache_states", False)
    instantiate(cfg.optimizer, kind=OptimizerConfig)


def test_a_learning_rate_that_never_reaches_its_peak_is_reported(folder, caplog):
    for steps, kind, warning in (
        (20, "warmup_decay", ""),
        (2000, "wsd", ""),
        (40, "wsd", "reaches only 38 % of its peak"),
        (110, "wsd", "reaches only 91 % of its peak"),
    ):
        caplog.clear()
        overrides = [f"trainer.max_steps={steps}", f"optimizer/schedule={kind}"]
        overrides += [f"paths.output_dir={folder}/run", f"paths.cache_dir={folder}/cache"]
        cfg = composed("config", [*overrides, *TEXT])
        data = build.build_data(cfg)
        cfg.data.update(data.resolved_settings())
        with torch.device("meta"):
            build.build_module(cfg, data, stored=cfg)
        assert warning in caplog.text and bool(warning) == ("peak" in caplog.text)


def test_a_typed_depth_is_checked_against_the_typed_head(folder: Path) -> None:
    typed = ["experiment=star_graph", "mtp=none", "mtp.depth=2", "trainer.accelerator=cpu"]
    cfg = composed("config", [*typed, f"paths.output_dir={folder}/run"])
    message = "mtp.depth must be 0 with mtp=none, not 2"
    with pytest.raises(UserError, match=message):
        check_config.check(OmegaConf.to_container(cfg), "config")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        build.build_model_config(cfg, 300)
