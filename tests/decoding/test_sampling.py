"""Sampling: processors by loops, the whole loop by counting samples, and the random numbers of each
row. test_verification.py has the rejection rules."""

from __future__ import annotations

import pytest
import torch

from mtp_lightning.decoding import generate, speculative
from mtp_lightning.decoding.sampling import Noise, RowSampling, Sampling, draw
from mtp_lightning.mtp import selector
from mtp_lightning.runtime import threads
from tests.decoding.distributions import VOCAB, assert_samples_follow_the_model
from tests.decoding.models import ids_of, random_prompts, small_model


def test_greedy_text_gives_ties_to_the_lowest_id():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    assert Sampling().probabilities(logits).tolist() == [[0, 1, 0, 0, 0]]


def kept_one_by_one(probs: list[float], top_k: int | None, top_p: float | None) -> list[float]:
    """The kept tokens' shares, found token by token in Python's floats."""
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))[:top_k]
    total, before, kept = sum(probs[i] for i in order), 0.0, []
    for i in order:
        if kept and before / total >= (top_p or 1.0):
            break
        kept.append(i)
        before += probs[i]
    mass = sum(probs[i] for i in kept)
    return [probs[i] / mass if i in kept else 0.0 for i in range(len(probs))]


@pytest.mark.parametrize("vocab", [7, 60, 700, 1500])
def test_top_k_and_top_p_keep_the_tokens_of_a_loop(vocab):
    """Some logits have many ties, some have tokens that cannot be drawn, and some settings keep
    more tokens than are sorted first."""
    generator = torch.Generator().manual_seed(vocab)
    for trial in range(24):
        logits = (0.1, 1.0, 4.0)[trial % 3] * torch.randn(2, vocab, generator=generator)
        if trial % 2:
            logits = (2 * logits).round() / 2
        if trial % 4 == 3:
            logits[:, vocab // 2 :] = -torch.inf
        k, p = torch.rand(2, generator=generator).tolist()
        top_k = None if trial % 6 == 0 else 1 + int(k * vocab)
        top_p = None if trial % 6 == 5 else 0.02 + 0.97 * p
        warmth = (1.0, 0.5, 1.3)[trial // 8]
        sampling = Sampling(temperature=warmth, top_k=top_k, top_p=top_p)
        truncated, whole = sampling.probabilities(logits), torch.softmax(logits / warmth, dim=-1)
        for row, probs in zip(truncated, whole, strict=True):
            expected = kept_one_by_one(probs.tolist(), top_k, top_p)
            torch.testing.assert_close(row, torch.tensor(expected))


def test_top_p_that_is_reached_exactly_keeps_no_further_token():
    even = Sampling(temperature=1.0, top_p=0.5).probabilities(torch.zeros(1, 4))
    assert even.tolist() == [[0.5, 0.5, 0, 0]]


def test_tiny_settings_are_greedy():
    """1e-320 is 0 in single precision."""
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    tiny = ({"temperature": 1e-30}, {"temperature": 1e-320}, {"top_p": 1e-320}, {"top_p": 0})
    for options in tiny:
        sampling = Sampling(**{"temperature": 1.0, **options})
        assert sampling.probabilities(logits).tolist() == [[0, 1, 0]], options


def test_draw_inverts_the_cumulative_distribution():
    probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).expand(5, -1)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.6, 1 - 2**-53], dtype=torch.float64)
    assert draw(probs, uniform).tolist() == [1, 1, 3, 3, 3]


def test_rows_with_different_settings_have_the_bits_of_rows_alone():
    settings = [
        Sampling(temperature=1.0),
        Sampling(),
        Sampling(temperature=0.7, top_k=3),
        Sampling(temperature=1.0),
        Sampling(temperature=1.3, top_k=6, top_p=0.8),
    ]
    generator = torch.Generator().manual_seed(0)
    for shape in ((5, VOCAB), (5, 3, VOCAB)):
        logits = 3 * torch.randn(shape, generator=generator)
        together = RowSampling(settings)
        assert not together.greedy and RowSampling(settings[1:2]).greedy
        probs = together.probabilities(logits)
        for row, sampling in enumerate(settings):
            alone = sampling.probabilities(logits[row : row + 1])
            assert torch.equal(probs[row : row + 1], alone)


@pytest.mark.parametrize("setting", [{"top_p": 0.9}, {"top_k": 50}], ids=str)
def test_a_row_has_the_same_bits_alone_and_in_a_batch_on_two_threads(setting):
    """PyTorch divides the sum of a single row of so many tokens among the threads."""
    sampling = Sampling(temperature=0.8, **setting)
    logits = 3 * torch.randn(12, 50_000, generator=torch.Generator().manual_seed(0))
    with threads(2):
        alone = [sampling.probabilities(row) for row in logits.split(1)]
        assert torch.equal(sampling.probabilities(logits), torch.cat(alone))


DRAFT_5 = {"draft_vocab": 5}
SELECTOR = {"correction": "selector", "correction_rank": 5}


