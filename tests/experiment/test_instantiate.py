"""A config that the user composed may build any class, a stored one only a few."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from data_modules.sources import SyntheticSource
from mtp_lightning.errors import UserError
from mtp_lightning.experiment.build import build_objective
from mtp_lightning.experiment.instantiate import instantiate, rebuild, trusted_packages
from mtp_lightning.optim.lr_schedule import LRSchedule

SCHEDULE = "mtp_lightning.optim.lr_schedule.LRSchedule"
PACKAGE = """
from os import system
import os


class Text:
    def __init__(self, word="a"):
        self.word = word


class Head:
    def __init__(
        self, shift: int = 1, sharp: float | None = 1.0, gated: bool = True, word: str = "", name=""
    ):
        self.shift, self.sharp, self.gated, self.name = shift, sharp, gated, name


def touch(path):
    open(path, "w").close()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's package, which is on the path and not imported."""
    name = f"package_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def node(**keys: Any) -> Any:
    return OmegaConf.create(keys)


def test_a_composed_config_builds_any_importable_class(package: str) -> None:
    assert instantiate(node(_target_=f"{package}.Text", word="b")).word == "b"
    assert instantiate(node(_target_="builtins.dict", a=1), kind=dict) == {"a": 1}


@pytest.mark.parametrize(
    ("keys", "kind", "message"),
    [
        ({"kind": "cosine"}, LRSchedule, "names no class: set .*_target_"),
        ({"_target_": "builtins.dict"}, LRSchedule, "gives a dict, and LRSchedule is needed"),
        ({"_target_": "nowhere.Thing"}, None, "nowhere.*PYTHONPATH"),
        ({"_target_": "collections.Nothing"}, None, "Nothing.*PYTHONPATH"),
        ({"_target_": SCHEDULE, "speed": 1}, LRSchedule, "LRSchedule refuses its settings.*speed"),
        ({"_target_": SCHEDULE, "kind": "square"}, LRSchedule, "square"),
        (
            {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "save_top_k": -5},
            None,
            "ModelCheckpoint refuses its settings: .*save_top_k=-5",
        ),
    ],
)
def test_a_target_that_cannot_be_built_is_one_sentence(keys, kind, message):
    with pytest.raises(ValueError, match=message) as raised:
        instantiate(node(**keys), kind=kind)
    assert "\n" not in str(raised.value)


def test_a_term_reads_other_groups_and_is_named_by_its_own() -> None:
    term = {"_target_": "mtp_lightning.objective.terms.kl.KL", "temperature": "${mtp.depth}"}
    cfg = node(mtp={"depth": 3}, objective={**term, "weights": "none"})
    assert build_objective(cfg).term.temperature == 3
    cfg.objective.speed = 1
    with pytest.raises(UserError, match="^objective: .*KL refuses its settings: .*speed"):
        build_objective(cfg)


def test_a_value_must_fit_its_annotation(package: str) -> None:
    for key, value, message in (
        ("shift", "maybe", "shift must be a whole number, not 'maybe'"),
        ("shift", 1.5, "shift must be a whole number, not 1.5"),
        ("shift", None, "shift must be a whole number, not None"),
        ("sharp", "often", r"sharp \(unless null\) must be a number, not 'often'"),
        ("gated", "perhaps", "gated must be true or false, not 'perhaps'"),
        ("word", float("nan"), "word must be a text, in quotes .*, not nan"),
    ):
        with pytest.raises(UserError, match=message):
            instantiate(node(_target_=f"{package}.Head", **{key: value}), kind=object)
    built = instantiate(node(_target_=f"{package}.Head", shift=2, sharp=None, name=3), kind=object)
    assert (built.shift, built.sharp, built.name) == (2, None, 3)


FOREIGN = [
    "os.system",
    "subprocess.run",
    "builtins.exec",
    "shutil.rmtree",
    # Targets that begin with this project's name are refused too,
    "mtp_lightning.run.atomic.os.replace",
    "data_modules.cache.os.system",
    # and so are this project's functions that conf/ does not build.
    "mtp_lightning.run.checkpoints.save",
    "torch.load",
]


@pytest.mark.parametrize("target", FOREIGN)
@pytest.mark.parametrize("allow", [[], ["my_ideas"]])
@pytest.mark.parametrize("nested", [False, True])
def test_a_stored_config_builds_no_foreign_target(target, allow, nested):
    inner = node(_target_=target, command="echo hello")
    stored = node(_target_="data_modules.sources.SyntheticSource", size=inner) if nested else inner
    with pytest.raises(ValueError, match=f"_target_={target} is refused.*allow=") as raised:
        rebuild(stored, allow=allow)
    assert "\n" not in str(raised.value)


def test_a_stored_config_builds_this_projects_classes() -> None:
    stored = node(_target_="data_modules.sources.SyntheticSource", seed=1, size=100, documents=2)
    assert isinstance(rebuild(stored), SyntheticSource)


def test_an_allowed_package_gives_its_classes_and_not_its_imports(package, tmp_path):
    with pytest.raises(ValueError, match=rf"{package}.Text is refused.*allow=\[{package}\]"):
        rebuild(node(_target_=f"{package}.Text"))
    assert package not in sys.modules, "not even imported"
    assert rebuild(node(_target_=f"{package}.Text", word="c"), allow=[package]).word == "c"
    for target in (f"{package}.system", f"{package}.os.system", f"{package}.touch"):
        with pytest.raises(ValueError, match=f"{target} is refused"):
            rebuild(node(_target_=target, path=str(tmp_path / "x")), allow=[package])
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match=f"{package}.Nothing cannot be imported"):
        rebuild(node(_target_=f"{package}.Nothing"), allow=[package])


def test_a_composed_config_trusts_allow_and_the_packages_of_its_targets() -> None:
    cfg = node(
        allow=["friends"],
        mtp={"_target_": "my_ideas.heads.Config", "inner": [{"_target_": "their.Thing"}]},
        data={"_target_": "data_modules.TokenDataModule"},
    )
    assert trusted_packages(cfg) == ["friends", "my_ideas", "their"]
