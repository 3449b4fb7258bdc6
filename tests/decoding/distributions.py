"""Counts of samples against the distribution that they should have."""

from __future__ import annotations

import itertools
import math

import torch

from mtp_lightning.decoding import generate
from mtp_lightning.decoding.sampling import Sampling
from tests.decoding.models import random_prompts, teacher_forced

VOCAB = 8


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Standard deviations by which the statistic exceeds its mean; cells of p = 0 must be empty."""
    assert counts[probs == 0].sum() == 0
    counts, expected = counts.double(), probs.double() * counts.sum()
    large = expected >= 5
    # The small cells are one.
    counts, expected = (torch.cat((x[large], x[~large].sum().view(1))) for x in (counts, expected))
    possible = expected > 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = int(possible.sum()) - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom))


def assert_samples_follow_the_model(model, options, prompt_length=7):
    """Samples three tokens; the second and third come from the first round's drafts."""
    (prompt,) = random_prompts(11, (prompt_length,), VOCAB)
    names = options.keys() & {"temperature", "top_k", "top_p"}
    sampling = Sampling(**{name: options[name] for name in names})
    probs = torch.zeros(VOCAB, VOCAB, VOCAB)
    for a, b in itertools.product(range(VOCAB), repeat=2):
        (logits,) = teacher_forced(model, [*prompt, a, b], 0)
        p = sampling.probabilities(logits[-3:])
        probs[a, b] = p[0, a] * p[1, b] * p[2]
    n = 1200
    # More prompts than slots: as in a server, the next row takes a slot that becomes free.
    generations = generate(model, [prompt] * n, max_new_tokens=3, seed=1, batch_size=400, **options)
    assert 0.02 < sum(any(g.accepted_mask) for g in generations) / n < 0.999
    counts = torch.zeros(VOCAB**3)
    for g in generations:
        a, b, c = g.token_ids
        counts[a * VOCAB**2 + b * VOCAB + c] += 1
    assert chi_square(counts, probs.flatten()) < 5
    pairs = counts.view(VOCAB, VOCAB, VOCAB).sum(-1).flatten()
    assert chi_square(pairs, probs.sum(-1).flatten()) < 5
    # Control: the distribution of another temperature is rejected.
    if sampling == Sampling(temperature=1.0):
        flatter = (probs**0.5) / (probs**0.5).sum()
        assert chi_square(counts, flatter.flatten()) > 10
