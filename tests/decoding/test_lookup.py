"""``lookup``: drafts that are looked up in the text itself."""

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
from mtp_lightning.decoding.sampling import Sampling
from mtp_lightning.decoding.sequence import rates
from tests.decoding.distributions import chi_square
from tests.decoding.models import (
    check_passes,
    ids_of,
    plain_ids,
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
    """The number of texts that are decoded together; all have lookups, as on a GPU."""
    monkeypatch.setattr(lookup, "extra_tokens_are_cheap", lambda device: True)
    return int(request.param)


def by_search(ids: list[int]) -> tuple[int, int]:
    """:func:`longest_match` by a search over all lengths and places."""
    n = len(ids)
    for length in range(min(16, n - 1), 0, -1):
        for end in range(n - 1, length - 1, -1):
            if ids[end - length : end] == ids[n - length :]:
                return length, end
    return 0, n


def test_the_longest_match_is_that_of_a_search() -> None:
    rng = random.Random(0)
    lengths = set()
    for _ in range(600):
        ids = rng.choices(range(rng.randint(1, 6)), k=rng.randint(1, 20)) * rng.randint(1, 3)
        match = longest_match(np.array(ids))
        assert match == by_search(ids), ids
        lengths.add(match[0])
    assert lengths == set(range(17))


def test_a_lookup_drafts_the_tokens_that_followed_before() -> None:
    text = Lookup([7, 1, 2, 3, 4, 5, 1, 2])
    assert text.drafts(15) == [3]
    assert text.drafts(0) == []
    assert Lookup([1, 2, 3]).drafts(15) == []
    # A match of one token is too short, and a repeated text continues beyond its end.
    assert Lookup([1, 2, 3, 1]).drafts(15) == []
    assert Lookup([1, 2, 3] * 7).drafts(7) == [1, 2, 3, 1, 2, 3, 1]


def test_the_number_of_drafts_follows_earlier_acceptance() -> None:
    text = Lookup([1, 2, 3, 4] * 2)
    before = len(text.drafts(15))
    for token in [1, 2, 3, 4] * 5:
        text.add([token])
    assert before < len(text.drafts(15)) == 15
    # The same words are followed by another token each time.
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
def test_greedy_text_with_lookups_is_that_of_plain_decoding(
    depth: int, mtp: dict[str, Any], options: dict[str, Any], batch_size: int
) -> None:
    model = small_model(1, depth, vocab=VOCAB, **mtp)
    prompts = random_prompts(1, LENGTHS, VOCAB)
    expected = plain_ids(model, prompts, NEW)
    shared: dict[str, Any] = {"max_new_tokens": NEW, "batch_size": batch_size}
    texts = generate(model, prompts, lookup=6, **shared, **options)
    assert ids_of(texts) == expected
    assert all(0 < g.lookups_accepted <= g.lookups <= g.drafts for g in texts)
    assert sum(g.verify_passes for g in texts) < len(prompts) * (NEW - 1)
    # A sliding context gives the text of plain decoding, too.
    shared |= {"max_context": 16, "long": "slide"}
    slid = generate(model, prompts, lookup=6, **shared, **options)
    assert ids_of(slid) == ids_of(generate(model, prompts, speculative=False, **shared))


@pytest.mark.parametrize(
    "mtp",
    [{}, {"share_layers": True, "deepseek": True}, {"stack": "linear"}, {"stack": "masked"}],
    ids=str,
)
def test_passes_before_and_after_lookups_give_teacher_forced_logits(
    mtp: dict[str, Any], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(1, 2, vocab=VOCAB, **mtp)
    prompts = random_prompts(2, LENGTHS, VOCAB)
    expected = plain_ids(model, prompts, NEW)
    compared = check_passes(model, prompts, expected, 2, monkeypatch)
    steer_drafts(monkeypatch, prompts, expected, chance=0.7)
    texts = generate(model, prompts, max_new_tokens=NEW, lookup=5, batch_size=batch_size)
    assert ids_of(texts) == expected
    assert all(compared.values()), compared
    assert sum(g.lookups_accepted for g in texts) > 10
    assert sum(g.drafts_accepted[0] for g in texts) > 1


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({"verify": "token"}, {"temperature": 1.0}),
        ({"verify": "block"}, {"temperature": 1.0}),
        ({"verify": "block", "speculative": False}, {"temperature": 1.0}),
        ({"min_confidence": 0.4, "draft_vocab": 3}, {"temperature": 0.8, "top_k": 3}),
    ],
    ids=str,
)
def test_several_lookups_in_a_row_keep_the_models_distribution(
    options: dict[str, Any], sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of four tokens share a batch with greedy ones and some of another temperature."""
    monkeypatch.setattr(lookup, "_WORTH_IN_SAMPLES", 0.005)
    monkeypatch.setattr(lookup, "extra_tokens_are_cheap", lambda device: True)
    vocab, length, n = 4, 4, 1500
    model = small_model(11, 2, vocab=vocab)
    prompt, other = random_prompts(11, (30, 23), vocab)
    probs = torch.zeros(vocab**length)
    for before in itertools.product(range(vocab), repeat=length - 1):
        (logits,) = teacher_forced(model, [*prompt, *before], 0)
        p = Sampling(**sampling).probabilities(logits[-length:])
        start = math.prod(float(p[i, token]) for i, token in enumerate(before))
        place = sum(token * vocab ** (length - 1 - i) for i, token in enumerate(before))
        probs[place : place + vocab] = start * p[-1]
    requests = []
    for i in range(n):
        fields: dict[str, Any] = {"index": i, "seed": 3, "max_new_tokens": length}
        requests.append(Request(prompt=prompt, **sampling, **fields))
        if i % 4 == 0:
            requests.append(Request(prompt=other, temperature=0.6 * (i % 8 == 0), max_new_tokens=9))
    counts, longest = torch.zeros_like(probs), 0
    drafting = DecodingOptions(batch_size=150, lookup=3, **options)
    with engine.Engine(model, drafting) as running:
        for text in running.run(requests):
            if text.finish_reason and text.request.prompt == prompt:
                ids = text.token_ids
                counts[sum(t * vocab ** (length - 1 - i) for i, t in enumerate(ids))] += 1
                longest = max(longest, text.generation().lookups_accepted)
    # The likeliest texts hold one match.
    assert longest >= (1 if "top_k" in sampling else 2) and counts.sum() == n
    assert chi_square(counts, probs) < 4


@pytest.mark.parametrize("min_confidence", [0.0, 0.4])
def test_a_sample_with_lookups_does_not_depend_on_other_texts(
    batch_size: int, min_confidence: float
) -> None:
    model = small_model(4, 2, vocab=VOCAB)
    prompts = random_prompts(4, (9, 20, 3, 12), VOCAB)
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 0.8, "lookup": 5}
    options["min_confidence"] = min_confidence
    together = generate(model, prompts, batch_size=4, **options)
    assert ids_of(generate(model, prompts, batch_size=batch_size, **options)) == ids_of(together)
    assert all(g.lookups for g in together)


def test_on_a_cpu_only_a_text_that_is_decoded_alone_has_lookups() -> None:
    model = small_model(1, 2, vocab=VOCAB)
    prompts = random_prompts(1, LENGTHS, VOCAB)

    def lookups(n: int, batch_size: int, temperature: float = 0.0) -> list[int]:
        options: dict[str, Any] = {"batch_size": batch_size, "temperature": temperature}
        texts = generate(model, prompts[:n], max_new_tokens=NEW, lookup=6, **options)
        return [g.lookups for g in texts]

    assert all(lookups(1, 3)) and all(lookups(3, 1))
    # Texts end in different rounds, so that the last one is alone for a few rounds.
    assert sorted(map(bool, lookups(3, 3))) == [False, False, True]
    # A sample's drafts must not depend on texts that may join.
    assert all(lookups(3, 1, 1.0)) and not any(lookups(3, 3, 1.0))


def test_texts_without_lookups_are_not_indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "Lookup", None)
    model, prompts = small_model(1, 2, vocab=VOCAB), random_prompts(1, LENGTHS, VOCAB)
    options: dict[str, Any] = {"max_new_tokens": 4, "lookup": 6, "batch_size": 3}
    generate(model, prompts, temperature=1.0, **options)
    with engine.Engine(model, DecodingOptions(**options)) as running:
        running.add([Request(prompt=prompts[0], draft_depth=0)])


def test_lookups_and_drafts_of_modules_are_counted_separately(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_model(1, 2, vocab=VOCAB)
    prompts = random_prompts(1, LENGTHS, VOCAB)
    texts = generate(model, prompts, max_new_tokens=NEW, lookup=6, batch_size=1)
    for g in texts:
        assert g.lookups_accepted + sum(g.drafts_accepted) == sum(g.accepted_mask)
        by_modules = g.drafts - g.lookups  # two tokens a time, at the end fewer
        assert 0 <= 2 * g.drafts_reached[0] - by_modules <= 2
    assert rates(texts)["tokens_per_step"] > 1.2
    # Texts that are decoded together, by modules that are never sure enough to draft.
    monkeypatch.setattr(lookup, "extra_tokens_are_cheap", lambda device: True)
    texts = generate(model, prompts, max_new_tokens=NEW, lookup=6, min_confidence=1.0)
    for g in texts:
        assert g.drafts == g.lookups > 0 and g.drafts_reached == [0, 0]


def test_predicted_tokens_per_step_of_lookups_alone_are_the_measured_ones() -> None:
    model = small_model(1, 2, vocab=VOCAB)
    prompts = random_prompts(1, LENGTHS, VOCAB)
    options: dict[str, Any] = {"max_new_tokens": NEW, "speculative": False, "batch_size": 1}
    measured = rates(generate(model, prompts, lookup=8, **options))["tokens_per_step"]
    predicted = lookups_alone(prompts, generate(model, prompts, **options))
    assert predicted == {"lookup_tokens_per_step": pytest.approx(measured)}
    assert lookups_alone(prompts, generate(model, prompts, max_new_tokens=1)) == {}


def test_a_request_without_drafts_has_no_lookups() -> None:
    model = small_model(1, 2, vocab=VOCAB)
    (prompt,) = random_prompts(1, (5,), VOCAB)
    texts = {}
    with engine.Engine(model, DecodingOptions(batch_size=1, lookup=6)) as running:
        for depth in (None, 0, 1):
            request = Request(prompt=prompt, max_new_tokens=NEW, draft_depth=depth)
            *_, text = running.run([request])
            texts[depth] = text.generation()
    assert texts[0].drafts == 0 < texts[1].lookups <= texts[1].drafts
    assert texts[None].lookups > 0 and len(set(map(tuple, ids_of(texts.values())))) == 1
