"""``tree``: several candidates per depth, the rule that accepts a path, and the texts."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch

from mtp_lightning.decoding import generate
from mtp_lightning.decoding.engine import Engine
from mtp_lightning.decoding.options import DecodingOptions, Request
from mtp_lightning.decoding.tree import Tree, ancestor
from mtp_lightning.decoding.tree_session import TreeSession
from mtp_lightning.decoding.tree_speculative import (
    accept_path_or_resample,
    draw_without_replacement,
)
from tests.decoding.distributions import chi_square
from tests.decoding.models import (
    ids_of,
    random_prompts,
    run_to_end,
    small_model,
    teacher_forced,
)

VOCAB = 5  # random heads are right now and then
VARIANTS = [
    {},
    {"deepseek": True},
    {"share_layers": True},
    {"branch": "before_last", "input_norm": "pre"},
    {"stack": "linear", "rank": 2},
    {"stack": "joint", "deepseek": True},
    {"stack": "nextlat"},
    {"stack": "parallel", "correction": "mlp"},
    {"stack": "linear", "correction": "markov"},
    {"stack": "eagle", "draft_vocab": 4},
    {"stack": "parallel", "correction": "selector"},
    {"stack": "masked"},
    {"stack": "dflash"},
    {"stack": "dflash", "correction": "markov"},
    {"stack": "dflash", "correction": "selector"},
]


def test_the_nodes_of_a_tree_are_numbered_by_depth():
    tree = Tree((3, 2, 1))
    assert len(tree) == 15 and tree.depth == 3
    assert [tree.level(e) for e in range(4)] == [
        range(0, 1),
        range(1, 4),
        range(4, 10),
        range(10, 16),
    ]
    assert tree.parents() == [-1, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9]
    for depth in range(3):
        for node in tree.level(depth):
            assert all(tree.parents()[child] == node for child in tree.children(node, depth))
    assert [ancestor(tree.parents(), 15, up) for up in range(6)] == [15, 9, 3, 0, -1, -2]


@pytest.mark.parametrize(
    ("mtp", "lengths"),
    [*((mtp, (8, 12)) for mtp in VARIANTS[:4]), *((mtp, (9,)) for mtp in VARIANTS[4:])],
    ids=str,
)
def test_every_nodes_logits_are_teacher_forced_logits(mtp, lengths, monkeypatch):
    """Compares the trunk and every depth over the text and the node's path, round after round."""
    model = small_model(1, 3, vocab=VOCAB, **mtp)
    prompts = random_prompts(1, lengths, VOCAB)
    compared = dict.fromkeys(range(4), 0)
    draft, verify = TreeSession.draft_tree, TreeSession.verify_tree

    def check(session, row, node, k, logits_V):
        """Depth k's logits after a node of depth k - 1, or the trunk's if k is 0."""
        tokens = session.tokens_BS[row].tolist()
        n, parents = session.n_read[row], session.tree.parents()
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        text = tokens[:n] + [tokens[n + i] for i in path]
        (expected,) = teacher_forced(model, text, k)[k:]
        torch.testing.assert_close(logits_V, expected[-1], rtol=1e-3, atol=1e-3)
        compared[k] += 1

    def checked_draft(session, k):
        logits_BPV = draft(session, k)
        for row, i in itertools.product(range(len(session.n_read)), range(logits_BPV.shape[1])):
            if not session.is_short(row):
                check(session, row, session.tree.level(k - 1)[i], k, logits_BPV[row, i])
        return logits_BPV

    def checked_verify(session):
        logits_BTV = verify(session)
        for row, node in itertools.product(range(len(session.n_read)), range(logits_BTV.shape[1])):
            check(session, row, node, 0, logits_BTV[row, node])
        return logits_BTV

    monkeypatch.setattr(TreeSession, "draft_tree", checked_draft)
    monkeypatch.setattr(TreeSession, "verify_tree", checked_verify)
    generate(model, prompts, max_new_tokens=5, tree=[2, 2, 1])
    assert all(compared.values()), compared


