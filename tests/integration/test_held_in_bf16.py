"""``trainer.precision=bf16-true``: a frozen trunk's matrices in bf16, what is trained in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_lightning.decoding import generate
from mtp_lightning.experiment.training import prepare
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.ops import linear
from mtp_lightning.opening import open_model
from mtp_lightning.run import checkpoints
from mtp_lightning.run.loading import find_checkpoint
from mtp_lightning.run.metrics import read_metrics
from tests import deepseek
from tests.integration import helpers
from tests.interop import folders
from tests.kernels import LIBRARY, prepared

pytest.importorskip("safetensors", reason="Hugging Face folders need it: pip install safetensors")

SETTINGS: dict[str, Any] = {
    **helpers.FROM_FOLDER, "mtp.freeze_trunk": "true", "trainer.max_steps": 4,
    "trainer.val_check_interval": 4, "data.seq_len": 24,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bf16")
    for name in ("llama", "deepseek"):
        model = deepseek.build(folders.TRUNKS[name])
        if name != "llama":
            # Experts are computed in fp32 on a CPU: there the same numbers come of bf16's alone.
            with torch.no_grad():
                for weight in model.trunk.parameters():
                    weight.copy_(weight.bfloat16())
        folders.write(path / name, model)
    return path


@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_what_is_trained_is_what_bf16_mixed_trains(base: Path, name: str, caplog: Any) -> None:
    """To the last bit: autocast would round the same weights to the same numbers."""
    rows, states = {}, {}
    for precision in ("bf16-mixed", "bf16-true"):
        settings = {**SETTINGS, "init_from": base / name, "trainer.precision": precision}
        run = base / f"{name}-{precision}"
        helpers.train_here(run, base / "cache", settings)
        rows[precision] = [
            {tag: value for tag, value in row.items() if tag.startswith(("train/loss", "val/loss"))}
            for row in read_metrics(run / "metrics.csv")
        ]
        states[precision] = checkpoints.load(find_checkpoint(run))["state_dict"]
    said = "are rounded to bf16: the model uses the rounded values" in caplog.text
    assert said == (name == "llama")
    assert rows["bf16-mixed"] == rows["bf16-true"] and len(rows["bf16-true"]) >= 4
    for key, weight in states["bf16-mixed"].items():
        found = states["bf16-true"][key]
        held = ".trunk.blocks." in f".{key}" and weight.dim() > 1 and "router" not in key
        assert found.dtype == (torch.bfloat16 if held else torch.float32), key
        assert torch.equal(found, weight.bfloat16() if held else weight), key

    model = open_model(base / f"{name}-bf16-true").model
    assert model.head.weight.dtype == torch.float32
    texts = [
        generate(model, [[1, 2, 3]], max_new_tokens=16, speculative=s)[0] for s in (False, True)
    ]
    assert texts[0].token_ids == texts[1].token_ids


def test_a_run_goes_on_and_starts_another(base: Path) -> None:
    settings = {**SETTINGS, "init_from": base / "llama", "trainer.precision": "bf16-true"}
    whole, parts = base / "whole", base / "parts"
    helpers.train_here(whole, base / "cache", settings)
    for steps in (2, 4):
        helpers.train_here(parts, base / "cache", {**settings, "trainer.max_steps": steps,
                                                   "lambda_schedule": "constant"})  # fmt: skip
    state = checkpoints.load(find_checkpoint(parts))["state_dict"]
    assert state["model.trunk.blocks.0.attention.qkv.weight"].dtype == torch.bfloat16
    again = {**settings, "init_from": parts, "mtp.depth": 3, "trainer.max_steps": 2}
    helpers.train_here(base / "again", base / "cache", again)
    assert open_model(base / "again").model.depth == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mtp.freeze_trunk": "false"}, "this run trains its trunk"),
        ({"trainer.strategy": "fsdp"}, "does not work with trainer.strategy=fsdp"),
    ],
)
def test_what_it_is_not_for(base: Path, tmp_path: Path, change: Any, message: str) -> None:
    settings = {**SETTINGS, "init_from": base / "llama", "trainer.precision": "bf16-true"}
    with pytest.raises(ValueError, match=message):
        prepare(helpers.config(tmp_path / "run", base / "cache", settings | change), tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "deepseek", "qwen3_moe"])
def test_outside_autocast_it_is_the_rounded_model(name: str) -> None:
    """Windows, and decoding by packed copies."""
    held: MTPModel = deepseek.build(folders.TRUNKS[name], depth=1).eval()
    held.trunk.hold_in_bf16()
    rounded = deepseek.build(folders.TRUNKS[name], depth=1).eval()
    rounded.load_state_dict(held.state_dict())
    for found, wanted in zip(folders.logits(held), folders.logits(rounded), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    prompt = [[5, 6, 7, 8]]
    one, other = (generate(m, prompt, max_new_tokens=12)[0].token_ids for m in (held, rounded))
    assert one == other
    weight = held.trunk.blocks[0].attention.out.weight
    x = torch.randn(40, weight.shape[1])
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(linear(x, weight).double(), expected, rtol=1e-5, atol=1e-5)
    if LIBRARY is None:
        return
    from mtp_lightning.cpu.packed import Kind, packed_copy

    with prepared(held):
        assert packed_copy(weight).kind == Kind.HALF  # type: ignore[union-attr]
