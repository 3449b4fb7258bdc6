"""``trainer.precision=bf16-true``: a frozen trunk's matrices in bf16, trained weights in fp32."""

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
from mtp_lightning.processes import Peers
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
            # A CPU computes experts in fp32: only bf16 weights give the same numbers there.
            with torch.no_grad():
                for weight in model.trunk.parameters():
                    weight.copy_(weight.bfloat16())
        folders.write(path / name, model)
    return path


@pytest.mark.parametrize("name", ["llama", pytest.param("deepseek", marks=pytest.mark.slow)])
def test_bf16_true_trains_the_same_weights_as_bf16_mixed(base, name, caplog):
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
    warned = "are rounded to bf16: the model uses the rounded values" in caplog.text
    assert warned == (name == "llama")
    assert rows["bf16-mixed"] == rows["bf16-true"] and len(rows["bf16-true"]) >= 4
    for key, weight in states["bf16-mixed"].items():
        stored = states["bf16-true"][key]
        in_bf16 = ".trunk.blocks." in f".{key}" and weight.dim() > 1 and "router" not in key
        assert stored.dtype == (torch.bfloat16 if in_bf16 else torch.float32), key
        assert torch.equal(stored, weight.bfloat16() if in_bf16 else weight), key

    model = open_model(base / f"{name}-bf16-true").model
    assert model.head.weight.dtype == torch.float32
    texts = [
        generate(model, [[1, 2, 3]], max_new_tokens=16, speculative=s)[0] for s in (False, True)
    ]
    assert texts[0].token_ids == texts[1].token_ids


def test_a_bf16_run_resumes_and_another_run_starts_from_it(base: Path) -> None:
    settings = {**SETTINGS, "init_from": base / "llama", "trainer.precision": "bf16-true"}
    whole, parts = base / "whole", base / "parts"
    helpers.train_here(whole, base / "cache", settings)
    for steps in (2, 4):
        helpers.train_here(parts, base / "cache", {**settings, "trainer.max_steps": steps,
                                                   "lambda_schedule": "constant"})  # fmt: skip
    state = checkpoints.load(find_checkpoint(parts))["state_dict"]
    assert state["model.trunk.blocks.0.attention.qkv.weight"].dtype == torch.bfloat16
    another = {**settings, "init_from": parts, "mtp.depth": 3, "trainer.max_steps": 2}
    helpers.train_here(base / "another", base / "cache", another)
    assert open_model(base / "another").model.depth == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mtp.freeze_trunk": "false"}, "this run trains its trunk"),
        ({"trainer.strategy": "fsdp"}, "does not work with trainer.strategy=fsdp"),
    ],
)
def test_a_trained_trunk_and_fsdp_are_refused(base, tmp_path, changes, message):
    settings = {**SETTINGS, "init_from": base / "llama", "trainer.precision": "bf16-true"}
    with pytest.raises(ValueError, match=message):
        cfg = helpers.config(tmp_path / "run", base / "cache", settings | changes)
        prepare(cfg, tmp_path, Peers())


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "deepseek", "qwen3_moe"])
def test_a_bf16_trunk_outside_autocast_equals_the_rounded_model(name: str) -> None:
    """Windows, and decoding by packed copies."""
    model: MTPModel = deepseek.build(folders.TRUNKS[name], depth=1).eval()
    model.trunk.hold_in_bf16()
    rounded = deepseek.build(folders.TRUNKS[name], depth=1).eval()
    rounded.load_state_dict(model.state_dict())
    for logits, expected_logits in zip(folders.logits(model), folders.logits(rounded), strict=True):
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)
    prompt = [[5, 6, 7, 8]]
    tokens, rounded_tokens = (
        generate(m, prompt, max_new_tokens=12)[0].token_ids for m in (model, rounded)
    )
    assert tokens == rounded_tokens
    weight = model.trunk.blocks[0].attention.out.weight
    x = torch.randn(40, weight.shape[1])
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(linear(x, weight).double(), expected, rtol=1e-5, atol=1e-5)
    if LIBRARY is None:
        return
    from mtp_lightning.cpu.packed import Kind, packed_copy

    with prepared(model):
        assert packed_copy(weight).kind == Kind.BF16  # type: ignore[union-attr]