@pytest.mark.parametrize("mtp", VARIANTS, ids=str)
def test_greedy_text_with_a_tree_is_that_of_plain_decoding(mtp):
    """Rows join, some are shorter than the tree is deep, and they accept different numbers."""
    model = small_model(0, 3, vocab=VOCAB, **mtp)
    prompts = random_prompts(0, (5, 1, 13, 30), VOCAB)
    options = {"max_new_tokens": 20, "batch_size": 3}
    plain = generate(model, prompts, speculative=False, **options)
    texts = generate(model, prompts, tree=[3, 2, 1], **options)
    assert ids_of(texts) == ids_of(plain)
    for g in texts:
        assert sum(g.drafts_accepted) == sum(g.accepted_mask)
        assert g.drafts_reached[1] <= g.drafts_accepted[0] <= g.drafts_reached[0]


def test_a_wide_tree_gives_more_tokens_per_step_than_a_chain():
    wide = chain = 0.0
    for seed in range(2):
        model = small_model(seed, 3, vocab=VOCAB)
        prompts = random_prompts(seed, (5, 1, 13, 2, 30, 8), VOCAB)
        options = {"max_new_tokens": 24, "batch_size": 4}
        wide += sum(g.tokens_per_step for g in generate(model, prompts, tree=[3, 2, 1], **options))
        chain += sum(g.tokens_per_step for g in generate(model, prompts, **options))
    assert wide > chain > 0


def test_a_tree_of_one_candidate_per_depth_decodes_as_a_chain():
    model = small_model(4, 3, vocab=VOCAB)
    prompts = random_prompts(4, (12, 20), VOCAB)
    for options in ({}, {"temperature": 1.0, "seed": 2}):
        chain, tree = (
            generate(model, prompts, max_new_tokens=30, tree=tree, **options)
            for tree in (None, [1, 1, 1])
        )
        assert ids_of(tree) == ids_of(chain)
        assert [g.drafts_accepted for g in tree] == [g.drafts_accepted for g in chain]
        assert [g.drafts_reached for g in tree] == [g.drafts_reached for g in chain]


def test_candidates_that_top_k_leaves_out_are_no_drafts():
    """Its one token has probability 1, so that the other candidates do not exist."""
    model = small_model(4, 3, vocab=VOCAB)
    prompts = random_prompts(4, (12, 20), VOCAB)
    options = {"max_new_tokens": 30, "temperature": 1.0, "top_k": 1}
    chain, wide = (generate(model, prompts, tree=tree, **options) for tree in ([1, 1], [3, 2]))
    assert ids_of(wide) == ids_of(chain)
    assert [(g.drafts, g.rejected) for g in wide] == [(g.drafts, g.rejected) for g in chain]
    assert all(g.rejected for g in wide)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_round_in_which_no_row_may_accept_a_draft_makes_none(temperature, monkeypatch):
    """Its tokens are those that it has among rows that draft."""
    model, (first, second) = small_model(4, 2, vocab=VOCAB), random_prompts(4, (12, 20), VOCAB)
    options = {"max_new_tokens": 20, "temperature": temperature}
    plain = Request(prompt=first, draft_depth=0, **options)
    drafted = Request(prompt=second, index=1, **options)

    def text_of_the_first(*requests):
        with Engine(model, DecodingOptions(tree=[3, 2], batch_size=2)) as engine:
            return run_to_end(engine, requests)[0].token_ids

    together = text_of_the_first(plain, drafted)
    monkeypatch.delattr(TreeSession, "draft_tree")
    assert text_of_the_first(plain) == together


def test_texts_with_a_tree_end_at_the_limit_and_slide_as_plain_ones():
    model = small_model(5, 2, vocab=VOCAB)
    prompts = random_prompts(5, (12, 3), VOCAB)
    plain = generate(model, prompts, max_new_tokens=60, speculative=False)
    for n in range(1, 12):
        for g, whole in zip(
            generate(model, prompts, max_new_tokens=n, tree=[3, 2]), plain, strict=True
        ):
            assert g.token_ids == whole.token_ids[:n] and g.finish_reason == "length"
    slide = {"max_new_tokens": 60, "max_context": 24, "long": "slide"}
    expected = generate(model, prompts, speculative=False, **slide)
    slid = generate(model, prompts, tree=[3, 2], **slide)
    assert ids_of(slid) == ids_of(expected)


