"""The paths of the project's own files, in a checkout and in an installed copy."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent

# The folder of the packages mtp_lightning, data_modules, sweeps and hydra_plugins.
ROOT = _PACKAGE.parent
# setup.py installs conf/ as mtp_lightning/conf, since `conf` is too common a name for a package in
# site-packages.
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else ROOT / "conf"


def app(name: str) -> list[str]:
    """Python's arguments that start an app: the checkout's script, or the installed module."""
    checkout = CONF.parent == ROOT
    return [str(ROOT / f"{name}.py")] if checkout else ["-m", f"mtp_lightning.apps.{name}"]
