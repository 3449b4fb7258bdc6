"""conf/callbacks and conf/logger compose and build what they name, and every key is explained."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize(
    ("group", "name", "classes"),
    [
        (
            "callbacks",
            "default",
            {"NanGuard", "Throughput", "StepProgressBar", "Checkpoints", "SpeculativeEval"},
        ),
        (
            "callbacks",
            "gradient_conflict",
            {
                "NanGuard",
                "Throughput",
                "StepProgressBar",
                "Checkpoints",
                "SpeculativeEval",
                "GradientConflict",
            },
        ),
        ("logger", "default", {"MetricsCSV", "RunTensorBoard"}),
        ("logger", "csv", {"MetricsCSV"}),
    ],
)
def test_composes_and_builds(tmp_path: Path, group: str, name: str, classes: set[str]) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose(
            overrides=[f"+{group}={name}", "+mtp.depth=2", f"+paths.output_dir={tmp_path}"]
        )
    built = {type(instantiate(node)).__name__ for node in cfg[group].values()}
    assert built == classes


@pytest.mark.parametrize("file", ["callbacks/default", "logger/default", "logger/csv"])
def test_every_key_is_explained(file: str) -> None:
    lines = (CONF / f"{file}.yaml").read_text().splitlines()
    for above, line in zip(lines, lines[1:], strict=False):
        if line.startswith("  ") and not line.strip().startswith("#"):
            assert above.strip().startswith("#"), line