@pytest.mark.parametrize(
    ("mtp", "options"),
    [
        ({}, {"temperature": 0.7, "top_p": 0.8}),
        ({}, {"temperature": 1.3, "top_k": 5}),
        # Some rows of a round have fewer drafts than others.
        ({"confidence": True}, {"min_confidence": 0.3, "verify": "block"}),
        ({"depth": 1}, {"draft_depth": 2, "cache": "single"}),
        ({}, {**DRAFT_5, "tree": [3, 2]}),
        ({}, {**DRAFT_5, "top_p": 0.9}),
        ({}, {**DRAFT_5, "verify": "block"}),
        ({}, {"temperature": 1.3, "top_k": 2, "tree": [3, 2]}),  # fewer tokens than candidates
        ({"stack": "joint"}, {"tree": [3, 2]}),
        # The second draft's distribution depends on the first draft.
        ({"stack": "linear", "correction": "markov"}, {}),
        ({"stack": "linear", "rank": 3}, {}),
        ({"stack": "eagle", "draft_vocab": 4}, {}),
        ({"stack": "masked"}, {}),
        ({"stack": "dflash"}, {}),
        ({"stack": "dflash", "correction": "markov"}, {}),
        ({"stack": "dflash", "correction": "markov"}, {"tree": [3, 2]}),
        ({"stack": "linear", **SELECTOR}, {}),
        ({"stack": "parallel", **SELECTOR}, {}),
        ({"stack": "parallel", **SELECTOR}, {"tree": [3, 2]}),
    ],
    ids=str,
)
def test_samples_with_drafts_have_the_models_distribution(mtp, options, monkeypatch):
    monkeypatch.setattr(selector, "CANDIDATES", 3)
    model = small_model(11, **{"depth": 2, "vocab": VOCAB, **mtp})
    assert_samples_follow_the_model(model, {"temperature": 1.0, **options})


def test_rows_are_grouped_by_settings_once_and_not_for_each_row_that_ends(monkeypatch):
    sizes = []

    class Counted(RowSampling):
        def __init__(self, rows):
            sizes.append(len(rows))
            super().__init__(rows)

    monkeypatch.setattr(speculative, "RowSampling", Counted)
    generate(small_model(12, 0), [[1]] * 20, max_new_tokens=3, temperature=1.0, batch_size=20)
    assert sizes == [20, 20]  # for the first token, and for the two rounds


def test_samples_do_not_depend_on_the_other_rows():
    model = small_model(12, 2)
    prompts = random_prompts(12, (3, 8, 5))
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 3}
    together = generate(model, prompts, **options)
    for size in (1, 2):
        apart = generate(model, prompts, batch_size=size, **options)
        assert ids_of(apart) == ids_of(together)
    # Prompts longer and shorter than the tokens that a pass reads at once.
    many = random_prompts(12, (60, 41, 3, 530, 2) * 6)
    short = {**options, "max_new_tokens": 6}
    alone = ids_of(generate(model, many, batch_size=1, **short))
    assert ids_of(generate(model, many, batch_size=30, **short)) == alone
    changed = generate(model, [[1], prompts[1], [2, 2]], **options)
    assert changed[1].token_ids == together[1].token_ids
    assert generate(model, prompts, **{**options, "seed": 4})[0].token_ids != together[0].token_ids
    # Nor does a row's number of drafts, which ends where its own confidence is too low.
    unsure = {**options, "min_confidence": 0.06}
    together, apart = (generate(model, prompts, batch_size=n, **unsure) for n in (3, 1))
    assert [g.drafts_reached for g in together] == [g.drafts_reached for g in apart]
    assert ids_of(together) == ids_of(apart)


def joined(noise):
    """All numbers of a round, row by row."""
    return torch.cat((noise.draft_BM, noise.accept_BM, noise.final_B.unsqueeze(1)), dim=1)


def rows_of(streams, rounds, *, seed=5, drafts=3, most=3):
    noise = Noise(most, "cpu")
    first = noise.join([(seed, index, drafts) for index in streams])
    return torch.stack([joined(first), *(joined(noise.next()) for _ in range(rounds))], dim=1)


def test_noise_depends_on_the_prompts_index_and_seed():
    together, apart = rows_of([0, 1, 2], 300), rows_of([2, 1], 300)
    assert torch.equal(together[1:], apart.flip(0))
    assert len(together.unique()) == together.numel()
    for index in (0, 1):  # neither does the sum of the two decide
        assert not torch.equal(rows_of([0], 3, seed=6), rows_of([index], 3))


def test_noise_does_not_depend_on_the_largest_number_of_drafts():
    padded = rows_of([0, 1], 3, drafts=2, most=5)
    assert torch.equal(padded[..., [0, 1, 5, 6, 10]], rows_of([0, 1], 3, drafts=2, most=2))
    assert not padded[..., [2, 3, 4, 7, 8, 9]].any()
