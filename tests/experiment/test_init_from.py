"""``init_from``: the kept, new and dropped modules, frozen trunks, and refusals."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_modules.windows import WindowBatch
from mtp_lightning.experiment.init_from import start_from
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.weights import StoredModel
from tests.integration import helpers
from tests.losses import mtp_loss
from tests.models import stored_of


def start_of(trunk: TrunkConfig, **mtp: Any) -> StoredModel:
    variant = mtp.pop("variant", "sequential")
    return stored_of(trunk, MTPConfig.find(variant)(**mtp))


def fresh(trunk: TrunkConfig, variant: str = "sequential", **mtp: Any) -> MTPModel:
    model = MTPModel(ModelConfig(trunk=trunk, mtp=MTPConfig.find(variant)(**mtp)))
    model.initialize(0)
    return model


def origin(model: MTPModel, start: StoredModel) -> dict[str, str]:
    """For each module of the stack, whether its weights are the old ones or new."""
    new = MTPModel(model.config)
    new.initialize(0)
    origins: dict[str, set[str]] = {}
    for name, tensor in model.state_dict().items():
        if tensor.dim() < 2:
            continue  # gains are 1 in both
        module = ".".join(name.split(".")[:3]) if name.startswith("mtp.") else "trunk"
        is_old = name in start.weights and torch.equal(tensor, start.weights[name])
        is_new = torch.equal(tensor, new.state_dict()[name])
        assert is_old != is_new, name
        origins.setdefault(module, set()).add("old" if is_old else "new")
    assert all(len(kinds) == 1 for kinds in origins.values())
    return {module: kinds.pop() for module, kinds in origins.items()}


@pytest.mark.parametrize(
    ("old", "now", "kept", "new", "dropped"),
    [
        ({"depth": 1}, {"depth": 3}, [0], [1, 2], []),
        ({"depth": 3}, {"depth": 1}, [0], [], [1, 2]),
        ({"depth": 2, "share_layers": True}, {"depth": 2}, [0], [1], []),
        # Switches that change only training.
        (
            {"depth": 2},
            {"depth": 2, "detach": "all", "freeze_trunk": True, "hidden_state_mixing": True},
            [0, 1],
            [],
            [],
        ),
    ],
)
def test_modules_are_kept_new_or_dropped(tiny_trunk, old, now, kept, new, dropped):
    start, model = start_of(tiny_trunk, **old), fresh(tiny_trunk, **now)
    inherited = start_from(model, start)
    depths = {"kept": kept, "new": new, "dropped": dropped}
    names = {what: [f"mtp.depths.{k}" for k in found] for what, found in depths.items()}
    assert inherited == names
    expected = dict.fromkeys(["trunk", *names["kept"]], "old") | dict.fromkeys(names["new"], "new")
    assert origin(model, start) == expected


@pytest.mark.parametrize(
    ("old", "new"), [("none", "sequential"), ("sequential", "parallel"), ("parallel", "linear")]
)
def test_another_head_starts_with_new_modules(tiny_trunk, old, new):
    """Modules of two heads may have the same name and different meanings."""
    start = start_of(tiny_trunk, variant=old, **({} if old == "none" else {"depth": 1}))
    model = fresh(tiny_trunk, new, depth=1)
    inherited = start_from(model, start)
    dropped = [] if old == "none" else ["mtp.depths.0"]
    assert inherited == {"kept": [], "new": ["mtp.depths.0"], "dropped": dropped}
    qkv = start.weights["trunk.blocks.0.attention.qkv.weight"]
    assert torch.equal(model.trunk.blocks[0].attention.qkv.weight, qkv)
    for name, tensor in fresh(tiny_trunk, new, depth=1).mtp.state_dict().items():
        if tensor.dim() > 1:  # new norms have the trunk's gains
            assert torch.equal(model.mtp.state_dict()[name], tensor)


def test_weights_that_do_not_fit_are_named(tiny_trunk: TrunkConfig) -> None:
    model = fresh(tiny_trunk, depth=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = TrunkConfig(vocab_size=37, d_model=32, n_layers=3, n_heads=2, n_kv_heads=2, d_ff=48)
    with pytest.raises(ValueError, match=r"another trunk.*n_heads: 2 -> 4.*n_layers: 3 -> 2"):
        start_from(model, start_of(other, depth=1))
    with pytest.raises(ValueError, match=r"mtp.concat=hidden_first.*set mtp.concat=hidden_first"):
        start_from(model, start_of(tiny_trunk, depth=1, concat="hidden_first"))
    with pytest.raises(ValueError, match=r"with mtp.blocks=2, .*: set mtp.blocks=2"):
        start_from(model, start_of(tiny_trunk, depth=1, blocks=2))
    eagle = fresh(tiny_trunk, "eagle", depth=1, draft_vocab=20)
    for options, setting in (({}, "draft_vocab=null"), ({"layers": (0, 1, 1)}, "layers=[0, 1, 1]")):
        with pytest.raises(ValueError, match=re.escape(f": set mtp.{setting}.")):
            start_from(eagle, start_of(tiny_trunk, variant="eagle", depth=1, **options))
    markov = start_of(tiny_trunk, variant="parallel", depth=1, correction="markov")
    hydra = fresh(tiny_trunk, "parallel", depth=2, correction="mlp", freeze_trunk=True)
    with pytest.raises(ValueError, match=r"corrections.0 of another form .*: markov -> mlp\): set"):
        start_from(hydra, markov)
    sure = start_of(tiny_trunk, depth=2, confidence=True)
    with pytest.raises(ValueError, match=r"another form than this run \(mtp.depth: 2 -> 1\)"):
        start_from(fresh(tiny_trunk, depth=1, confidence=True), sure)
    good = start_of(tiny_trunk, depth=1)
    for name, change, message in (
        ("mtp.depths.0.norm.weight", None, "mtp.depths.0.norm.weight is missing"),
        ("trunk.norm.weight", None, "trunk.norm.weight is missing"),
        ("trunk.norm.gain", torch.ones(32), "trunk.norm.gain is unknown"),
        ("trunk.norm.weight", torch.ones(16), r"trunk.norm.weight has the shape \[16\]"),
    ):
        weights = dict(good.weights)
        if change is None:
            del weights[name]
        else:
            weights[name] = change
        bad = StoredModel(path=good.path, config=good.config, weights=weights, tokenizer_state={})
        with pytest.raises(ValueError, match=message):
            start_from(model, bad)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), "a refused start changed weights"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", ["sequential", "parallel", "linear"])
def test_freeze_trunk_freezes_embedding_trunk_and_head(tiny_trunk, variant, tied):
    model = fresh(replace(tiny_trunk, tie_embeddings=tied), variant, depth=2, freeze_trunk=True)
    batch = WindowBatch(torch.randint(0, 37, (2, 11)), 2)
    mtp_loss(model, batch, [0.3, 0.3], [16] * 3)[0].backward()
    for name, parameter in model.named_parameters():
        in_stack = name.startswith("mtp.")
        assert parameter.requires_grad == in_stack, name
        assert (parameter.grad is not None) == in_stack, name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of depth 1, and the cache next to it."""
    folder = tmp_path_factory.mktemp("init_from")
    settings = {"mtp.depth": 1, "trainer.max_steps": 4, "trainer.val_check_interval": 2}
    helpers.train_here(folder / "base", folder / "cache", settings)
    return folder


