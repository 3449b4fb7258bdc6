"""DFlash's block drafter: its passes in decoding.

``tests/objective/test_cross_product.py`` compares losses and gradients with the equations, which
``tests/objective/states.py`` computes block by block in float64, and ``tests/decoding`` compares
drafts with these states.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_lightning.decoding import generate
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.errors import UserError
from mtp_lightning.mtp.dflash import DFlashMTP
from mtp_lightning.nn.head import Head
from tests.decoding.models import random_prompts, small_model

DEPTH = 3


@pytest.mark.parametrize("correction", ["none", "markov", "selector"])
def test_a_round_has_one_pass_of_the_drafter(
    correction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts that depend on none before them also go through the head together."""
    model = small_model(1, DEPTH, stack="dflash", correction=correction)
    blocks, heads, read = 0, 0, 0
    draft_block, forward, read_text = DFlashMTP.draft_block, Head.forward, DFlashMTP.read

    def counted_block(self: DFlashMTP, embedded: Tensor, ctx: Any) -> Tensor:
        nonlocal blocks
        blocks += 1
        assert ctx.cache.spans.width == self.block_width == DEPTH + 1
        return draft_block(self, embedded, ctx)

    def counted_head(self: Head, hidden: Tensor) -> Tensor:
        nonlocal heads
        heads += 1
        return forward(self, hidden)

    def counted_read(self: DFlashMTP, branch: Tensor, ctx: Any) -> None:
        nonlocal read
        read += branch.shape[1]
        read_text(self, branch, ctx)

    monkeypatch.setattr(DFlashMTP, "draft_block", counted_block)
    monkeypatch.setattr(DFlashMTP, "read", counted_read)
    monkeypatch.setattr(Head, "forward", counted_head)
    # Without the C++, whose verify passes do not call the head.
    monkeypatch.setattr("mtp_lightning.decoding.trunk_session.fused", lambda model: None)
    (prompt,) = random_prompts(1, (30,))
    for drafts in (DEPTH, 1):
        blocks = heads = read = 0
        (text,) = generate(model, [prompt], max_new_tokens=14, draft_depth=drafts)
        assert 0 < blocks <= text.verify_passes
        products = heads - text.verify_passes - 1  # one more for the prompt
        assert (products > blocks) if correction == "markov" and drafts > 1 else products == blocks
        # Every position of the text is read once: those of the prompt, and those accepted since.
        assert 30 <= read <= 30 + 14


def test_a_block_is_as_wide_as_in_training_for_any_number_of_drafts() -> None:
    model = small_model(2, DEPTH, stack="dflash")
    prompts = random_prompts(2, (5, 9))
    whole = generate(model, prompts, max_new_tokens=12)
    for drafts in range(1, DEPTH + 1):
        fewer = generate(model, prompts, max_new_tokens=12, draft_depth=drafts)
        assert [text.token_ids for text in fewer] == [text.token_ids for text in whole]


def test_its_passes_are_not_compiled() -> None:
    with pytest.raises(UserError, match="compile=true has passes for a cache per draft"):
        DecodingOptions(compile=True).max_draft(small_model(1, DEPTH, stack="dflash"))


def test_a_new_drafter_starts_with_the_trunks_norm() -> None:
    model = small_model(1, DEPTH, stack="dflash")
    weights = dict(model.named_parameters())
    own, trunk = weights["mtp.norm.weight"], weights["trunk.norm.weight"]
    assert not torch.equal(own, trunk)
    model.mtp.init_from_trunk([0], model.trunk, model.head, None)
    assert torch.equal(own, trunk)
