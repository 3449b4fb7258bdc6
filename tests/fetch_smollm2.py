"""The command that claims of before 2026-11-30 name for ``data_modules.corpora.smollm2``."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
runpy.run_module("data_modules.corpora.smollm2", run_name="__main__")
