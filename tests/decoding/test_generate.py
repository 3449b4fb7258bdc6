"""``generate``: ends of texts, counts, types of input, the module's example; ``AutoDepth``."""

from __future__ import annotations

import sys
import textwrap

import numpy as np
import pytest
import torch

from mtp_lightning import opening
from mtp_lightning.decoding import generate
from mtp_lightning.decoding.adaptive import AutoDepth
from mtp_lightning.decoding.options import Request
from tests.decoding.models import (
    Letters,
    opened_model,
    random_prompts,
    small_model,
    steer_drafts,
)


@pytest.fixture
def continued(monkeypatch):
    """A model, a prompt and its greedy continuation, with which 2 in 3 drafts agree."""
    model = small_model(21, 3)
    (prompt,) = random_prompts(21, (5,))
    tokens = generate(model, [prompt], max_new_tokens=60, speculative=False)[0].token_ids
    steer_drafts(monkeypatch, [prompt], [tokens], chance=0.67)
    return model, prompt, tokens


def test_a_stop_string_may_begin_and_end_anywhere_in_a_block(continued):
    model, prompt, tokens = continued
    text = Letters().decode(tokens)
    for speculative in (False, True):
        for start in range(2, 20):
            stop = text[start : start + 3]
            at = text.index(stop)
            (g,) = generate(
                model,
                [prompt],
                max_new_tokens=40,
                stop=["?", stop],
                tokenizer=Letters(),
                speculative=speculative,
                eot_id=-1,
            )
            assert g.text == text[:at] and g.finish_reason == "stop"
            assert g.token_ids == tokens[: at + 3] and len(g.accepted_mask) == at + 3


@pytest.mark.parametrize("ends_by", ["eot", "stop", "length"])
def test_drafts_after_the_end_of_a_text_are_cut_and_not_counted(monkeypatch, ends_by):
    """All drafts are right: each round would emit four tokens, and the last round is cut."""
    model = small_model(21, 3)
    (prompt,) = random_prompts(21, (5,))
    tokens = generate(model, [prompt], max_new_tokens=60, speculative=False)[0].token_ids
    steer_drafts(monkeypatch, [prompt], [tokens], chance=1.0)
    cut = 0
    for n in range(2, 20):
        end = {"max_new_tokens": 40, "eot_id": -1}
        if ends_by == "length":
            end["max_new_tokens"] = n
        elif ends_by == "eot":
            end["eot_id"] = tokens[n - 1]
        else:
            end["stop"] = Letters().decode(tokens[max(n - 4, 0) : n])
        (g,) = generate(model, [prompt], tokenizer=Letters(), **end)
        assert g.finish_reason == ends_by
        assert g.token_ids == tokens[: g.new_tokens] and (ends_by != "length" or g.new_tokens == n)
        ending = {"length": 0, "eot": 1, "stop": len(end.get("stop", ""))}[ends_by]
        assert g.text == Letters().decode(tokens[: g.new_tokens - ending])
        emitted = len(g.token_ids) - 1  # the pass of the prompt gives the first one
        assert g.tokens_per_step * g.verify_passes == pytest.approx(emitted)
        assert sum(g.drafts_accepted) == sum(g.drafts_reached) == sum(g.accepted_mask)
        whole, rest = divmod(emitted, 4)
        assert g.verify_passes == whole + (rest > 0)
        cut += rest > 0
    assert cut > 5


def test_each_end_token_of_the_tokenizer_ends_a_text(continued):
    model, prompt, tokens = continued
    for n in range(1, 20):
        letters = Letters()
        letters.end_ids = (36, tokens[n - 1], tokens[n])
        at = min(map(tokens.index, letters.end_ids[1:]))
        for speculative in (False, True):
            (g,) = generate(
                model, [prompt], max_new_tokens=40, tokenizer=letters, speculative=speculative
            )
            assert g.finish_reason == "eot" and g.token_ids == tokens[: at + 1]
            assert g.text == Letters().decode(tokens[:at])


def test_numbers_of_numpy_and_torch_are_taken_as_whole_numbers():
    model, ids = small_model(0, 2), [3, 1, 4]
    options = {"max_new_tokens": 5, "draft_depth": 2, "seed": 1, "top_k": 3, "batch_size": 1}
    options |= {"lookup": 2}
    expected = generate(model, [ids], temperature=0.5, **options)[0].token_ids
    options = {name: np.int64(value) for name, value in options.items()}
    for prompt in (
        np.array(ids),
        np.array(ids, np.uint16),
        list(map(np.int64, ids)),
        torch.tensor(ids),
    ):
        (g,) = generate(model, [prompt], temperature=0.5, **options)
        assert g.token_ids == expected and Request(prompt=prompt, max_new_tokens=1).prompt == ids
    for wrong in (np.array([0.0, 1.0]), np.array([True]), torch.tensor([True]), [None]):
        with pytest.raises(ValueError, match="Prompt 0 holds .*, not a token id"):
            generate(model, [wrong], max_new_tokens=2)
    with pytest.raises(ValueError, match=r"index must be a whole number, not 0\.5"):
        generate(model, [ids], temperature=0.5, indices=[0.5])
    for one in (ids, np.array(ids), torch.tensor(ids)):
        with pytest.raises(ValueError, match="prompt 3 is not a list of token ids: give a list"):
            generate(model, one, max_new_tokens=2)


