"""The peak memory of reading a folder and of training heads on it: one copy of the model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests import closed_forms, deepseek
from tests.integration import helpers
from tests.interop import folders

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak"),
]

MEGABYTE = 2**20
# A small model first fills imports and caches. The text that ends a run is left out: decoding packs
# a copy of the weights.
PROGRAM = """
import json, sys
from pathlib import Path
from mtp_lightning.experiment import samples
from tests.interop.folders import read_folder
from tests.integration import helpers
from tests import closed_forms

task, small, large, work, settings_json = sys.argv[1:]

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":"))

def train(folder):
    settings = {
        **helpers.FROM_FOLDER, "init_from": folder, "mtp.freeze_trunk": "true", "mtp.depth": 1,
        "trainer.max_steps": 3, "trainer.val_check_interval": 3, "data.batch_size": 1,
        "data.eval_batch_size": 1, **json.loads(settings_json),
    }
    helpers.train_here(Path(work) / Path(folder).name, Path(work) / "cache", settings)

samples.print_samples = lambda *args, **kwargs: None
do = train if task == "train" else lambda folder: read_folder(folder).build()
result = do(small)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
result = do(large)
print(json.dumps(status("VmHWM") - before))
"""


# Task, dtype of the folder, settings, and the highest peak as a share of the weights in float32.
CASES: dict[str, tuple[str, str, dict[str, str], float]] = {
    "an import": ("build", "float32", {}, 1.3),
    "an import of halves": ("build", "bfloat16", {}, 1.3),
    "heads": ("train", "float32", {}, 1.3),
    "heads on halves": ("train", "bfloat16", {}, 1.3),
    "heads on a trunk in bf16": ("train", "bfloat16", {"trainer.precision": "bf16-true"}, 0.75),
}

NOT_LONG = ("an import of halves", "heads on a trunk in bf16")


@pytest.mark.parametrize(
    "case",
    [case if case in NOT_LONG else pytest.param(case, marks=pytest.mark.long) for case in CASES],
)
def test_peak_memory_is_little_more_than_the_model(case: str, tmp_path: Path) -> None:
    task, dtype, settings, share = CASES[case]
    large = folders.dense(d_model=1024, n_layers=8, n_heads=16, n_kv_heads=4, d_ff=2816, d_head=64)
    for name, trunk in (("small", folders.dense()), ("large", large)):
        model = deepseek.build(trunk)
        folders.write(tmp_path / name, model, dtype=dtype, shard_bytes=100 * MEGABYTE)
    weights = sum(p.numel() for p in model.parameters()) * 4 / MEGABYTE
    assert weights > 300
    del model
    paths = [str(tmp_path / name) for name in ("small", "large")]
    arguments = [task, *paths, str(tmp_path), json.dumps(settings)]
    done = helpers.execute([sys.executable, "-c", PROGRAM, *arguments])
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout.splitlines()[-1])
    # A module is a block and its projection; its gradients and two moments come on top.
    module = closed_forms.block(large, 0)[0] + 2 * large.d_model**2
    heads = module * 4 / MEGABYTE if task == "train" else 0
    assert weights / 2 < peak < share * weights + 4 * heads, (peak, weights, heads)
    print(f"{case}: {peak:.0f} MB for {weights:.0f} MB of weights, {heads:.0f} of heads")
