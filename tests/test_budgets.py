"""Line and import budgets: the code stays as small as it is.

A commit that raises a budget says what it removed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("mtp_lightning", "data_modules", "sweeps", "hydra_plugins")
# Lines of every package's Python files.
LINES = {
    "data_modules": 8_473,
    "hydra_plugins": 63,
    "mtp_lightning": 3_072,
    "mtp_lightning/apps": 400,
    "mtp_lightning/callbacks": 1_674,
    "mtp_lightning/certify": 1_042,
    "mtp_lightning/command_line": 1_275,
    "mtp_lightning/cpu": 1_629,
    "mtp_lightning/decoding": 4_714,
    "mtp_lightning/distributed": 1_188,
    "mtp_lightning/experiment": 2_882,
    "mtp_lightning/heads": 988,
    "mtp_lightning/interop": 5_615,
    "mtp_lightning/loggers": 611,
    "mtp_lightning/metrics": 970,
    "mtp_lightning/mtp": 4_098,
    "mtp_lightning/nn": 2_589,
    "mtp_lightning/notebook": 505,
    "mtp_lightning/objective": 3_993,
    "mtp_lightning/optim": 385,
    "mtp_lightning/run": 1_394,
    "mtp_lightning/serving": 1_517,
    "sweeps": 9_821,
}
# Files of this project that a command imports, and their lines, without the optional part cpu/.
IMPORTS = {"train": (160, 20_360), "generate": (88, 11_970)}
COUNT = """
import atexit, json, runpy, sys

def write_imports():
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    with open(out, "w") as file:
        json.dump(sorted(f for f in files if f and f.endswith(".py")), file)

root, app, *arguments, out = sys.argv[1:]
sys.path.insert(0, root)
atexit.register(write_imports)
sys.argv = [app, *arguments]
runpy.run_path(f"{root}/{app}", run_name="__main__")
"""


def package_of(file: Path) -> str:
    parts = file.relative_to(ROOT).parts
    return "/".join(parts[: 2 if parts[0] == "mtp_lightning" and len(parts) > 2 else 1])


def lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def test_no_package_is_larger_than_its_budget() -> None:
    sizes = dict.fromkeys(LINES, 0)
    for package in PRODUCT:
        for file in (ROOT / package).rglob("*.py"):
            sizes[package_of(file)] = sizes.get(package_of(file), 0) + lines(file)
    assert sizes.keys() == LINES.keys()
    too_large = {name: (n, LINES[name]) for name, n in sizes.items() if n > LINES[name]}
    assert not too_large, "package: (lines, budget)"


@pytest.mark.slow
def test_no_command_imports_more_than_its_budget(tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    fast = ["debug=fast", "trainer.max_steps=2", f"run_dir={run}", f"paths.cache_dir={cache}"]
    commands = {"train": fast, "generate": [f"checkpoint={run}", "prompt=def", "max_new_tokens=4"]}
    for name, arguments in commands.items():
        out = tmp_path / f"{name}.json"
        done = subprocess.run(
            [sys.executable, "-c", COUNT, str(ROOT), f"{name}.py", *arguments, str(out)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        files = [Path(file) for file in json.loads(out.read_text()) if file.startswith(f"{ROOT}/")]
        product_files = [f for f in files if f.relative_to(ROOT).parts[0] in PRODUCT]
        product_files = [file for file in product_files if package_of(file) != "mtp_lightning/cpu"]
        most, longest = IMPORTS[name]
        assert len(product_files) <= most, (name, len(product_files))
        assert sum(map(lines, product_files)) <= longest, (name, sum(map(lines, product_files)))
        assert len(product_files) > most * 0.8, "lower the budget"
