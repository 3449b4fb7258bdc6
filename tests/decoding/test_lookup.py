"""Drafts that are looked up in the text itself."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from mtp_lightning.decoding import engine, generate, lookup
from mtp_lightning.decoding.lookup import Lookup, longest_match, lookups_alone
from mtp_lightning.decoding.options import DecodingOptions, Request
from mtp_lightning.decoding.sequence import rates
from tests.decoding.distributions import VOCAB as SAMPLED
from tests.decoding.distributions import chi_square, require_the_models_distribution
from tests.decoding.models import (
    ids_of,
    passes_checked,
    plain,
    random_prompts,
    small_model,
    steer_drafts,
    teacher_forced,
)

NEW = 40
# Texts of few tokens repeat themselves.
VOCAB = 5
LENGTHS = (5, 1, 13)


@pytest.fixture(params=[1, 3])
def batch_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Texts that are decoded together, and all have lookups, as on a GPU."""
    monkeypatch.setattr(lookup, "pays_for_many", lambda device: True)
    return int(request.param)


def by_search(ids: list[int]) -> tuple[int, int]:
    """:func:`longest_match` by trying all ends and all places."""
    n = len(ids)
    for length in range(min(16, n - 1), 0, -1):
        for end in range(n - 1, length - 1, -1):
            if ids[end - length : end] == ids[n - length :]:
                return length, end
    return 0, n


def test_the_longest_match_is_that_of_a_search() -> None:
    chance = random.Random(0)
    lengths = set()
    for _ in range(600):
        ids = chance.choices(range(chance.randint(1, 6)), k=chance.randint(1, 20)) * chance.randint(
            1, 3
        )
        found = longest_match(np.array(ids))
        assert found == by_search(ids), ids
        lengths.add(found[0])
    assert lengths == set(range(17))


def test_a_text_proposes_what_followed_before() -> None:
    text = Lookup([7, 1, 2, 3, 4, 5, 1, 2])
    assert text.drafts(15) == [3]
    assert text.drafts(0) == []
    assert Lookup([1, 2, 3]).drafts(15) == []
    # A match of one token is too little, and a repeated text continues beyond its end.
    assert Lookup([1, 2, 3, 1]).drafts(15) == []
    assert Lookup([1, 2, 3] * 7).drafts(7) == [1, 2, 3, 1, 2, 3, 1]


def test_the_number_of_drafts_follows_what_was_right() -> None:
    text = Lookup([1, 2, 3, 4] * 2)
    before = len(text.drafts(15))
    for token in [1, 2, 3, 4] * 5:
        text.add([token])
    assert before < len(text.drafts(15)) == 15
    # After the same words comes something else, again and again.
    text = Lookup([1, 2])
    drafted = []
    for token in range(3, 100):
        text.add([token, 1, 2])
        drafted.append(len(text.drafts(15)))
    assert drafted[0] > 0 == drafted[-1]


@pytest.mark.parametrize(
    ("depth", "mtp", "options"),
    [
        (0, {}, {}),
        (2, {}, {}),
        (2, {}, {"speculative": False}),
        (2, {}, {"draft_depth": 1, "min_confidence": 0.3}),
        (2, {"deepseek": True}, {}),
        (1, {"share_layers": True}, {"draft_depth": 3, "cache": "single"}),
        (3, {"stack": "parallel"}, {"draft_vocab": 3}),
        (3, {"stack": "linear"}, {"draft_depth": "auto"}),
        (3, {"stack": "masked"}, {}),
    ],
    ids=str,
)
def test_greedy_text_is_that_of_plain_decoding(
    depth: int, mtp: dict[str, Any], options: dict[str, Any], batch_size: int
) -> None:
    model = small_model(1, depth, vocab=VOCAB, **mtp)
    prompts = random_prompts(1, LENGTHS, VOCAB)
    expected = plain(model, prompts, NEW)
    asked = {"max_new_tokens": NEW, "lookup": 6, "batch_size": batch_size, **options}
    found = generate(model, prompts, **asked)
    assert ids_of(found) == expected
    assert all(0 < g.lookups_accepted <= g.lookups <= g.drafts for g in found)
    assert sum(g.verify_passes for g in found) < len(prompts) * (NEW - 1)
    # Read in a window that slides, too.
    asked |= {"max_context": 16, "long": "slide"}
    alone = {**asked, "lookup": 0, "speculative": False}
    for name in ("draft_depth", "min_confidence", "cache", "draft_vocab"):
        alone.pop(name, None)
    assert ids_of(generate(model, prompts, **asked)) == ids_of(generate(model, prompts, **alone))


