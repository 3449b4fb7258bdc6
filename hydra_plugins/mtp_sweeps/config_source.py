"""Makes ``sweeps/NAME.yaml`` available as ``+sweeps=NAME`` in every folder."""

from __future__ import annotations

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from mtp_lightning.paths import SWEEPS as FOLDER

GROUP = "sweeps"


class SweepsSource(ConfigSource):
    """The folder as a config group. Hydra's own sources would also add its parent."""

    @staticmethod
    def scheme() -> str:
        return GROUP

    def available(self) -> bool:
        return FOLDER.is_dir()

    def is_group(self, config_path: str) -> bool:
        return config_path.strip("/") in ("", GROUP)

    def is_config(self, config_path: str) -> bool:
        return self._file(config_path).is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path.strip("/") == "":
            return [] if results_filter == ObjectType.CONFIG else [GROUP]
        if config_path.strip("/") != GROUP or results_filter == ObjectType.GROUP:
            return []
        return sorted(file.stem for file in FOLDER.glob("*.yaml"))

    def load_config(self, config_path: str) -> ConfigResult:
        file = self._file(config_path)
        if not file.is_file():
            raise ConfigLoadError(f"Config not found : {file}")
        return ConfigResult(
            provider=self.provider,
            path=self.full_path(),
            config=OmegaConf.load(file),
            header=self._get_header_dict(file.read_text(encoding="utf-8")),
        )

    def _file(self, config_path: str) -> Path:
        group, _, name = self._normalize_file_name(config_path).partition("/")
        # Deeper files are not configs of Hydra: sweeps/claims/NAME.yaml is a claim.
        flat = group == GROUP and "/" not in name
        return FOLDER / name if flat else FOLDER / "none" / "such"


class SweepsSearchPath(SearchPathPlugin):
    """Adds the folder after conf/."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="mtp-lightning", path=f"{GROUP}://{FOLDER}")
