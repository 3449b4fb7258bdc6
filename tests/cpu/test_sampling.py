"""Draws and judgements in C++, against the plain formulas.

All numbers are multiples of a power of two: sums are exact, and both must choose the same token.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from mtp_lightning.cpu.sampling import accept_or_resample, draw
from mtp_lightning.decoding import sampling, verification

pytestmark = pytest.mark.usefixtures("built_library")

# The most that is below 1, which rounding may turn into the whole sum.
LAST = 1 - 2**-53


def weights(*shape: int, seed: int) -> Tensor:
    """Multiples of 1/1024, most of them 0."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 1024, shape, generator=generator)
    return numbers * (torch.rand(shape, generator=generator) < 0.3) / 1024


def uniform(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**20, shape, generator=generator).double() / 2**20


@pytest.mark.parametrize("width", [1, 5, 255, 256, 257, 700, 4097])
def test_a_draw_inverts_the_cumulative_sum(width: int) -> None:
    for seed in range(20):
        probs, noise = weights(6, width, seed=seed), uniform(6, seed=seed)
        noise[:2] = torch.tensor([0.0, LAST])
        tokens = draw(probs, noise)
        assert torch.equal(draw(probs.view(2, 3, width), noise.view(2, 3)), tokens.view(2, 3))
        for row, share, token in zip(probs.tolist(), noise.tolist(), tokens.tolist(), strict=True):
            sums = list(accumulate(row))
            if not sums[-1]:
                assert token == width - 1
                continue
            first_above = bisect_right(sums, min(share, 1 - 2**-40) * sums[-1])
            assert token == first_above and row[token] > 0


def test_a_draw_from_any_probabilities_is_within_rounding_of_the_plain_one() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.softmax(4 * torch.randn(3000, 1000, generator=generator), dim=-1)
    noise = torch.rand(3000, generator=generator, dtype=torch.float64)
    assert torch.equal(draw(probs, noise), sampling.draw.plain(probs, noise))


@pytest.mark.parametrize(("width", "short"), [(3, 3), (300, 300), (600, 200), (700, 256), (900, 1)])
@pytest.mark.parametrize("drafts", [1, 3])
def test_drafts_are_judged_as_by_the_plain_rule(width: int, short: int, drafts: int) -> None:
    kept = set()
    for seed in range(30):
        p, q = weights(5, drafts + 1, width, seed=seed), weights(5, drafts, short, seed=-seed)
        p[0, :drafts, :short], p[0, :drafts, short:] = q[0], 0  # nothing is left after a rejection
        p[1] = 1  # every draft is kept
        noise = uniform(5, 2 * drafts + 2, seed=seed)
        noise[0, drafts : 2 * drafts] = 1
        tokens = draw(q, noise[:, :drafts])
        limits = torch.randint(0, drafts + 1, (5,), generator=torch.Generator().manual_seed(seed))
        given = p, q, tokens, noise[:, drafts : 2 * drafts], noise[:, -1], limits
        expected_tokens, expected = verification.accept_or_resample.plain(*given)
        found_tokens, accepted = accept_or_resample(*given)
        assert torch.equal(accepted, expected) and torch.equal(found_tokens, expected_tokens)
        kept |= set(accepted.tolist())
    assert kept == set(range(drafts + 1))