@pytest.mark.parametrize(
    "mtp",
    [{}, {"share_layers": True, "deepseek": True}, {"stack": "linear"}, {"stack": "masked"}],
    ids=str,
)
def test_modules_read_looked_up_drafts_like_their_own(
    mtp: dict[str, Any], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pass, before and after lookups, gives the logits of teacher forcing."""
    model = small_model(1, 2, vocab=VOCAB, **mtp)
    prompts = random_prompts(2, LENGTHS, VOCAB)
    expected = plain(model, prompts, NEW)
    seen = passes_checked(model, prompts, expected, 2, monkeypatch)
    steer_drafts(monkeypatch, prompts, expected, chance=0.7)
    found = generate(model, prompts, max_new_tokens=NEW, lookup=5, batch_size=batch_size)
    assert ids_of(found) == expected
    assert all(seen.values()), seen
    assert sum(g.lookups_accepted for g in found) > 10
    assert sum(g.drafts_accepted[0] for g in found) > 1


@pytest.mark.parametrize("verify", ["token", "block"])
@pytest.mark.parametrize("depth", [0, 2])
def test_samples_have_the_models_distribution(
    depth: int, verify: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "_WORTH_IN_SAMPLES", 0.02)  # draft whatever is found
    monkeypatch.setattr(lookup, "pays_for_many", lambda device: True)
    model = small_model(11, depth, vocab=SAMPLED)
    options: dict[str, Any] = {"temperature": 1.0, "lookup": 4, "verify": verify}
    require_the_models_distribution(model, options, prompt_length=30)
    if verify == "token":
        cut = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "lookup": 2}
        require_the_models_distribution(model, cut, prompt_length=30)


@pytest.mark.parametrize(
    "options",
    [
        {"verify": "token"},
        {"verify": "block"},
        {"verify": "block", "speculative": False},
        {"min_confidence": 0.4, "draft_vocab": 3},
    ],
    ids=str,
)
def test_chains_of_lookups_leave_the_distribution_as_it_is(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of four tokens, next to greedy ones and ones of another temperature."""
    monkeypatch.setattr(lookup, "_WORTH_IN_SAMPLES", 0.005)
    monkeypatch.setattr(lookup, "pays_for_many", lambda device: True)
    vocab, length, n = 4, 4, 1500
    model = small_model(11, 2, vocab=vocab)
    prompt, other = random_prompts(11, (30, 23), vocab)
    probs = torch.zeros(vocab**length)
    for before in itertools.product(range(vocab), repeat=length - 1):
        (logits,) = teacher_forced(model, [*prompt, *before], 0)
        p = logits[-length:].softmax(-1)
        start = math.prod(float(p[i, token]) for i, token in enumerate(before))
        place = sum(token * vocab ** (length - 1 - i) for i, token in enumerate(before))
        probs[place : place + vocab] = start * p[-1]
    requests = []
    for i in range(n):
        asked: dict[str, Any] = {"index": i, "seed": 3, "max_new_tokens": length}
        requests.append(Request(prompt=prompt, temperature=1.0, **asked))
        if i % 4 == 0:
            requests.append(Request(prompt=other, temperature=0.6 * (i % 8 == 0), max_new_tokens=9))
    counts, longest = torch.zeros_like(probs), 0
    drafting = DecodingOptions(batch_size=150, lookup=3, **options)
    with engine.Engine(model, drafting) as running:
        for text in running.run(requests):
            if text.finish_reason and text.request.temperature == 1:
                ids = text.token_ids
                counts[sum(t * vocab ** (length - 1 - i) for i, t in enumerate(ids))] += 1
                longest = max(longest, text.generation().lookups_accepted)
    assert longest >= 2 and counts.sum() == n
    assert chi_square(counts, probs) < 4


def test_a_sample_depends_on_no_other_text(batch_size: int) -> None:
    model = small_model(4, 2, vocab=VOCAB)
    prompts = random_prompts(4, (9, 20, 3, 12), VOCAB)
    asked: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 0.8, "lookup": 5}
    together = generate(model, prompts, batch_size=4, **asked)
    assert ids_of(generate(model, prompts, batch_size=batch_size, **asked)) == ids_of(together)
    assert all(g.lookups for g in together)


