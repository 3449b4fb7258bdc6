"""Weights in fp8 with a scale per block, against plain arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_lightning.interop.fp8 import scaled
from tests import deepseek
from tests.interop import folders
from tests.interop.folders import read_folder

BLOCK = (8, 8)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek's README_WEIGHTS: the largest number of a block becomes the largest of fp8, 448."""
    rows, columns = weight.shape
    stored, scales = torch.zeros_like(weight), []
    for i in range(0, rows, BLOCK[0]):
        row = []
        for j in range(0, columns, BLOCK[1]):
            part = weight[i : i + BLOCK[0], j : j + BLOCK[1]]
            scale = part.abs().max() / 448
            stored[i : i + BLOCK[0], j : j + BLOCK[1]] = part / scale
            row.append(scale)
        scales.append(torch.stack(row))
    return stored.to(torch.float8_e4m3fn), torch.stack(scales)


@pytest.mark.parametrize("shape", [(16, 24), (10, 4), (8, 13), (1, 1)])
def test_every_weight_is_multiplied_by_the_scale_of_its_block(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, scale = quantize(torch.randn(shape))
    weights = scaled(weight, scale, BLOCK)
    for i in range(shape[0]):
        for j in range(shape[1]):
            expected = float(weight[i, j]) * float(scale[i // BLOCK[0], j // BLOCK[1]])
            assert float(weights[i, j]) == pytest.approx(expected, rel=1e-6)


def write_fp8(folder: Path, change: Any = None) -> dict[str, torch.Tensor]:
    """A DeepSeek folder whose layers have matrices in fp8; returns the dequantized tensors."""
    folders.write(folder, deepseek.build(folders.TRUNKS["deepseek"], depth=1))
    expected: dict[str, torch.Tensor] = {}

    def quantize_matrices(tensors: dict[str, torch.Tensor]) -> None:
        expected.update(tensors)
        for name, tensor in expected.items():
            if name.endswith("_proj.weight") and "eh_proj" not in name:
                tensors[name], tensors[f"{name}_scale_inv"] = quantize(tensor)
                expected[name] = scaled(tensors[name], tensors[f"{name}_scale_inv"], BLOCK)
        if change is not None:
            change(tensors)

    folders.merge(folder, quantize_matrices)
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 8]}
    folders.change_config(folder, quantization_config=settings)
    return expected


def test_a_folder_is_dequantized_and_reports_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = write_fp8(tmp_path)
    weights = read_folder(tmp_path).weights
    up = torch.cat([expected[f"model.layers.0.mlp.{n}_proj.weight"] for n in ("gate", "up")])
    assert torch.equal(weights["trunk.blocks.0.feed_forward.gate_up.weight"], up)
    assert "in fp8 are dequantized to float32" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale_inv"),
         "layers.0.mlp.up_proj.weight in .* is stored as float8_e4m3fn"),
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight"), "which is not there"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(3, 3)}),
         r"has the shape \[3, 3\] where \[6, 4\] is needed"),
        (lambda t: t.update({"model.norm.weight_scale_inv": torch.ones(1)}),
         "scales model.norm.weight, which is not a matrix"),
    ],
)  # fmt: skip
def test_scales_that_do_not_fit_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    write_fp8(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)
