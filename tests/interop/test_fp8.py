"""Weights in fp8 with a scale a block, against plain arithmetic; and what does not fit."""

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


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As README_WEIGHTS says: the largest number of a block becomes the largest of fp8, 448."""
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
def test_every_number_is_its_own_times_its_blocks_scale(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, scale = quantise(torch.randn(shape))
    found = scaled(weight, scale, BLOCK)
    for i in range(shape[0]):
        for j in range(shape[1]):
            wanted = float(weight[i, j]) * float(scale[i // BLOCK[0], j // BLOCK[1]])
            assert float(found[i, j]) == pytest.approx(wanted, rel=1e-6)


def write(folder: Path, change: Any = None) -> dict[str, torch.Tensor]:
    """A DeepSeek folder whose layers' matrices are in fp8; and the numbers that they say."""
    folders.write(folder, deepseek.build(folders.TRUNKS["deepseek"], depth=1))
    said: dict[str, torch.Tensor] = {}

    def quantise_matrices(tensors: dict[str, torch.Tensor]) -> None:
        said.update(tensors)
        for name, tensor in said.items():
            if name.endswith("_proj.weight") and "eh_proj" not in name:
                tensors[name], tensors[f"{name}_scale_inv"] = quantise(tensor)
                said[name] = scaled(tensors[name], tensors[f"{name}_scale_inv"], BLOCK)
        if change is not None:
            change(tensors)

    folders.merge(folder, quantise_matrices)
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 8]}
    folders.change_config(folder, quantization_config=settings)
    return said


def test_a_folder_is_dequantised_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = write(tmp_path)
    found = read_folder(tmp_path).weights
    up = torch.cat([said[f"model.layers.0.mlp.{n}_proj.weight"] for n in ("gate", "up")])
    assert torch.equal(found["trunk.blocks.0.feed_forward.gate_up.weight"], up)
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
def test_scales_that_do_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    write(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)
