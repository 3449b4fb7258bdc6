"""Both rules of verification against their formulas in exact fractions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from mtp_lightning.decoding import generate
from mtp_lightning.decoding.sampling import draw
from mtp_lightning.decoding.tree import Tree
from mtp_lightning.decoding.tree_speculative import accept_path_or_resample
from mtp_lightning.decoding.verification import RULES, accept_block, accept_or_resample
from mtp_lightning.runtime import threads
from tests.decoding.models import ids_of, random_prompts, small_model

V, D = 3, 2
ZERO, ONE = Fraction(0), Fraction(1)
Text = tuple[int, ...]
Table = dict[Text, list[Fraction]]
"""The next token's distribution after each beginning of a draft."""


def tables(seed: int) -> tuple[Table, Table]:
    """Random p of the trunk after 0 .. D tokens, and q of the drafts after 0 .. D - 1; some
    probabilities are 0."""
    generator = torch.Generator().manual_seed(seed)

    def distribution() -> list[Fraction]:
        counts = torch.randint(0, 5, (V,), generator=generator).tolist()
        counts[int(torch.randint(V, (1,), generator=generator))] += 1
        return [Fraction(n, sum(counts)) for n in counts]

    texts = [x for n in range(D + 1) for x in itertools.product(range(V), repeat=n)]
    p = {x: distribution() for x in texts}
    return p, {x: distribution() for x in texts if len(x) < D}


def rest_of(weight: Fraction, p: Sequence[Fraction], q: Sequence[Fraction]) -> list[Fraction]:
    return [max(weight * a - b, ZERO) for a, b in zip(p, q, strict=True)]


def token_rule(x: Text, p: Table, q: Table) -> dict[int, Fraction]:
    """The probability of each number of kept drafts: Leviathan et al. 2023, algorithm 1."""
    chances, reached = {}, ONE
    for i, token in enumerate(x):
        accept = min(ONE, p[x[:i]][token] / q[x[:i]][token])
        chances[i] = reached * (1 - accept)
        reached *= accept
    return {**chances, len(x): reached}


def joints(x: Text, p: Table, q: Table) -> list[Fraction]:
    """p_0 .. p_D of arXiv 2403.10444, algorithm 2."""
    ratios = [ONE]
    for i, token in enumerate(x):
        ratios.append(min(ratios[-1] * p[x[:i]][token] / q[x[:i]][token], ONE))
    return ratios


def block_rule(x: Text, p: Table, q: Table) -> dict[int, Fraction]:
    """The same for arXiv 2403.10444, algorithm 2: the last draft that ends the text."""
    joint, ends = joints(x, p, q), []
    for i in range(1, len(x) + 1):
        if i == len(x):
            ends.append(joint[i])
        else:
            s = sum(rest_of(joint[i], p[x[:i]], q[x[:i]]), ZERO)
            ends.append(s / (s + 1 - joint[i]) if s + 1 - joint[i] else ONE)
    chances, later = {}, ONE
    for i in range(len(x), 0, -1):
        chances[i] = later * ends[i - 1]
        later *= 1 - ends[i - 1]
    return {**chances, 0: later}


# The probability of each number of kept drafts, by rule.
CHANCES = {"token": token_rule, "block": block_rule}


def after_kept(rule: str, x: Text, kept: int, p: Table, q: Table) -> list[Fraction]:
    """The distribution of the token after the first ``kept`` drafts of x."""
    if kept == len(x):
        return p[x]
    weight = joints(x, p, q)[kept] if rule == "block" else ONE
    rest = rest_of(weight, p[x[:kept]], q[x[:kept]])
    return [v / sum(rest) for v in rest] if sum(rest) else p[x[:kept]]


def floats(distributions: Sequence[list[Fraction]]) -> Tensor:
    return torch.tensor([[float(v) for v in row] for row in distributions])


def rows_of(p: Table, q: Table, n: int) -> tuple[Tensor, ...]:
    """The distributions, drafts and random numbers of n rounds."""
    generator = torch.Generator().manual_seed(n)
    noise = torch.rand(n, 2 * D + 1, generator=generator, dtype=torch.float64)
    draft, q_rows, p_rows = torch.zeros(n, 0, dtype=torch.long), [], []
    for i in range(D + 1):
        row_ids = [tuple(x) for x in draft.tolist()]
        p_rows.append(floats([p[x] for x in row_ids]))
        if i < D:
            q_rows.append(floats([q[x] for x in row_ids]))
            drawn = draw(q_rows[-1], noise[:, i])
            draft = torch.cat((draft, drawn.unsqueeze(1)), dim=1)
    return torch.stack(p_rows, 1), torch.stack(q_rows, 1), draft, noise[:, D:-1], noise[:, -1]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(6))
def test_shares_over_a_grid_of_random_numbers_equal_the_fractions(seed: int, rule: str) -> None:
    """Of each number of kept drafts, and of the token after them."""
    p, q = tables(seed)
    n = 128
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    noise = torch.cartesian_prod(grid, grid)
    for x in itertools.product(range(V), repeat=D):
        if not all(q[x[:i]][x[i]] for i in range(D)):
            continue  # never drafted
        before = [x[:i] for i in range(D + 1)]
        p_TV, q_MV = floats([p[y] for y in before]), floats([q[y] for y in before[:-1]])

        def run(
            noise_RM: Tensor,
            final_R: Tensor,
            x: Text = x,
            of_text: tuple[Tensor, Tensor] = (p_TV, q_MV),
        ) -> tuple[Tensor, Tensor]:
            rows = len(final_R)
            p_RTV, q_RMV = (t.expand(rows, *t.shape) for t in of_text)
            draft_RM = torch.tensor(x).expand(rows, D)
            limit_R = torch.full((rows,), D)
            return RULES[rule](p_RTV, q_RMV, draft_RM, noise_RM, final_R, limit_R)

        _, accepted = run(noise, torch.zeros(len(noise), dtype=torch.float64))
        for kept, chance in CHANCES[rule](x, p, q).items():
            share = float((accepted == kept).double().mean())
            assert share == pytest.approx(float(chance), abs=2 / n), (x, kept)
            if not chance or not (accepted == kept).any():
                continue
            tokens, _ = run(noise[accepted == kept][:1].expand(n, D), grid)
            shares = torch.bincount(tokens[:, kept], minlength=V) / n
            expected = floats([after_kept(rule, x, kept, p, q)])[0]
            torch.testing.assert_close(shares, expected, rtol=0, atol=1.5 / n)