def rule(p: list[Fraction], q: list[Fraction], width: int) -> tuple[list[Fraction], Fraction]:
    """The distribution of the token that the rejection rule gives for ``width`` candidates, and the
    probability that it accepts one, by enumeration of all draws."""
    result, accepted = [Fraction(0)] * len(p), Fraction(0)

    def judge(p: list[Fraction], q: list[Fraction], left: int, chance: Fraction) -> None:
        nonlocal accepted
        if not left or not sum(q):
            for token, value in enumerate(p):
                result[token] += chance * value
            return
        q = [value / sum(q) for value in q]
        rest = [max(a - b, Fraction(0)) for a, b in zip(p, q, strict=True)]
        for token, value in enumerate(q):
            if not value:
                continue
            accept = min(Fraction(1), p[token] / value)
            result[token] += chance * value * accept
            accepted += chance * value * accept
            if accept < 1:
                after = [0 * v if i == token else v for i, v in enumerate(q)]
                norm = [v / sum(rest) for v in rest]
                judge(norm, after, left - 1, chance * value * (1 - accept))

    judge(p, q, width, Fraction(1))
    return result, accepted


@pytest.mark.parametrize("widths", [(3,), (2, 2), (3, 2, 1)])
def test_accepted_tokens_have_the_trunks_distribution(widths):
    """Counts the tokens after each path; each path has another distribution."""
    tree, vocab, n = Tree(widths), 6, 60_000
    generator = torch.Generator().manual_seed(len(widths))
    p_of, q_of = {}, {}  # by the tokens of the path
    for length in range(tree.depth + 1):
        for path in itertools.product(range(vocab), repeat=length):
            p, q = torch.rand(2, vocab, generator=generator) ** 3
            q[torch.randint(vocab, (1,), generator=generator)] = 0
            p_of[path], q_of[path] = p / p.sum(), q / q.sum()
    tables = {
        name: [
            torch.stack([of[path] for path in itertools.product(range(vocab), repeat=length)])
            for length in range(tree.depth + 1)
        ]
        for name, of in (("p", p_of), ("q", q_of))
    }
    noise = torch.rand(n, 2 * len(tree) + 1, generator=generator, dtype=torch.float64)
    drafts, proposals = [], []
    number = [torch.zeros(n, 1, dtype=torch.long)]  # every node's path, as a number
    for depth, width in enumerate(widths):
        level = tree.level(depth + 1)
        q = tables["q"][depth][number[depth]]
        uniform = noise[:, level.start - 1 : level.stop - 1].unflatten(1, (q.shape[1], width))
        draft, drawn_from = draw_without_replacement(q, uniform)
        assert all(len(set(row)) == width for row in draft[:50].flatten(0, 1).tolist())
        drafts.append(draft.flatten(1))
        proposals.append(drawn_from)
        number.append((number[depth].unsqueeze(-1) * vocab + draft).flatten(1))
    p = torch.cat([tables["p"][depth][number[depth]] for depth in range(tree.depth + 1)], dim=1)
    judged = noise[:, len(tree) : -1]
    rest = (torch.cat(drafts, dim=1), judged, noise[:, -1])
    for limit in range(tree.depth + 1):
        limits = torch.full((n,), limit)
        tokens, path, accepted = accept_path_or_resample(tree, p, proposals, *rest, limits)
        assert accepted.max() == limit
        before = torch.zeros(n, dtype=torch.long)
        for j in range(limit + 1):
            reached = accepted >= j
            for number_before in before[reached].unique().tolist():
                rows = reached & (before == number_before)
                if rows.sum() > 500:
                    counts = torch.bincount(tokens[rows, j], minlength=vocab)
                    assert chi_square(counts, tables["p"][j][number_before]) < 5
            before = before * vocab + tokens[:, j]
        some = accepted > 0
        chosen = torch.cat(drafts, dim=1).gather(1, path[:, 1:2].clamp(min=1) - 1)[:, 0]
        assert torch.equal(chosen[some], tokens[some, 0])
    p, q = ([Fraction(v) for v in tables[name][0][0].tolist()] for name in "pq")
    expected = [float(rule(p, [v / sum(q) for v in q], w)[1]) for w in (widths[0], 1)]
    share = (accepted >= 1).double().mean()
    assert abs(share - expected[0]) < 0.007 < 0.01 < expected[0] - expected[1]
