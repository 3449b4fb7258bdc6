"""``draft_depth=auto``: the number of drafts that pays is measured once, stored, and then used."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_modules.seal import seal
from mtp_lightning.decoding import generate, paying
from mtp_lightning.decoding.adaptive import AutoDepth, Measured, Payoff, fastest
from mtp_lightning.decoding.engine import Engine
from mtp_lightning.decoding.options import DecodingOptions, Request
from mtp_lightning.decoding.paying import description, measure, with_measured_depth
from mtp_lightning.decoding.speculative import Decoder
from mtp_lightning.experiment.generating import decoding_options
from mtp_lightning.opening import OpenedModel
from tests.decoding.models import opened_model, random_prompts, run_to_end, small_model
from tests.integration.helpers import composed
from tests.models import checkpoint_of

SHARE = st.floats(0, 1)


@given(st.lists(SHARE, max_size=4), st.data())
def test_the_payoff_is_that_of_all_outcomes(accepted: list[float], data: st.DataObject) -> None:
    """The reference is the mean over every pattern of right and wrong drafts."""
    costs = [1.0, *(data.draw(st.floats(1, 5)) for _ in accepted)]
    payoff = Payoff(tuple(costs), tuple(accepted))
    for m, cost in enumerate(costs):
        mean = 0.0
        for right in itertools.product((True, False), repeat=m):
            chance = 1.0
            for r, a in zip(right, accepted, strict=False):
                chance *= a if r else 1 - a
            mean += chance * (1 + next((i for i, r in enumerate(right) if not r), m))
        assert payoff.gains()[m] == pytest.approx(mean / cost)
    best = payoff.best
    assert best == 0 or payoff.gains()[best] == max(payoff.gains()) >= 1.1
    assert best > 0 or max(payoff.gains()) < 1.1


def test_the_fastest_number_needs_a_margin() -> None:
    assert fastest([1.0, 1.02], 1.03) == 0 and fastest([1.0, 1.04, 1.05], 1.03) == 2
    assert fastest([1.0, 1.04, 1.05], 1.1) == 0
    # A small measured gain is left to probes, which come later.
    auto = AutoDepth(1, measured=Payoff((1.0, 1.0), (0.06,)))
    assert [auto.depth(1) for _ in range(9)] == [0] * 9


@pytest.mark.parametrize("threads", [1, 2])
def test_waiting_counts_for_several_threads_alone(threads: int, monkeypatch) -> None:
    """One thread waits only for other programs, whose time is not a round's."""
    seconds: list[float] = []
    whole_round = Decoder.round

    def waiting(self: Decoder, *arguments: Any) -> Any:
        time.sleep(0.2)
        return whole_round(self, *arguments)

    monkeypatch.setattr(Decoder, "round", waiting)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(AutoDepth, "record", lambda self, m, took, *_: seconds.append(took))
    generate(small_model(1, 1), random_prompts(1, (3,)), draft_depth="auto", max_new_tokens=3)
    assert seconds and all((took > 0.2) == (threads > 1) for took in seconds)


def test_a_probe_waits_for_a_round_that_it_fits_into() -> None:
    auto = AutoDepth(8)
    for _ in range(256):
        assert auto.depth(1, 4) == 0
        auto.record(0, 1.0, [0], [0])
    for _ in range(3):  # the probe of eight drafts does not fit
        assert auto.depth(1, 4) == 0
        auto.record(0, 1.0, [0], [0])
    assert auto.depth(1, 8) == auto.depth(1) == 8


def test_auto_depth_begins_with_the_measured_number() -> None:
    auto = AutoDepth(2, measured=Payoff((1.0, 1.1, 1.5), (0.6, 0.2)))
    assert auto.depth(1) == 1
    for _ in range(60):  # the drafts of this text are worse than those of the measurement
        m = auto.depth(1)
        auto.record(m, (1.0, 1.1, 1.5)[m], [0], [min(m, 1)])
    assert auto.best == 0


def opened_at(folder: Path, seed: int = 1) -> OpenedModel:
    opened = opened_model(seed, seq_len=64, path=folder / f"{seed}.ckpt")
    torch.save(checkpoint_of(opened.model), opened.path)
    return opened