@pytest.mark.parametrize("rule", RULES)
def test_a_row_that_may_keep_fewer_drafts_is_judged_as_if_it_had_fewer(rule: str) -> None:
    n, judge = 2000, RULES[rule]
    inputs = rows_of(*tables(3), n)
    p, q, draft, accept_noise, final_noise = inputs
    short = (p[:, :2], q[:, :1], draft[:, :1], accept_noise[:, :1], final_noise)
    ones = torch.ones(n, dtype=torch.long)
    tokens, accepted = judge(*inputs, ones)
    expected_tokens, expected = judge(*short, ones)
    assert torch.equal(accepted, expected)
    last = accepted.unsqueeze(1)
    assert torch.equal(tokens.gather(1, last), expected_tokens.gather(1, last))
    # Both rules judge a single draft alike.
    assert torch.equal(expected, accept_or_resample(*short, ones)[1])
    # Without drafts, the trunk's distribution gives the token.
    tokens, accepted = judge(*inputs, 0 * ones)
    assert not accepted.any() and torch.equal(tokens[:, 0], draw(p[:, 0], final_noise))


@pytest.mark.parametrize("rule", RULES)
def test_a_row_is_judged_as_if_it_were_alone(rule: str) -> None:
    n = 100
    inputs = [*rows_of(*tables(3), n), torch.full((n,), D)]
    tokens, accepted = RULES[rule](*inputs)
    for row, kept in enumerate(accepted.tolist()):
        alone, alone_kept = RULES[rule](*(x[row : row + 1] for x in inputs))
        assert int(alone_kept) == kept
        assert torch.equal(alone[0, : kept + 1], tokens[row, : kept + 1])


@pytest.mark.parametrize("rule", [*RULES, "tree"])
def test_a_draft_that_the_trunk_excludes_is_not_kept(rule: str) -> None:
    """Even by the smallest random number."""
    p, q = torch.tensor([0.5, 0.5, 0.0]).expand(1, 2, -1), torch.tensor([[[0.0, 0.5, 0.5]]])
    draft, limit = torch.tensor([[2]]), torch.tensor([1])
    noise, final = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    if rule == "tree":
        q_levels = [q.unsqueeze(2)]
        judged = accept_path_or_resample(Tree((1,)), p, q_levels, draft, noise, final, limit)
    else:
        judged = RULES[rule](p, q, draft, noise, final, limit)
    assert judged[0][0, 0] == 0 and judged[-1] == 0


def test_block_verification_has_the_same_bits_on_one_thread_and_on_two() -> None:
    """The random number up to which the first of two drafts is kept."""
    generator = torch.Generator().manual_seed(3)
    p, q = ((5 * torch.randn(1, n, 128_000, generator=generator)).softmax(-1) for n in (3, 2))
    first = (p[0, 0] / q[0, 0] - 0.6).abs().argmin()
    inputs = p, q, torch.stack((first, torch.zeros_like(first))).unsqueeze(0)

    def highest(n_threads: int) -> float:
        low, high = 0.0, 1.0
        with threads(n_threads):
            for _ in range(60):
                middle = (low + high) / 2
                noise = torch.tensor([[middle, 1.0]], dtype=torch.float64)
                kept = accept_block(*inputs, noise, torch.zeros(1), torch.tensor([2]))[1]
                low, high = (middle, high) if kept else (low, middle)
        return low

    assert 0.5 < highest(1) == highest(2) < 0.7


def test_all_drafts_are_kept_if_p_equals_q() -> None:
    n = 500
    p, _ = tables(5)
    inputs = rows_of(p, {x: p[x] for x in p if len(x) < D}, n)
    _, accepted = accept_block(*inputs, torch.full((n,), D))
    assert (accepted == D).all()


def test_greedy_text_and_its_accepted_drafts_are_the_same_by_both_rules() -> None:
    model, prompts = small_model(3, 3), random_prompts(3, (3, 8, 5))
    texts = [generate(model, prompts, max_new_tokens=40, verify=verify) for verify in RULES]
    for token, block in zip(*texts, strict=True):
        assert token.token_ids == block.token_ids
        assert token.drafts_accepted == block.drafts_accepted
    # At a tiny temperature, the block rule judges the same drafts.
    cold = generate(model, prompts, max_new_tokens=40, verify="block", temperature=1e-6)
    assert ids_of(cold) == ids_of(texts[0])


def test_generation_with_block_verification_needs_fewer_passes() -> None:
    model, prompts = small_model(3, 3), random_prompts(3, (4,) * 100)
    options = {"max_new_tokens": 20, "temperature": 1.0, "batch_size": 100}
    passes = {
        verify: sum(g.verify_passes for g in generate(model, prompts, verify=verify, **options))
        for verify in RULES
    }
    assert passes["block"] < passes["token"]
