"""``draft_vocab``: drafts from the first rows of the head, against those of the whole head."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtp_lightning.decoding import generate
from mtp_lightning.decoding.precision import round_weights, roundings_of
from mtp_lightning.decoding.session import Session
from mtp_lightning.decoding.tree_session import TreeSession
from mtp_lightning.mtp.selector import CANDIDATES
from tests.decoding.models import VOCAB, ids_of, random_prompts, small_model

ROWS = 20
HEADS: list[dict[str, Any]] = [
    {},
    {"deepseek": True},
    {"stack": "linear", "correction": "markov"},
    {"stack": "parallel", "correction": "selector"},
    {"stack": "joint"},
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"tree": [3, 2]},
    {"temperature": 0.8},
    {"draft_depth": "auto"},
]


def record_draft_logits(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The list that gets the logits of all drafts from now on."""
    recorded: list[torch.Tensor] = []
    for kind, name in ((Session, "draft"), (TreeSession, "draft_tree")):
        real = getattr(kind, name)

        def draft(self: Session, k: int, real: Any = real) -> Any:
            drafted = real(self, k)
            recorded.append(getattr(drafted, "logits_BV", drafted))
            return drafted

        monkeypatch.setattr(kind, name, draft)
    return recorded


@pytest.mark.parametrize(
    ("mtp", "draft_options"),
    [
        *((head, OPTIONS[i % 2]) for i, head in enumerate(HEADS)),
        *((HEADS[0], options) for options in OPTIONS[1:]),
    ],
    ids=str,
)
def test_drafts_are_of_the_first_tokens_and_change_no_text(
    mtp: dict[str, Any], draft_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(4, 2, **mtp)
    prompts = random_prompts(4, (9, 3, 14))
    options: dict[str, Any] = {"max_new_tokens": 16, "batch_size": 2, "seed": 3}
    draft_logits = record_draft_logits(monkeypatch)
    texts = generate(model, prompts, draft_vocab=ROWS, **options, **draft_options)
    assert draft_logits or draft_options.get("draft_depth") == "auto"
    for logits in draft_logits:
        candidates = CANDIDATES if mtp.get("correction") == "selector" else ROWS
        assert logits.shape[-1] == ROWS
        assert (logits.isfinite().sum(-1) == candidates).all()
    if "temperature" not in draft_options:
        plain = generate(model, prompts, speculative=False, **options)
        assert ids_of(texts) == ids_of(plain)
    # With all rows, drafts have the bits of the whole head's.
    whole = generate(model, prompts, **options, **draft_options)
    all_rows = generate(model, prompts, draft_vocab=VOCAB, **options, **draft_options)
    assert ids_of(whole) == ids_of(all_rows)
    if draft_options.get("draft_depth") != "auto":
        assert [g.drafts_accepted for g in whole] == [g.drafts_accepted for g in all_rows]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_draft_logits_have_the_bits_of_the_whole_heads(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(4, 1)
    if precision != "fp32":
        round_weights(model, roundings_of(model, precision))
    (prompt,) = random_prompts(4, (9,))
    logits = record_draft_logits(monkeypatch)
    for vocab in (None, ROWS):
        generate(model, [prompt], max_new_tokens=3, draft_vocab=vocab)
    assert torch.equal(logits[0][..., :ROWS], logits[len(logits) // 2][..., :ROWS])
