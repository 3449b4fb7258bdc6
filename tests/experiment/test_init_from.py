"""Starting from another run: frozen trunks, other depths, and what is refused."""

from __future__ import annotations

import logging
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
from mtp_lightning.opening import StoredModel
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
    found: dict[str, set[str]] = {}
    for name, tensor in model.state_dict().items():
        if tensor.dim() < 2:
            continue  # old and new gains are both 1
        module = ".".join(name.split(".")[:3]) if name.startswith("mtp.") else "trunk"
        old = name in start.weights and torch.equal(tensor, start.weights[name])
        fresh_ = torch.equal(tensor, new.state_dict()[name])
        assert old != fresh_, name
        found.setdefault(module, set()).add("old" if old else "new")
    assert all(len(kinds) == 1 for kinds in found.values())
    return {module: kinds.pop() for module, kinds in found.items()}


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
def test_modules_are_kept_new_or_dropped(
    tiny_trunk: TrunkConfig,
    old: dict[str, Any],
    now: dict[str, Any],
    kept: list[int],
    new: list[int],
    dropped: list[int],
) -> None:
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
def test_another_variant_starts_its_stack_fresh(
    tiny_trunk: TrunkConfig, old: str, new: str
) -> None:
    """Modules of two variants may have the same name, and still mean something else."""
    start = start_of(tiny_trunk, variant=old, **({} if old == "none" else {"depth": 1}))
    model = fresh(tiny_trunk, new, depth=1)
    inherited = start_from(model, start)
    dropped = [] if old == "none" else ["mtp.depths.0"]
    assert inherited == {"kept": [], "new": ["mtp.depths.0"], "dropped": dropped}
    found = start.weights["trunk.blocks.0.attention.qkv.weight"]
    assert torch.equal(model.trunk.blocks[0].attention.qkv.weight, found)
    for name, tensor in fresh(tiny_trunk, new, depth=1).mtp.state_dict().items():
        if tensor.dim() > 1:  # new norms have the trunk's gains
            assert torch.equal(model.mtp.state_dict()[name], tensor)


def test_what_does_not_fit_is_named(tiny_trunk: TrunkConfig) -> None:
    model = fresh(tiny_trunk, depth=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = TrunkConfig(vocab_size=37, d_model=32, n_layers=3, n_heads=2, n_kv_heads=2, d_ff=48)
    with pytest.raises(ValueError, match=r"another trunk.*n_heads: 2 -> 4.*n_layers: 3 -> 2"):
        start_from(model, start_of(other, depth=1))
    with pytest.raises(ValueError, match=r"mtp.concat=hidden_first.*set mtp.concat=hidden_first"):
        start_from(model, start_of(tiny_trunk, depth=1, concat="hidden_first"))
    with pytest.raises(ValueError, match=r"with mtp.blocks=2, .*: set mtp.blocks=2"):
        start_from(model, start_of(tiny_trunk, depth=1, blocks=2))
    markov = start_of(tiny_trunk, variant="parallel", depth=1, correction="markov")
    hydra = fresh(tiny_trunk, "parallel", depth=2, correction="mlp", freeze_trunk=True)
    told = r"mtp.corrections.0 of another form than this run \(mtp.correction: markov -> mlp\): set"
    with pytest.raises(ValueError, match=told):
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
def test_frozen_are_embedding_trunk_and_head(
    tiny_trunk: TrunkConfig, variant: str, tied: bool
) -> None:
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


def test_post_hoc_training_changes_the_modules_alone(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {
        "init_from": base / "base",
        "mtp.freeze_trunk": "true",
        "mtp.depth": 2,
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 2,
    }
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


def test_a_resumed_run_goes_on_and_does_not_start_again(base: Path) -> None:
    settings = {
        "init_from": base / "gone",
        "mtp.depth": 1,
        **helpers.CONSTANT,
        "callbacks.checkpoints.every_n_steps": 2,
    }
    shutil.copytree(base / "base", base / "gone")
    for folder, steps in (("whole", 4), ("halves", 2), ("halves", 4)):
        if steps == 4 and folder == "halves":
            shutil.rmtree(base / "gone")  # the run no longer needs its start
        more = {**settings, "trainer.max_steps": steps}
        summary = helpers.train_here(base / folder, base / "cache", more)
    assert summary["step"] == 4
    helpers.assert_same_weights(base / "whole", base / "halves")


def test_other_heads_on_a_frozen_trunk(base: Path) -> None:
    settings = {
        "init_from": base / "base" / "checkpoints" / "last.ckpt",  # not the best one
        "mtp": "parallel",
        "mtp.freeze_trunk": "true",
        "trainer.max_steps": 3,
    }
    helpers.train_here(base / "parallel", base / "cache", settings)
    old, new = helpers.weights(base / "base"), helpers.weights(base / "parallel")
    for name, tensor in new.items():
        if not name.startswith("model.mtp."):
            assert torch.equal(tensor, old[name])


def test_what_cannot_be_started_from(base: Path, tmp_path: Path) -> None:
    def refuse(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            helpers.train_here(tmp_path / "run", base / "cache", settings)
        assert not (tmp_path / "run").exists()

    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    refuse({"init_from": hf}, ValueError, "model_type=None, which cannot be imported")
    refuse({"init_from": tmp_path / "nothing"}, FileNotFoundError, "no checkpoint or run folder")
    refuse({"init_from": base / "base", "model.d_ff": 64}, ValueError, "d_ff: 48 -> 64")
    refuse(
        {"init_from": base / "base", "tokenizer": "bpe", "tokenizer.vocab_size": 300},
        ValueError,
        "trained with the tokenizer {'kind': 'byte'}.*: set tokenizer= to that one",
    )
    refuse({"mtp.freeze_trunk": "true", "mtp_lambda": 0}, ValueError, "nothing to train")
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    refuse({"init_from": foreign}, ValueError, "has no config, model_config, tokenizer")


def test_the_checkpoints_own_bpe_tokenizer_is_used(base: Path) -> None:
    bpe = {"tokenizer": "bpe", "tokenizer.vocab_size": 300, "trainer.max_steps": 2}
    helpers.train_here(base / "bpe", base / "cache", bpe)
    other_text = {**bpe, "init_from": base / "bpe", "data.source.seed": 5}
    helpers.train_here(base / "bpe2", base / "cache", other_text)
    first, second = (helpers.checkpoint(base / f)["tokenizer"] for f in ("bpe", "bpe2"))
    assert first == second
