"""Where the project's own files are, in a checkout and in an installed copy."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent

# The folder that packages are imported from: mtp_lightning, data_modules, sweeps, hydra_plugins.
ROOT = _PACKAGE.parent
# conf/ of a checkout is mtp_lightning/conf in a wheel (setup.py), so that no package of such a
# common name lands in site-packages.
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else ROOT / "conf"
# The prepared sweeps.
SWEEPS = ROOT / "sweeps"


def app(name: str) -> list[str]:
    """What Python is given to start an app: a checkout's script, or the installed module."""
    checkout = CONF.parent == ROOT
    return [str(ROOT / f"{name}.py")] if checkout else ["-m", f"mtp_lightning.apps.{name}"]
