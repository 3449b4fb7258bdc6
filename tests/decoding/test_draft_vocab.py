"""Drafts from the first tokens of the vocabulary alone, against those of the whole head."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtp_lightning.decoding import generate
from mtp_lightning.decoding.precision import round_weights
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
WAYS: list[dict[str, Any]] = [{}, {"tree": [3, 2]}, {"temperature": 0.8}, {"draft_depth": "auto"}]


def watched(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The logits of all drafts from now on."""
    seen: list[torch.Tensor] = []
    for kind, name in ((Session, "draft"), (TreeSession, "draft_tree")):
        real = getattr(kind, name)

        def draft(self: Session, k: int, real: Any = real) -> Any:
            drafted = real(self, k)
            seen.append(getattr(drafted, "logits_BV", drafted))
            return drafted

        monkeypatch.setattr(kind, name, draft)
    return seen


@pytest.mark.parametrize(
    ("mtp", "way"),
    [*((head, WAYS[i % 2]) for i, head in enumerate(HEADS)), *((HEADS[0], w) for w in WAYS[1:])],
    ids=str,
)
def test_drafts_are_of_the_first_tokens_and_change_no_text(
    mtp: dict[str, Any], way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(4, 2, **mtp)
    prompts = random_prompts(4, (9, 3, 14))
    options: dict[str, Any] = {"max_new_tokens": 16, "batch_size": 2, "seed": 3}
    seen = watched(monkeypatch)
    found = generate(model, prompts, draft_vocab=ROWS, **options, **way)
    assert seen or way.get("draft_depth") == "auto"
    for logits in seen:
        candidates = CANDIDATES if mtp.get("correction") == "selector" else ROWS
        assert logits.shape[-1] == ROWS
        assert (logits.isfinite().sum(-1) == candidates).all()
    if "temperature" not in way:
        plain = generate(model, prompts, speculative=False, **options)
        assert ids_of(found) == ids_of(plain)
    # All of the rows are the whole head's, to the bit.
    whole = generate(model, prompts, **options, **way)
    all_rows = generate(model, prompts, draft_vocab=VOCAB, **options, **way)
    assert ids_of(whole) == ids_of(all_rows)
    if way.get("draft_depth") != "auto":
        assert [g.drafts_accepted for g in whole] == [g.drafts_accepted for g in all_rows]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_what_the_first_tokens_are_worth_is_what_the_whole_head_says(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(4, 1)
    if precision != "fp32":
        round_weights(model, precision)
    (prompt,) = random_prompts(4, (9,))
    seen = watched(monkeypatch)
    for vocab in (None, ROWS):
        generate(model, [prompt], max_new_tokens=3, draft_vocab=vocab)
    assert torch.equal(seen[0][..., :ROWS], seen[len(seen) // 2][..., :ROWS])
