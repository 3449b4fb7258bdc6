"""The composer of jobs gives the same configs as Hydra, and reads each file once."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from mtp_lightning.command_line.hydra_errors import sentence
from mtp_lightning.command_line.quote import literal
from mtp_lightning.errors import UserError
from mtp_lightning.paths import CONF
from sweeps.compose import Composer, prepare_values, settle
from sweeps.plan import Recipe, count_processes

# Overrides of a job: they choose files, set, add, remove or interpolate values.
CHOICES = {
    "mtp": ["mtp=parallel", "mtp=none", "mtp=linear"],
    "model": ["model=micro", "model=deepseek_nano"],
    "balance": ["balance=dwa", "balance=none"],
    "depth": ["mtp.depth=0", "mtp.depth=3", "++mtp.depth=1"],
    "weight": ["mtp_lambda=[0.3,0.1]", "mtp_lambda=0.1"],
    "seed": ["seed=1", "seed=7"],
    "more": ["+callbacks.mine.every=3", "+sweeps=depth", "++data.seq_len=64"],
    "less": ["~callbacks.nan_guard"],
    "other": ["trainer.max_steps=${data.batch_size}", "run_dir='a b'", "logger=csv"],
    "whole": ["optimizer={lr: 0.5}"],
}


class Sweep(NamedTuple):
    config: DictConfig
    loader: ConfigLoader
    composer: Composer


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        typed = ["seed=0,1", "hydra.job.chdir=false", "hydra.mode=MULTIRUN"]
        config = loader.load_configuration("config", typed, run_mode=RunMode.MULTIRUN)
    assert config.sweep_dir  # has the time, the same for all jobs
    return Sweep(config, loader, Composer(config, loader))


def by_hydra(sweep: Sweep, job: list[str]) -> DictConfig:
    composed = sweep.loader.load_sweep_config(sweep.config, job)
    with open_dict(composed):
        del composed["hydra"]
    return composed


def settled(sweep: Sweep, *overrides: str) -> dict[str, Any]:
    return settle(sweep.composer.compose(overrides), Path("/x"))


def test_random_jobs_equal_the_configs_of_hydra(sweep: Sweep) -> None:
    chance = random.Random(0)
    for _ in range(3):
        keys = chance.sample(list(CHOICES), chance.randint(1, 7))
        job = [chance.choice(CHOICES[key]) for key in keys]
        # Another job with the same groups first: it may leave no trace in this one.
        sweep.composer.compose([*job, "seed=99", "optimizer.lr=99"])
        ours, theirs = sweep.composer.compose(job), by_hydra(sweep, job)
        assert OmegaConf.to_container(ours) == OmegaConf.to_container(theirs), job
        assert list(ours) == list(theirs)
        assert settle(ours, Path("/x")) == settle(theirs, Path("/x")), job


WRONG = ["mtp.depht=1", "mtp=sequentail", "+seed=1", "~mtp.nothing", "seed@here=1"]


@pytest.mark.parametrize("wrong", WRONG)
def test_refused_overrides_have_the_message_of_hydra(sweep: Sweep, wrong: str) -> None:
    job = ["trainer.max_steps=3", wrong]
    with pytest.raises(HydraException) as refused:
        by_hydra(sweep, job)
    with pytest.raises(UserError) as ours:
        sweep.composer.compose(job)
    assert str(ours.value) == sentence(refused.value)


def test_a_missing_value_is_named(sweep: Sweep) -> None:
    for overrides in (["data=text"], ["data=text", "seed='${data.paths}'"]):
        with pytest.raises(ValueError, match=r"data\.paths has no value"):
            settled(sweep, *overrides)
    with pytest.raises(ValueError, match=r"more\[0\] has no value"):
        settled(sweep, "+more=['???']")


def test_jobs_of_several_processes_need_a_number_and_a_strategy(sweep: Sweep) -> None:
    two = settled(sweep, "trainer.devices=2", "trainer.strategy=ddp")
    assert count_processes(two) == 2
    for key in ("devices", "num_nodes"):
        message = rf"trainer.{key}=2 in a sweep needs trainer.strategy=ddp or fsdp"
        with pytest.raises(UserError, match=message):
            count_processes(settled(sweep, f"trainer.{key}=2"))
    with pytest.raises(UserError, match=r"trainer.devices=-1 in a sweep: give a number"):
        count_processes(settled(sweep, "trainer.devices=-1"))


@pytest.mark.parametrize(("match", "steps"), [("none", 7), ("parameters", 7), ("flops", None)])
def test_steps_chosen_by_matching_flops_are_unknown(sweep, match, steps):
    job = settled(sweep, "trainer.max_steps=7", f"compare.match={match}")
    assert Recipe.of(job).max_steps == steps


def test_jobs_with_equal_groups_read_the_config_files_once(sweep, monkeypatch):
    loader = sweep.loader
    calls = []
    load = type(loader).load_sweep_config

    def counted(self: object, config: DictConfig, overrides: list[str]) -> DictConfig:
        calls.append(overrides)
        return load(self, config, overrides)

    monkeypatch.setattr(type(loader), "load_sweep_config", counted)
    composer = Composer(sweep.config, loader)
    for seed in range(5):
        for mtp in ("parallel", "linear"):
            composed = composer.compose([f"mtp={mtp}", f"seed={seed}", "mtp.depth=1"])
            assert composed.seed == seed and mtp in composed.mtp._target_
    assert sorted(calls) == [["mtp=linear"], ["mtp=parallel"]]


PARSER = OverridesParser.create()


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("init_from=a b/c,d", ["a b/c", "d"]),
        ("branch_from=it's@1,12:30@2", ["it's@1", "12:30@2"]),
        ("init_from=choice(a b,d)", ["a b", "d"]),
        ("data.paths=[a b],[c,d e]", [["a b"], ["c", "d e"]]),
    ],
)
def test_a_job_reads_the_paths_that_were_typed(typed: str, read: list[Any]) -> None:
    override = PARSER.parse_override(literal(["-m", typed])[1])
    prepare_values(override)
    jobs = literal([f"{override.key_or_group}={v}" for v in override.sweep_string_iterator()])
    assert [PARSER.parse_override(job).value() for job in jobs] == read


@pytest.mark.parametrize("typed", ["seed=range(0)", "seed=range(0,2,0)", "mtp=glob(p*)"])
def test_values_that_cannot_be_listed_are_refused(typed: str) -> None:
    with pytest.raises(UserError, match=r"has no values that can be listed: list some, as in"):
        prepare_values(PARSER.parse_override(typed))


def test_the_sweeper_leaves_composing_and_the_folder_to_the_launcher(tmp_path: Path) -> None:
    Plugins.instance()  # Hydra imports its plugins again
    from hydra_plugins.mtp_sweeps.launchers import GridSweeper

    checked, launched = [], []

    class Loader:
        def load_sweep_config(self, *, master_config: object, sweep_overrides: list[str]) -> None:
            checked.append(sweep_overrides)

    def launch(batch: list[list[str]], initial_job_idx: int) -> list[JobReturn]:
        launched.append(batch)
        return []

    jobs = [["seed=1"], ["seed=2"]]
    sweeper: Any = GridSweeper(max_batch_size=None)
    sweeper.config = DictConfig({"hydra": {"sweep": {"dir": str(tmp_path / "sweep")}}})
    sweeper.hydra_context = SimpleNamespace(config_loader=Loader())
    for composes, folders in ((True, []), (False, [tmp_path / "sweep"])):
        sweeper.launcher = SimpleNamespace(composes=composes, launch=launch)
        sweeper.sweep(["seed=1,2"])
        assert list(tmp_path.iterdir()) == folders
    assert launched == [jobs, jobs]
    assert checked == jobs, "another launcher composes a job when its turn comes"