def test_training_on_a_frozen_trunk_changes_the_modules_alone(base, caplog):
    settings = {
        "init_from": base / "base", "mtp.freeze_trunk": "true", "mtp.depth": 2,
        "trainer.max_steps": 4, "trainer.val_check_interval": 2,
    }  # fmt: skip
    with caplog.at_level(logging.INFO):
        summary = helpers.train_here(base / "frozen", base / "cache", settings)
    assert "kept: mtp.depths.0; new: mtp.depths.1" in caplog.text
    old = helpers.weights(base / "base", "best.ckpt")
    new = helpers.weights(base / "frozen")
    for name, tensor in new.items():
        if name.startswith(("model.trunk.", "model.head.")):
            assert torch.equal(tensor, old[name]), f"{name} moved"
        elif tensor.dim() > 1 and name in old:
            assert not torch.equal(tensor, old[name]), f"{name} was not trained"
    model = MTPModel(ModelConfig.from_dict(helpers.checkpoint(base / "frozen")["model_config"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(list(model.mtp.parameters()))
    state = helpers.checkpoint(base / "frozen")["optimizer_states"][0]["state"]
    assert len(state) == len(trained), "the trunk has no optimizer state"
    assert summary["parameters_trained"] == sum(p.numel() for p in trained)
    assert summary["init_from"] == str(base / "base")
    # The main prediction stays that of the run that this one started from.
    first = helpers.column(base / "frozen", "val/loss_depth_0")
    assert len(first) == 2 and len(set(first.values())) == 1


def test_a_resumed_run_does_not_read_its_start_again(base: Path) -> None:
    settings = {
        "init_from": base / "gone/checkpoints/last.ckpt", "mtp.depth": 1, **helpers.CONSTANT,
        "callbacks.checkpoints.every_n_steps": 2,
    }  # fmt: skip
    shutil.copytree(base / "base", base / "gone")
    for folder, steps in (("whole", 4), ("halves", 2), ("halves", 4)):
        if steps == 4 and folder == "halves":
            shutil.rmtree(base / "gone")  # the run no longer needs its start
        more = {**settings, "trainer.max_steps": steps}
        summary = helpers.train_here(base / folder, base / "cache", more)
    assert summary["step"] == 4
    helpers.assert_same_weights(base / "whole", base / "halves")


@pytest.mark.parametrize(
    ("start", "settings", "message"),
    [
        ("hf", {}, "model_type=None, which cannot be imported"),
        ("nothing", {}, "no checkpoint or run folder"),
        ("foreign.ckpt", {}, "has no config, global_step, model_config, tokenizer"),
        ("base", {"model.d_ff": 64}, "d_ff: 48 -> 64"),
        ("base", {"tokenizer": "bpe", "tokenizer.vocab_size": 300},
         "trained with the tokenizer {'kind': 'byte'}.*: set tokenizer= to that one"),
        ("base", {"tokenizer._target_": "tests.data_modules.test_encoding_pool.CustomTokenizer"},
         "trained with the tokenizer {'kind': 'byte'}, which this run's"),
        (None, {"mtp.freeze_trunk": "true", "mtp_lambda": 0}, "nothing to train"),
    ],
    ids=["family", "nothing", "foreign", "width", "tokenizer", "own tokenizer", "nothing trained"],
)  # fmt: skip
def test_an_unusable_start_is_refused_and_leaves_no_folder(
    base: Path, tmp_path: Path, start: str | None, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    if start is not None:
        settings = {**settings, "init_from": (base if start == "base" else tmp_path) / start}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        helpers.train_here(tmp_path / "run", base / "cache", settings)
    assert not (tmp_path / "run").exists()


def test_the_tokenizer_of_the_start_is_used(base: Path) -> None:
    bpe = {"tokenizer": "bpe", "tokenizer.vocab_size": 300, "trainer.max_steps": 2}
    helpers.train_here(base / "bpe", base / "cache", bpe)
    other_text = {**bpe, "init_from": base / "bpe", "data.source.seed": 5}
    helpers.train_here(base / "bpe2", base / "cache", other_text)
    first, second = (helpers.checkpoint(base / f)["tokenizer"] for f in ("bpe", "bpe2"))
    assert first == second
