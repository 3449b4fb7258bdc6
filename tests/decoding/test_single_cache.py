"""One module and one cache: what it drafts past its trained depth; the text is the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from mtp_lightning.decoding import generate
from mtp_lightning.decoding.single_cache import SingleCacheSession
from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.nextlat import NextLatConfig
from mtp_lightning.nn.attention import Positions
from tests.decoding.distributions import VOCAB as SAMPLED
from tests.decoding.distributions import require_the_models_distribution
from tests.decoding.models import random_prompts, small_model, steer_drafts

VOCAB = 4  # random heads are right now and then
SINGLE: dict[str, Any] = {"cache": "single"}
MODELS: dict[str, dict[str, Any]] = {
    "one module": {"depth": 1},
    "shared": {"depth": 2, "share_layers": True},
    "before last, pre": {"depth": 1, "branch": "before_last", "input_norm": "pre"},
    "deepseek": {"depth": 1, "deepseek": True},
}
every_model = pytest.mark.parametrize("name", MODELS)


@torch.no_grad()
def drafts_of(model: MTPModel, text: list[int], n_drafts: int) -> list[int]:
    """Without a cache: the module over all true states, and behind them over its own."""
    positions = Positions.of_window(
        model.config.trunk, len(text) - 1, device="cpu", dtype=torch.float32
    )
    output = model.trunk(model.trunk.embedding(torch.tensor([text[:-1]])), positions)
    states, drafts = model.mtp.branch(model.trunk, output), []
    for _ in range(n_drafts):
        following = torch.tensor([[*text[1:], *drafts]])
        positions = Positions.of_window(
            model.config.trunk, states.shape[1], device="cpu", dtype=torch.float32
        )
        read = model.mtp.step(1, states, model.trunk.embedding(following), positions)
        drafts.append(int(model.head(read[:, -1:]).argmax()))
        states = torch.cat((states, read[:, -1:]), dim=1)
    return drafts


@every_model
def test_the_loop_drafts_what_naive_recomputation_drafts(name: str) -> None:
    right = 0
    for seed in range(2):
        model = small_model(seed, vocab=VOCAB, **MODELS[name])
        for prompt in random_prompts(seed, (1, 6), VOCAB):
            (plain,) = generate(model, [prompt], max_new_tokens=16, speculative=False)
            (found,) = generate(model, [prompt], max_new_tokens=16, draft_depth=3, **SINGLE)
            assert found.token_ids == plain.token_ids
            accepted, judged, done = [0] * 3, [0] * 3, 1
            while done < 16:
                text = prompt + plain.token_ids[:done]
                room = min(3, 16 - done - 1)
                for j, draft in enumerate(drafts_of(model, text, 3)[:room]):
                    judged[j] += 1
                    if draft != plain.token_ids[done]:
                        break
                    accepted[j] += 1
                    done += 1
                done += 1
            assert (found.drafts_accepted, found.drafts_reached) == (accepted, judged)
            right += sum(accepted[1:])
    assert right > 0


@pytest.mark.parametrize(
    ("name", "chance"),
    [*itertools.product(["one module", "shared"], [0.0, 0.6, 1.0]), ("deepseek", 0.6)],
)
def test_greedy_text_is_that_of_plain_decoding(
    name: str, chance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that accept different lengths, and a context that slides."""
    model = small_model(5, **MODELS[name])
    prompts = random_prompts(5, (1, 4, 11))
    long: dict[str, Any] = {"max_context": 24, "long": "slide"}
    for options in ({"max_new_tokens": 20}, {"max_new_tokens": 40, **long}):
        plain = generate(model, prompts, speculative=False, **options)
        with monkeypatch.context() as patched:
            right = [p + g.token_ids for p, g in zip(prompts, plain, strict=True)]
            if "long" not in options:
                steer_drafts(patched, right, chance=chance, session=SingleCacheSession)
            for depth in (3, "auto"):
                found = generate(model, prompts, draft_depth=depth, **SINGLE, **options)
                assert [g.token_ids for g in found] == [g.token_ids for g in plain]


def test_samples_have_the_models_distribution() -> None:
    model = small_model(11, 1, vocab=SAMPLED)
    require_the_models_distribution(model, {"temperature": 1.0, **SINGLE}, 2)


def test_what_makes_no_sense_is_refused() -> None:
    options: dict[str, Any] = {"max_new_tokens": 2, **SINGLE}
    for model in (small_model(0, 2), small_model(0, 2, stack=NextLatConfig), small_model(0, 0)):
        with pytest.raises(ValueError, match="cache=single is for a single module"):
            generate(model, [[1]], **options)
    model = small_model(0, 1)
    with pytest.raises(ValueError, match="does not go together with speculative=false"):
        generate(model, [[1]], speculative=False, **options)
    with pytest.raises(ValueError, match="does not go together with compile=true"):
        generate(model, [[1]], compile=True, **options)
    with pytest.raises(ValueError, match="cache=both is unknown: choose one of per_depth, single"):
        generate(model, [[1]], max_new_tokens=2, cache="both")  # type: ignore[arg-type]
