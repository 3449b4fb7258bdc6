"""What the loop accepts of heads that read drafts, against one that reads all of the text again."""

from __future__ import annotations

from typing import Any

import pytest

from mtp_lightning.decoding import generate
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.eagle import EagleConfig
from mtp_lightning.mtp.joint import JointConfig
from mtp_lightning.mtp.linear import LinearConfig
from mtp_lightning.mtp.masked import MaskedConfig
from mtp_lightning.mtp.nextlat import NextLatConfig
from mtp_lightning.mtp.parallel import ParallelConfig
from tests.decoding.models import random_prompts, small_model, teacher_forced

VOCAB = 4  # random heads are right now and then
HEADS: dict[str, dict[str, Any]] = {
    "joint": {"stack": JointConfig},
    "nextlat": {"stack": NextLatConfig},
    "parallel mlp": {"stack": ParallelConfig, "correction": "mlp"},
    "parallel markov": {"stack": ParallelConfig, "correction": "markov"},
    "linear mlp": {"stack": LinearConfig, "correction": "mlp"},
    "linear markov": {"stack": LinearConfig, "correction": "markov"},
    "eagle": {"stack": EagleConfig},
    "eagle, some tokens": {"stack": EagleConfig, "draft_vocab": 3},
    "parallel selector": {"stack": ParallelConfig, "correction": "selector"},
    "linear selector": {"stack": LinearConfig, "correction": "selector"},
    "linear, rank 3": {"stack": LinearConfig, "rank": 3},
    "masked": {"stack": MaskedConfig},
}


def naive(model: MTPModel, prompt: list[int], n_new: int, depth: int) -> tuple[list, list, list]:
    """Greedy drafting without a cache: tokens, and the drafts accepted and judged by position."""

    def choice(tokens: list[int], k: int) -> int:
        """Depth k at the last position whose ``k`` tokens further on are given."""
        return int(teacher_forced(model, tokens + [0] * (depth - k), depth)[k][-1].argmax())

    text = [*prompt, choice(prompt, 0)]
    accepted, judged = [0] * depth, [0] * depth
    while len(text) < len(prompt) + n_new:
        drafts: list[int] = []
        for k in range(1, depth + 1):
            drafts.append(choice(text + drafts, k))
        room = min(depth, len(prompt) + n_new - len(text) - 1)
        for j, draft in enumerate(drafts[:room]):
            judged[j] += 1
            right = choice(text, 0)
            if draft != right:
                break
            accepted[j] += 1
            text.append(draft)
        text.append(choice(text, 0))
    return text[len(prompt) :], accepted, judged


@pytest.mark.parametrize("head", HEADS)
def test_the_loop_drafts_what_naive_recomputation_drafts(head: str) -> None:
    right = 0
    for seed, depth in ((1, 3), (2, 2)):
        model = small_model(seed, depth, vocab=VOCAB, **HEADS[head])
        for prompt in random_prompts(seed, (1, 6), VOCAB):
            (found,) = generate(model, [prompt], max_new_tokens=16)
            tokens, accepted, judged = naive(model, prompt, 16, depth)
            assert found.token_ids == tokens
            assert (found.drafts_accepted, found.drafts_reached) == (accepted, judged)
            right += sum(accepted)
    assert right > 2
