"""Composes the configs of jobs, and checks them before any job starts."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue

from mtp_lightning.command_line.quote import INPUTS, quoted
from mtp_lightning.command_line.shell import composing
from mtp_lightning.errors import UserError
from mtp_lightning.paths import CONF
from mtp_lightning.run.config import flatten

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.override_parser.types import Override


class Composer:
    """Composes jobs as Hydra does, but only once per set of group choices; copies get the values.

    Reading and merging a config's files takes a quarter of a second, a copy a millisecond. Values
    are set by Hydra's own function, in its order and, as in Hydra, after the groups.

    Args:
        config: the sweep's own config.
        loader: Hydra's, which composed it.
    """

    def __init__(self, config: DictConfig, loader: ConfigLoader) -> None:
        from hydra._internal.config_loader_impl import ConfigLoaderImpl
        from hydra.core.override_parser.overrides_parser import OverridesParser

        assert isinstance(loader, ConfigLoaderImpl)
        self._config, self._loader = config, loader
        self._parser = OverridesParser.create(config_loader=loader)
        # Includes the folders of hydra.searchpath, whose groups are groups too.
        _, self._repository = loader._parse_overrides_and_create_caching_repo(
            config.hydra.job.config_name, list(config.hydra.overrides.hydra)
        )
        self._parsed: dict[str, tuple[Override, bool]] = {}
        self._bases: dict[tuple[str, ...], bytes] = {}

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """A job's config, without Hydra's own settings.

        Raises:
            UserError: if the overrides do not match the config.
        """
        with composing(overrides):
            parsed = [self._parse(override) for override in overrides]
            groups = tuple(str(override.input_line) for override, value in parsed if not value)
            if groups not in self._bases:
                base = self._loader.load_sweep_config(self._config, list(groups))
                with open_dict(base):
                    del base["hydra"]
                self._bases[groups] = pickle.dumps(base)  # five times faster to copy
            composed: DictConfig = pickle.loads(self._bases[groups])
            values = [override for override, value in parsed if value]
            self._loader._apply_overrides_to_config(values, composed)
            return composed

    def _parse(self, text: str) -> tuple[Override, bool]:
        """An override, and whether it only sets a value; choosing a file, or a setting of Hydra's
        own, needs composing."""
        if text not in self._parsed:
            (override,) = self._parser.parse_overrides([text])
            grouped = self._repository.group_exists(override.key_or_group)
            value = not grouped or isinstance(override.value(), dict)
            self._parsed[text] = override, value and not override.is_hydra_override()
        return self._parsed[text]


def prepare_values(override: Override) -> None:
    """Quote the paths of an override with several values, which a job takes literally: a space must
    not get Hydra's backslash. Raises a UserError if it has no values, or they cannot be listed."""
    from hydra.core.override_parser.types import ChoiceSweep
    from hydra.errors import HydraException

    if not override.is_sweep_override():
        return
    text, remedy = override.input_line, f"list some, as in {override.key_or_group}=A,B"
    if not override.is_discrete_sweep():
        raise UserError(f"{text} has no single values: {remedy}, or use python -m sweeps.search.")
    if override.key_or_group in INPUTS and isinstance(override._value, ChoiceSweep):
        override._value.list = [_as_path(value) for value in override._value.list]
    try:
        next(override.sweep_string_iterator())
    except (StopIteration, ValueError, HydraException):  # a step of 0, a glob outside of a sweep
        raise UserError(f"{text} has no values that can be listed: {remedy}.") from None


def _as_path(value: Any) -> Any:
    """A parsed value whose texts are in quotes where Hydra would escape a letter of them."""
    from hydra._internal.grammar.utils import escape_special_characters
    from hydra.core.override_parser.types import Quote, QuotedString

    if isinstance(value, list):
        return [_as_path(item) for item in value]
    escaped = isinstance(value, str) and escape_special_characters(value) != value
    return QuotedString(value, Quote.single) if escaped else value


def compose_run(overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """The config that train.py composes from overrides, without Hydra's own settings. The absolute
    folder ``config_dir`` has more configs (``--config-dir``); errors as in
    :meth:`Composer.compose`."""
    return _composer(config_dir).compose(overrides)


def typed_folder(path: str) -> Path:
    """An existing folder, as it is typed for an option."""
    if not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"{path} is not a folder: check the path")
    return Path(path)


@cache
def _composer(config_dir: Path | None) -> Composer:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        path = quoted(f"file://{config_dir}")
        overrides = [f"hydra.searchpath=[{path}]"] if config_dir else []
        config = loader.load_configuration("config", overrides, run_mode=RunMode.RUN)
        return Composer(config, loader)


def settle(composed: DictConfig, folder: Path) -> dict[str, Any]:
    """Sets the folder of a job's config, checks that no value is missing, and resolves it.

    Raises:
        UserError: if it is another program's config, or a value is missing.
    """
    if "run_dir" not in composed or "trainer" not in composed:
        raise UserError("Sweeps of this kind are for train.py: use hydra/launcher=basic here.")
    with open_dict(composed):
        composed.run_dir = composed.paths.output_dir = str(folder)
    try:
        settled: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (MissingMandatoryValue, InterpolationToMissingValueError) as error:
        plain: Any = OmegaConf.to_container(composed)
        missing = sorted(key for key, value in flatten(plain).items() if value == "???")
        name = missing[0] if missing else error.full_key  # inside a list
        raise UserError(f"{name} has no value: give it as {name}=...") from None
    return dict(settled)
