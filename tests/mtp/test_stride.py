"""``mtp.stride``: depth k predicts the token s k positions beyond the next."""

from __future__ import annotations

import pytest
import torch

from data_modules.windows import WindowBatch
from mtp_lightning.decoding import generate
from mtp_lightning.nn.config import TrunkConfig
from tests.models import build


@pytest.mark.parametrize("variant", ["parallel", "linear"])
def test_strided_heads_do_not_draft(tiny_trunk: TrunkConfig, variant: str) -> None:
    model = build(tiny_trunk, variant, depth=2, stride=2).eval()
    assert model.mtp.max_draft_depth == 0 and not model.mtp.reads_tokens
    (plain,) = generate(model, [[1, 2, 3]], max_new_tokens=5)
    assert len(plain.token_ids) == 5 and plain.verify_passes == 4
    with pytest.raises(ValueError, match="mtp.stride=2 predicts one token in 2 "):
        generate(model, [[1, 2, 3]], max_new_tokens=5, draft_depth=1)
    with pytest.raises(ValueError, match="built for mtp.stride=2"):
        WindowBatch(torch.zeros(1, 9).long(), 2, stride=2).require_depth(2)
