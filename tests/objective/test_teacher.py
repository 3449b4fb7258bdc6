"""Terms that compare with the main prediction: the memory that they take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective import through_head
from mtp_lightning.objective.terms.base import Term
from mtp_lightning.objective.terms.js import JS
from mtp_lightning.objective.terms.kl import KL
from mtp_lightning.objective.terms.lk import LK
from mtp_lightning.objective.terms.mixture import Mixture
from tests.losses import mtp_loss
from tests.models import build, windows
from tests.objective.memory import LiveMemory

MEMORY = [KL(temperature=2), JS(), LK(), Mixture({"ce": 1, "kl": 1, "tv": 1, "feature": 1})]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sequential", "parallel", "parameter_free"])
@pytest.mark.parametrize("term", MEMORY, ids=lambda term: term.name)
def test_a_few_chunks_are_all_that_there_is_of_size_v(
    tiny_trunk: TrunkConfig, variant: str, term: Term, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the forward and in the backward pass, whatever the number of depths and positions."""
    rows, vocab = 16, 20_000
    monkeypatch.setattr(through_head, "chunk_rows", lambda *_: rows)
    trunk = replace(tiny_trunk, vocab_size=vocab)
    peaks = []
    for depth in (1, 4):
        model = build(trunk, MTPConfig.find(variant)(depth=depth))
        batch = windows(8, 64, depth)
        with LiveMemory(least=rows * vocab // 2) as memory:
            total, _ = mtp_loss(model, batch, [0.1] * depth, [512] * (depth + 1), term=term)
            total.backward()
        head = vocab * trunk.d_model  # a gradient of the weight is no chunk
        assert memory.largest <= max(rows * vocab, head) < 512 * vocab
        peaks.append(memory.peak)
    assert peaks[1] <= peaks[0] + 4 * rows * vocab
    # Two of the head's: its gradient, and a chunk's part of it.
    assert peaks[1] <= 4 * (7 * rows * vocab + 2 * head) < 4 * 512 * vocab