@pytest.fixture
def measured_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The list that gets each measured model; the cache is an empty folder."""
    monkeypatch.setenv("MTP_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(paying, "_SECONDS", 0.0)
    measured: list[Any] = []
    real = paying.measure

    def recorded(model: Any, *args: Any) -> Measured:
        measured.append(model)
        return real(model, *args)

    monkeypatch.setattr(paying, "measure", recorded)
    return measured


def test_a_model_is_measured_once_per_setting(
    measured_models: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, options = opened_at(tmp_path), DecodingOptions(max_context=64)
    first = with_measured_depth(options, opened, rows=1, precision="fp32")
    measured = first.measured
    assert measured is not None
    assert first == replace(options, draft_depth="auto", measured=measured)
    for payoff in (measured.greedy, measured.sampled):
        assert payoff.costs[0] == 1 and min(payoff.costs) >= 1 and len(payoff.accepted) == 2
    again = with_measured_depth(
        replace(options, draft_depth="auto"), opened, rows=1, precision="fp32"
    )
    assert again == first and len(measured_models) == 1
    # A setting that changes the speed has its own measurement.
    for number, (changed, more) in enumerate(
        [
            (options, {"rows": 4, "precision": "fp32"}),
            (options, {"rows": 1, "precision": "int8"}),
            (replace(options, draft_vocab=9), {"rows": 1, "precision": "fp32"}),
        ],
        start=2,
    ):
        with_measured_depth(changed, opened, **more)  # type: ignore[arg-type]
        assert len(measured_models) == number
    os.utime(opened.path, (1, 1))  # another file at the same path
    with_measured_depth(options, opened, rows=1, precision="fp32")
    assert len(measured_models) == 5
    monkeypatch.setattr(paying, "version", lambda device: f"faster code for {device}")
    with_measured_depth(options, opened, rows=1, precision="fp32")
    assert len(measured_models) == 6


ANOTHER_VERSION = ('{"greedy": []}', '{"greedy": {"costs": [1]}}', "{}")


@pytest.mark.parametrize("damage", ["measured.json", "digests.json", *ANOTHER_VERSION])
def test_a_measurement_that_is_damaged_or_of_another_version_is_made_again(
    damage: str, measured_models: list[Any], tmp_path: Path
) -> None:
    opened, options = opened_at(tmp_path), DecodingOptions()
    assert with_measured_depth(options, opened, rows=1).measured is not None
    (folder,) = (tmp_path / "cache").glob("drafts/*")
    if damage in ANOTHER_VERSION:
        (folder / "measured.json").write_text(damage)
        (folder / "digests.json").unlink()
        seal(folder)
    else:
        (folder / damage).write_text((folder / damage).read_text().replace("e", "E"))
    for _ in range(2):  # the second finds what the first has stored
        assert with_measured_depth(options, opened, rows=1).measured is not None
    assert len(measured_models) == 2


def test_an_error_during_the_measurement_is_raised_and_not_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fails(*_: Any, **__: Any) -> Any:
        calls.append(1)
        raise ValueError("no memory")

    monkeypatch.setenv("MTP_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(paying, "measure", fails)
    with pytest.raises(ValueError, match="no memory"):
        with_measured_depth(DecodingOptions(), opened_at(tmp_path), rows=1)
    assert len(calls) == 1


def test_draft_vocab_defaults_to_that_of_the_modules_training(
    measured_models: list[Any], tmp_path: Path
) -> None:
    opened = opened_at(tmp_path)
    trained = replace(opened, run_config={**opened.run_config, "objective": {"draft_vocab": 64}})
    strided = small_model(1, 2, vocab=257, stack="linear", stride=2)  # does not draft
    for run, overrides, expected in (
        (opened, {}, None),
        (trained, {}, 64),
        (trained, {"draft_vocab": 257}, 257),
        (trained, {"speculative": False}, None),
        (trained, {"compile": True}, None),
        (replace(trained, model=strided), {}, None),
    ):
        words = [f"{name}={value}".lower() for name, value in overrides.items()]
        cfg = composed("generate", ["checkpoint=mine", *words])
        options = decoding_options(cfg, run)
        assert options.draft_vocab == expected
        assert generate(run.model, [[1]], options, max_new_tokens=1)


def test_a_number_of_drafts_in_the_options_is_not_measured(
    measured_models: list[Any], tmp_path: Path
) -> None:
    opened = opened_at(tmp_path)
    for options in (
        DecodingOptions(draft_depth=2),
        DecodingOptions(speculative=False),
        DecodingOptions(tree=[2, 1]),  # type: ignore[arg-type]
        DecodingOptions(compile=True),
    ):
        assert with_measured_depth(options, opened, rows=1) is options
    plain = replace(opened, model=small_model(1, 0, vocab=257))
    assert with_measured_depth(DecodingOptions(), plain, rows=1) == DecodingOptions()
    assert not measured_models


def test_without_a_writable_cache_every_run_measures(
    measured_models: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MTP_LIGHTNING_CACHE", str(tmp_path / "file" / "below"))
    opened = opened_at(tmp_path)
    for _ in range(2):
        assert with_measured_depth(DecodingOptions(), opened, rows=1).measured is not None
    assert len(measured_models) == 2


def test_every_number_of_drafts_is_timed_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paying, "_SECONDS", 0.0)
    made: list[paying._Turns] = []
    real = paying._Turns.__init__

    def init(self: paying._Turns, max_draft: int) -> None:
        real(self, max_draft)
        made.append(self)

    monkeypatch.setattr(paying._Turns, "__init__", init)
    options = DecodingOptions(draft_depth="auto", batch_size=3, max_context=20)
    measured = measure(small_model(2, 2), options, random_prompts(2, (3, 5)))
    assert [turns.payoff() for turns in made] == [measured.sampled, measured.greedy]
    for turns in made:
        assert [len(times) for times in turns._times] == [paying._LEAST] * 3
        (_, first), (_, second) = turns._counts
        assert first > second >= 0  # a draft is judged only after a right one


def test_the_first_round_of_a_turn_which_catches_up_is_not_timed() -> None:
    turns = paying._Turns(1)
    for n in range(40):
        m = turns.depth(1)
        turns.record(m, 1.0 + m if n % 2 else 9.0, [0], [m])
    assert turns.payoff() == Payoff(costs=(1.0, 2.0), accepted=(0.0,))


@pytest.mark.parametrize("max_context", [2, 4, 8])
def test_drafts_beyond_a_short_window_are_not_measured(
    max_context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paying, "_SECONDS", 0.0)
    options = DecodingOptions(draft_depth="auto", batch_size=1, max_context=max_context)
    measured = measure(small_model(2, 3), options, [[0]])  # three drafts never fit
    for payoff in (measured.greedy, measured.sampled):
        assert len(payoff.costs) == 4 and len(payoff.accepted) == 3
        assert payoff.accepted[2] == 0 and payoff.best < 3


MEASURED = Measured(
    greedy=Payoff((1.0, 1.0, 1.0), (0.9, 0.9)), sampled=Payoff((1.0, 1.0, 9.0), (0.9, 0.9))
)


def test_samples_use_the_measured_number_of_drafts_among_other_texts() -> None:
    """Samples depend on their seed and the measurement, and not on the clock."""
    model, prompts = small_model(3, 2), random_prompts(3, (4, 6, 3, 5))
    assert (MEASURED.greedy.best, MEASURED.sampled.best) == (2, 1)
    options = DecodingOptions(draft_depth="auto", measured=MEASURED, batch_size=4)

    def text(with_others: bool) -> list[int]:
        sampled = Request(prompt=prompts[0], max_new_tokens=30, temperature=1.0, seed=5)
        others = [
            Request(prompt=prompts[1], max_new_tokens=20),
            Request(prompt=prompts[2], max_new_tokens=9, draft_depth=0),
            Request(prompt=prompts[3], max_new_tokens=40, temperature=0.7, draft_depth=2),
        ]
        with Engine(model, options) as engine:
            (sequence, *_) = run_to_end(engine, [sampled, *(others if with_others else [])])
        assert sequence.generation().drafts_reached[1:] in ([0], [])
        return sequence.generation().token_ids

    assert text(False) == text(True)


@pytest.mark.parametrize("lookup", [0, 3])
def test_a_sample_depends_only_on_its_number_of_drafts(lookup: int) -> None:
    """The engine's largest number of drafts, and where the number comes from, do not count."""
    model, (prompt,) = small_model(3, 2), random_prompts(3, (4,))
    sampling: dict[str, Any] = {"max_new_tokens": 30, "temperature": 1.0, "seed": 5}
    shared: dict[str, Any] = {"lookup": lookup, "batch_size": 1}
    engines = [
        DecodingOptions(draft_depth=d, measured=MEASURED if d == "auto" else None, **shared)
        for d in ("auto", 1, 2)
    ]
    for drafts in (0, 1, 2, None):
        depth = drafts or (MEASURED.sampled.best if drafts is None else None)
        options = {"draft_depth": depth, "speculative": depth is not None, "lookup": lookup}
        (expected,) = generate(model, [prompt], **sampling, **options)
        able = [engine for engine in engines if engine.max_draft(model) >= (depth or 0)]
        request = Request(prompt=prompt, draft_depth=drafts, **sampling)
        for decoding in able[:1] if drafts is None else able:
            with Engine(model, decoding) as engine:
                (text,) = run_to_end(engine, [request])
            assert text.token_ids == expected.token_ids, (drafts, decoding.draft_depth)


