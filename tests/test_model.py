"""The model equals the float64 reference; its initialization and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_modules.windows import WindowBatch
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.config import TrunkConfig
from tests import models, reference


def build(trunk: TrunkConfig, **mtp: Any) -> MTPModel:
    return models.build(trunk, "sequential", **mtp)


def weights_of(model: MTPModel) -> reference.Weights:
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("masked", [False, True])
def test_hidden_states_equal_the_papers_equations(tiny_trunk, masked):
    """In fp32; ``tests/objective/test_cross_product.py`` tests the switches in float64."""
    depth, seq_len = 3, 9
    model = build(tiny_trunk, depth=depth)
    tokens = torch.randint(0, 37, (2, seq_len + depth + 1))
    documents = torch.tensor([[0] * 4 + [1] * 3 + [2] * 6, [5] * 13]) if masked else None
    hidden = model(WindowBatch(tokens, depth, documents))
    for row in range(2):
        expected = reference.sequential(
            tokens[row],
            weights_of(model),
            tiny_trunk,
            depth,
            documents=documents[row].tolist() if documents is not None else None,
        )
        for k in range(depth + 1):
            torch.testing.assert_close(
                hidden[k][row].double(), expected[k], rtol=1e-4, atol=1e-4, msg=f"depth {k}"
            )


def test_trunk_starts_equal_under_every_depth(tiny_trunk: TrunkConfig) -> None:
    shallow, deep = (
        MTPModel(ModelConfig(trunk=tiny_trunk, mtp=SequentialConfig(depth=d))) for d in (0, 3)
    )
    shallow.initialize(7)
    deep.initialize(7)
    deep_state = deep.state_dict()
    for name, tensor in shallow.state_dict().items():
        assert torch.equal(tensor, deep_state[name]), name
    other = MTPModel(ModelConfig(trunk=tiny_trunk, mtp=NoMTPConfig()))
    other.initialize(8)
    assert not torch.equal(other.trunk.embedding.weight, shallow.trunk.embedding.weight)


def test_initial_std_follows_the_width() -> None:
    trunk = TrunkConfig(vocab_size=500, d_model=112, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=64)
    model = MTPModel(ModelConfig(trunk=trunk, mtp=NoMTPConfig()))
    model.initialize(0)
    assert trunk.init_std == pytest.approx(0.048)  # 0.006 * sqrt(7168 / 112)
    assert model.trunk.embedding.weight.std().item() == pytest.approx(0.048, rel=0.02)
    assert torch.equal(model.trunk.norm.weight, torch.ones(112))


def test_a_batch_of_another_depth_is_refused(tiny_trunk: TrunkConfig) -> None:
    model = build(tiny_trunk, depth=2)
    with pytest.raises(ValueError, match="mtp.depth=1 .* is 2"):
        model(WindowBatch(torch.zeros(1, 10, dtype=torch.int64), 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_heads": 3}, "n_heads=4 is not divisible by model.n_kv_heads=3"),
        ({"d_model": 33}, "d_model=33 is not divisible by model.n_heads=4"),
        ({"n_layers": 0}, "n_layers must be a whole number of at least 1, not 0"),
        ({"d_head": 7}, "d_head=7 must be even"),
    ],
)
def test_wrong_shapes_are_refused(changes: dict, message: str) -> None:
    good = {"vocab_size": 9, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    with pytest.raises(ValueError, match=message):
        TrunkConfig(**{**good, "d_ff": 8, **changes})


def test_an_unknown_head_in_a_checkpoint_is_refused(tiny_trunk: TrunkConfig) -> None:
    data = ModelConfig(trunk=tiny_trunk, mtp=NoMTPConfig()).to_dict()
    data["mtp"]["variant"] = "os.system"
    with pytest.raises(ValueError, match="mtp=os.system is unknown"):
        ModelConfig.from_dict(data)
