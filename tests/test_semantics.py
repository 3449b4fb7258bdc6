"""The tables of docs/semantics.md equal the code's windows, targets, agreement and layer names."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_modules.windows import IGNORE_INDEX, WindowBatch
from mtp_lightning.interop.weight_map import weight_map
from mtp_lightning.metrics.rates import DepthRates
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.linear import LinearConfig
from mtp_lightning.mtp.parallel import ParallelConfig
from mtp_lightning.mtp.parameter_free import ParameterFreeConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.config import TrunkConfig
from tests.models import build, target_counts

PAGE = Path(__file__).parents[1] / "docs" / "semantics.md"
T, D = 6, 2
Cells = dict[int, list[str]]


def table(name: str) -> tuple[str, Cells]:
    """What follows the name of a table, and its cells by depth."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(rf"<!-- table: {name}(.*?) -->\n((?:\|.*\n)+)", text)
    assert found, f"{PAGE.name} has no table {name!r}"
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in found[2].splitlines()[2:]]
    return found[1], {int(row[0]): row[1:] for row in rows}


def reads_and_targets(cell: str) -> tuple[int, int] | None:
    if cell == "-":
        return None
    newest, target = re.fullmatch(r"w(\d) → w(\d)", cell).groups()  # type: ignore[union-attr]
    return int(newest), int(target)


def window(documents: list[int] | None = None) -> WindowBatch:
    """The window's tokens are their positions."""
    ids = None if documents is None else torch.tensor([documents])
    return WindowBatch(torch.arange(T + D + 1).unsqueeze(0), D, ids)


@pytest.mark.parametrize(
    "name, depths", [("windows", 3), ("heads without tokens", 3), ("document mask", 3)]
)
def test_targets_equal_those_of_the_page(name: str, depths: int) -> None:
    rest, cells = table(name)
    assert len(cells) == depths
    batch = window([int(number) for number in rest.split()] or None)
    for k, row in cells.items():
        pairs = [reads_and_targets(cell) for cell in row]
        targets = [IGNORE_INDEX if pair is None else pair[1] for pair in pairs]
        assert targets == batch.targets(k)[0].tolist(), k
        assert sum(pair is not None for pair in pairs) == target_counts(batch)[k]


@pytest.mark.parametrize(
    "name, mtp",
    [
        ("windows", SequentialConfig(depth=D)),
        ("heads without tokens", ParallelConfig(depth=D)),
        ("heads without tokens", LinearConfig(depth=D)),
    ],
)
@torch.no_grad()
def test_a_prediction_depends_on_the_pages_tokens_and_no_later_one(name, mtp, tiny_trunk):
    _, cells = table(name)
    model = build(tiny_trunk, mtp).eval()
    batch = window()
    before = model(batch)
    newest = {k: [-1] * T for k in cells}
    for place in range(T + D + 1):
        tokens = batch.tokens.clone()
        tokens[0, place] = 30
        after = model(WindowBatch(tokens, D))
        for k, found in newest.items():
            moved = (after[k] - before[k]).abs().amax(-1)[0] > 1e-6
            newest[k] = [place if m else n for m, n in zip(moved.tolist(), found, strict=True)]
    for k, row in cells.items():
        assert newest[k] == [reads_and_targets(cell)[0] for cell in row], k  # type: ignore[index]


def test_agreement_compares_the_pages_positions(tiny_trunk: TrunkConfig) -> None:
    """A depth that copies the token at the table's position agrees everywhere; one off, nowhere."""
    _, cells = table("agreement")
    vocab = 2 * T
    trunk = replace(tiny_trunk, vocab_size=vocab, d_model=vocab)
    model = MTPModel(ModelConfig(trunk=trunk, mtp=ParameterFreeConfig(depth=D)))
    torch.nn.init.eye_(model.head.weight)
    main = torch.eye(vocab)[:T].unsqueeze(0)  # position i chooses token i

    def agreement(shift: int) -> list[float]:
        hidden = {0: main}
        for k, row in cells.items():
            chosen = [0 if cell == "-" else (int(cell) + shift) % vocab for cell in row]
            hidden[k] = torch.eye(vocab)[chosen].unsqueeze(0)
        rates = DepthRates(D)
        rates.update(model, window(), hidden)
        assert rates.pairs[1:].tolist() == [
            sum(cell != "-" for cell in row) for row in cells.values()
        ]
        return [rates.compute()[f"agreement_depth_{k}"] for k in cells]

    assert agreement(0) == [1.0, 1.0]
    assert agreement(1) == [0.0, 0.0]


def test_an_exported_folder_has_the_pages_layers(tiny_trunk: TrunkConfig) -> None:
    _, cells = table("layers")
    trunk = TrunkConfig(**{**vars(tiny_trunk), "n_layers": 4})
    config = ModelConfig(trunk=trunk, mtp=SequentialConfig(depth=D))
    names = {part[0] for place in weight_map(config) for part in place.parts}
    suffixes = re.findall(r"`([\w.]+)`", cells[1][1])
    assert len(suffixes) == 6
    for k in (1, 2):
        prefix = cells[k][0].strip("`")
        layer_names = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        assert {f"{name}.weight" for name in suffixes} <= layer_names
    assert not any(name.startswith("model.layers.6.") for name in names)
