"""results/independent/gain.py measures the gain without code of this project."""

from __future__ import annotations

import ast
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from mtp_lightning.model import ModelConfig
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.mtp.parallel import ParallelConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective.cost import StepCost
from mtp_lightning.paths import ROOT
from tests.integration.helpers import execute

SCRIPT = ROOT / "results" / "independent" / "gain.py"
TINY = {"vocabulary": 17, "width": 16, "layers": 2, "heads": 2, "hidden": 24, "context": 16}
TINY |= {"steps": 60, "warmup": 3, "evaluated": 40}


def test_the_script_is_short_and_imports_no_code_of_this_project() -> None:
    source = SCRIPT.read_text()
    assert len(source.splitlines()) < 150
    nodes = list(ast.walk(ast.parse(source)))
    imported = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    imported |= {str(n.module).split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.slow
def test_the_script_finds_the_gain_on_a_tiny_text(tmp_path: Path) -> None:
    """On a periodic text with noise."""
    generator = np.random.default_rng(0)
    for split, n in (("train", 20_000), ("val", 2_000)):
        ids = np.arange(n) % 17
        noise = generator.random(n) < 0.2
        ids[noise] = generator.integers(0, 17, noise.sum())
        ids.astype(np.uint16).tofile(tmp_path / f"{split}.bin")
    sizes = [f"--{name}={value}" for name, value in TINY.items()]
    output = tmp_path / "gain.json"
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--output", str(output), *sizes]
    execute([*command, "--seeds", "1", "2"], code=0)
    result = json.loads(output.read_text())
    assert [of_seed["seed"] for of_seed in result["seeds"]] == [1, 2]
    # FLOPs as this project counts them.
    shape = {"vocab_size": 17, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2}
    trunk = TrunkConfig(**shape, d_ff=24)
    plain, heads = (
        StepCost(ModelConfig(trunk=trunk, mtp=mtp)).per_token(16)
        for mtp in (NoMTPConfig(), ParallelConfig(depth=1))
    )
    for of_seed in result["seeds"]:
        assert of_seed["price"] == pytest.approx(plain / heads, rel=0.001)
        flops, losses = zip(*of_seed["curve"], strict=True)
        assert flops == pytest.approx(
            [b * 60 * plain * 64 for b in (0.75, 1, 1.4, 2, 2.8)], rel=0.02
        )
        assert losses[-1] < losses[0] < math.log(17)
        if of_seed["gain"] is not None:
            assert of_seed["effect"] == pytest.approx(of_seed["gain"] / of_seed["price"])
            assert flops[0] <= of_seed["gain"] * 60 * 64 * heads * 1.001
            assert losses[-1] <= of_seed["loss"]