def test_the_example_of_the_module_docstring_runs(capsys, monkeypatch):
    monkeypatch.setattr(opening, "open_model", lambda _: opened_model(0, seq_len=64))
    lines = sys.modules[generate.__module__].__doc__.splitlines(keepends=True)
    snippet = textwrap.dedent("".join(line for line in lines if line.startswith("    ")))
    exec(snippet, {"generate": generate})
    assert capsys.readouterr().out


def simulate(
    auto: AutoDepth, costs: list[float], chances: list[float], rounds: int, rows: int = 1
) -> list[int]:
    """The numbers of drafts that ``auto`` chooses if it is given these costs, and a fixed pattern
    of acceptance with these chances."""
    chosen = []
    for r in range(rounds):
        m, a = auto.depth(rows), 0
        while a < m and ((r * 37 + a * 61) % 100) < 100 * chances[a]:
            a += 1
        auto.record(m, costs[m], [a] * rows, [min(a + 1, m)] * rows)
        chosen.append(m)
    return chosen


def test_auto_depth_finds_the_fastest_number_of_drafts():
    costs = [1.0, 1.3, 1.6, 1.9]
    late = simulate(AutoDepth(3), costs, [0.95, 0.95, 0.9], 1000)[-100:]
    assert late.count(3) > 75
    late = simulate(AutoDepth(3), costs, [0.9, 0.1, 0.0], 1000)[-100:]
    assert late.count(1) > 75


@pytest.mark.parametrize("rounds", [64, 256, 2000, 20_000])
def test_auto_depth_costs_little_where_no_draft_is_right(rounds):
    """Three tokens take 3.9 times as long as one, and in each probe the modules first read the
    tokens that were decoded without them."""
    auto, costs = AutoDepth(2), [420.0, 1050.0, 1640.0]
    chosen, seconds, unread = [], 0.0, 40
    for _ in range(rounds):
        m = auto.depth(1)
        took = costs[m] + (unread * 5.0 if m else 0.0)
        unread = 0 if m else min(unread + 1, 1000)
        auto.record(m, took, [0], [min(m, 1)])
        seconds += took
        chosen.append(m)
    assert rounds * costs[0] / seconds > 0.975
    assert chosen[-1] == 0 and (rounds < 2000 or 2 in chosen)


def test_auto_depth_times_plain_passes_again_where_one_seemed_slow():
    auto, costs = AutoDepth(2), [3.0, 3.1, 3.2]  # another program ran during plain rounds
    assert simulate(auto, costs, [0.3, 0.0], 400)[-1] > 0
    late = simulate(auto, [1.0, 1.5, 2.0], [0.3, 0.0], 1500)
    assert late[-1] == 0 and late.count(0) > 750
    never = simulate(AutoDepth(2), [9.0, 1.3, 1.6], [0.0, 0.0], 1000)
    assert never.count(0) > 850  # a plain pass cannot take longer than one with drafts


def test_auto_depth_drafts_again_when_drafts_become_right():
    auto = AutoDepth(2)
    costs = [1.0, 1.2, 1.4]
    simulate(auto, costs, [0.0, 0.0], 90)
    assert auto.depth(1) == 0
    late = simulate(auto, costs, [1.0, 1.0], 2500)
    assert late[-1] == 2


def test_auto_depth_probes_seldom_where_drafting_is_slow():
    """As in rounds of eight rows of the benchmark: three tokens take 3.9 times a plain round."""
    auto, costs = AutoDepth(2), [420.0, 1050.0, 1640.0]
    chosen = simulate(auto, costs, [1.0, 1.0], 3000, rows=8)
    assert 2 in chosen and chosen.count(0) > 2900
    late = simulate(auto, [1640.0, 1640.0, 1640.0], [1.0, 1.0], 5000, rows=8)
    assert late[-1] == 2  # a probe found it


def test_auto_depth_compares_only_times_within_a_probe():
    """Rounds over long texts take longer than over short ones, with drafts and without."""
    auto = AutoDepth(2)
    for _ in range(40):
        for length in (1.0, 1.5, 2.0):
            costs = [420.0 * length, 1050.0 * length, 1640.0 * length]
            assert simulate(auto, costs, [0.9, 0.9], 60, rows=8).count(0) >= 54


def test_auto_depth_drafts_once_a_batch_becomes_small():
    auto = AutoDepth(2)
    many, one = [420.0, 1050.0, 1640.0], [200.0, 250.0, 290.0]
    simulate(auto, many, [0.9, 0.9], 100, rows=8)
    # A shrinking batch soon ends: it keeps the number that was right for many rows.
    for rows in (7, 6, 4, 2):
        assert simulate(auto, many, [0.9, 0.9], 8, rows=rows).count(0) >= 6
    chosen = simulate(auto, one, [0.9, 0.9], 400)
    assert set(chosen[:16]) == {0} and chosen[-1] == 2  # one row that stays is probed
    assert simulate(auto, many, [0.9, 0.9], 50, rows=8).count(0) > 45
    assert simulate(auto, one, [0.9, 0.9], 50).count(2) > 35