def test_requests_with_their_number_of_drafts_have_the_same_greedy_text() -> None:
    model, prompts = small_model(4, 2), random_prompts(4, (4, 6, 3))
    options = DecodingOptions(draft_depth="auto", measured=MEASURED, batch_size=3)
    plain = generate(model, prompts, max_new_tokens=40, speculative=False)
    requests = [
        Request(prompt=p, index=i, max_new_tokens=40, draft_depth=depth)
        for i, (p, depth) in enumerate(zip(prompts, (None, 0, 1), strict=True))
    ]
    with Engine(model, options) as engine:
        texts = run_to_end(engine, requests)
    assert [text.token_ids for text in texts] == [text.token_ids for text in plain]
    reached = [text.generation().drafts_reached for text in texts]
    assert sum(reached[1]) == 0 and sum(reached[2][1:]) == 0 and reached[2][0] > 0


def test_the_description_names_the_numbers_of_drafts_and_their_speed() -> None:
    slow = Payoff((1.0, 2.0, 3.0), (0.5, 0.0))
    assert description(Measured(greedy=MEASURED.greedy, sampled=slow)) == (
        "Measured once, for this machine: 2 drafts per pass (2.71 x plain) for greedy text, "
        "no draft (one would give 0.75 x plain) for samples; drafts that gain less than 10% are "
        "not used at first. draft_depth=N sets another number."
    )
    assert not Measured(greedy=slow, sampled=slow).pays
    assert Measured(greedy=Payoff((1.0, 1.4), (0.41,)), sampled=slow).pays