def test_on_a_cpu_only_a_text_alone_is_looked_up() -> None:
    model = small_model(1, 2, vocab=VOCAB)
    prompts = random_prompts(1, LENGTHS, VOCAB)

    def lookups(n: int, batch_size: int, temperature: float = 0.0) -> list[int]:
        options: dict[str, Any] = {"batch_size": batch_size, "temperature": temperature}
        found = generate(model, prompts[:n], max_new_tokens=NEW, lookup=6, **options)
        return [g.lookups for g in found]

    assert all(lookups(1, 3)) and all(lookups(3, 1))
    # Drafts of the modules end texts in different rounds, and the last one is alone for a while.
    assert sorted(map(bool, lookups(3, 3))) == [False, False, True]
    # A sample's drafts must not depend on others that may join.
    assert all(lookups(3, 1, 1.0)) and not any(lookups(3, 3, 1.0))


def test_texts_that_never_look_up_are_not_indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "Lookup", None)
    model, prompts = small_model(1, 2, vocab=VOCAB), random_prompts(1, LENGTHS, VOCAB)
    options: dict[str, Any] = {"max_new_tokens": 4, "lookup": 6, "batch_size": 3}
    generate(model, prompts, temperature=1.0, **options)
    with engine.Engine(model, DecodingOptions(**options)) as running:
        running.add([Request(prompt=prompts[0], draft_depth=0)])


def test_lookups_are_counted_apart() -> None:
    model = small_model(1, 2, vocab=VOCAB)
    prompts = random_prompts(1, LENGTHS, VOCAB)
    found = generate(model, prompts, max_new_tokens=NEW, lookup=6, batch_size=1)
    for g in found:
        assert g.lookups_accepted + sum(g.drafts_accepted) == sum(g.accepted_mask)
        modules = g.drafts - g.lookups  # which draft two tokens, at the end fewer
        assert 0 <= 2 * g.drafts_reached[0] - modules <= 2
    assert rates(found)["tokens_per_step"] > 1.2


def test_what_lookups_alone_would_give_is_what_they_give() -> None:
    model = small_model(1, 2, vocab=VOCAB)
    prompts = random_prompts(1, LENGTHS, VOCAB)
    asked: dict[str, Any] = {"max_new_tokens": NEW, "speculative": False, "batch_size": 1}
    found = generate(model, prompts, lookup=8, **asked)
    expected = lookups_alone(prompts, generate(model, prompts, **asked))
    assert expected == {"lookup_tokens_per_step": pytest.approx(rates(found)["tokens_per_step"])}
    assert lookups_alone(prompts, generate(model, prompts, max_new_tokens=1)) == {}


def test_a_request_can_switch_lookups_off() -> None:
    model = small_model(1, 2, vocab=VOCAB)
    (prompt,) = random_prompts(1, (5,), VOCAB)
    found = {}
    with engine.Engine(model, DecodingOptions(batch_size=1, lookup=6)) as running:
        for depth in (None, 0, 1):
            asked = Request(prompt=prompt, max_new_tokens=NEW, draft_depth=depth)
            *_, text = running.run([asked])
            found[depth] = text.generation()
    assert found[0].drafts == 0 < found[1].lookups <= found[1].drafts
    assert found[None].lookups > 0 and len(set(map(tuple, ids_of(found.values())))) == 1
