"""Numbers of different evaluation texts are never averaged, tested or ranked together; the bytes of
context of each model, and the sampling error of the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sweeps.report.collect import TEXT
from sweeps.report.comparable import by_text, contexts, error_of_text, refusal, text_errors
from sweeps.report.compare import OTHER_DATA, Comparison, compare
from sweeps.report.findings import answer
from sweeps.report.metrics import BITS_ERROR, SPEEDUP
from sweeps.report.names import sentence
from sweeps.report.settings import Settings
from sweeps.report.tables import of_settings
from tests.sweeps.fixture_runs import on_text, trained_on, write_run
from tests.sweeps.reported import (
    answer_of,
    cells,
    csv_rows,
    drawings,
    notes_of,
    page_of,
    settings_of,
    table_of,
)

A, B = "a1" * 16, "b2" * 16
NO_ENTRY: dict[str, Any] = {"evaluation": None}  # removes the entry


def sweep(folder: Path, texts: dict[int, Any], *, seeds: int = 3) -> Settings:
    """Depths of clearly different losses. ``texts`` has for each the fingerprint of its text, None
    for an unknown part, NO_ENTRY for a run without the entry, or one of these per seed."""
    for depth, texts_of_seeds in texts.items():
        for seed in range(seeds):
            text = texts_of_seeds[seed] if isinstance(texts_of_seeds, tuple) else texts_of_seeds
            config = {"mtp.depth": depth, "seed": seed}
            loss = 2.0 - 0.1 * depth + 0.01 * seed + 0.0001 * (depth + 1) ** seed
            summary = {"flops": 1e9 * (1 + depth) + seed, SPEEDUP: 1 + 0.1 * depth}
            summary |= text if text is NO_ENTRY else on_text(text, bytes=1_000_000 + depth)
            write_run(folder / f"d{depth}_s{seed}", config, loss=loss, summary=summary)
    return settings_of(folder)


def compared(settings: Settings, folder: Path) -> tuple[list[Comparison], str, str]:
    """The comparisons, the answer and the notes."""
    return compare(settings), answer_of(settings), notes_of(folder)


def test_runs_on_one_text_are_compared_without_a_note(tmp_path: Path) -> None:
    """Their bytes may differ a little, since a document mask may skip some."""
    settings = sweep(tmp_path, {0: A, 1: A})
    (comparison,), text, notes = compared(settings, tmp_path)
    assert comparison.verdict == "beyond noise" and comparison.result is not None
    assert "D = 1 has the lowest validation loss for the next token" in text
    assert refusal(settings.all) == "" and "text" not in notes + text
    assert settings.varied == ["mtp.depth"]


def test_two_texts_are_not_compared(tmp_path: Path) -> None:
    sweep_settings = sweep(tmp_path, {0: A, 1: B, 2: A})
    comparisons, text, notes = compared(sweep_settings, tmp_path)
    assert [c.verdict for c in comparisons] == [OTHER_DATA, "beyond noise"]
    refused, tested = comparisons
    assert refused.result is None and refused.adjusted is None and not refused.differs
    assert tested.adjusted == tested.result.p, "Holm's correction counts one test"
    chosen = compare(sweep_settings, reference="mtp.depth=1")
    assert [c.verdict for c in chosen] == [OTHER_DATA] * 2
    assert [row["evaluated_text"] for row in csv_rows(tmp_path)] == [A] * 3 + [B] * 3 + [A] * 3
    assert "D = 1 is better" not in text and "is better than D = 0" in text
    assert "Of those on evaluation data a1a1a1a1: " in text
    assert "D = 2 has the lowest validation loss for the next token: 1.8" in text
    assert "as fast as plain decoding with D = 2" in text
    assert "data a1a1a1a1 (1,000,000 to 1,000,002 bytes): D = 0; D = 2" in text
    assert "data b2b2b2b2 (1,000,001 bytes): D = 1" in text and "a1a1a1a1" not in notes
    assert sentence("remedy") in text and "data.eval_bytes" in text


def test_no_setting_is_best_and_the_page_says_why_if_every_text_differs(tmp_path: Path) -> None:
    settings = sweep(tmp_path, {0: A, 1: B})
    comparisons, text, _ = compared(settings, tmp_path)
    assert [c.verdict for c in comparisons] == [OTHER_DATA]
    for word in ("lowest", "fastest", "better", "No difference can be tested", "noise"):
        assert word not in text
    assert "is averaged, tested or ranked across them" in text
    figures = drawings(settings, compare(settings))
    for name in ("pareto_flops", "speedup"):
        assert figures[name].chart is None and "different evaluation data" in figures[name].why
    why = "no setting has the same evaluation data as its reference"
    assert figures["differences"].why == why
    end = "different evaluation data: compare none across these."
    for name in ("loss_tokens", "loss_flops", "loss_depth"):
        assert figures[name].chart is not None and figures[name].caption.endswith(end)
    html = page_of(tmp_path)
    assert html.count("on data a1a1a1a1 (1,000,000 bytes): D = 0 | data b2b2b2b2") == 1
    captions = [table_of(html, t).split("</caption>")[0] for t in ("settings", "differences")]
    assert [end in caption for caption in captions] == [True, False], "its rows say it"
    assert OTHER_DATA in html and "beyond noise" not in html.split("How this is computed")[0]


def test_seeds_of_two_texts_have_no_common_mean(tmp_path: Path) -> None:
    settings = sweep(tmp_path, {0: A, 1: (A, A, B)})
    assert settings.varied == ["mtp.depth", TEXT]
    assert [(s.label, [run.seed for run in s.done]) for s in settings.all] == [
        (f"mtp.depth=0, {TEXT}=a1a1a1a1", [0, 1, 2]),
        (f"mtp.depth=1, {TEXT}=a1a1a1a1", [0, 1]),
        (f"mtp.depth=1, {TEXT}=b2b2b2b2", [2]),
    ]
    # The part on the text of depth 0 is compared with it.
    comparisons, text, _ = compared(settings, tmp_path)
    verdicts = {c.setting.label.split("=")[-1]: c.verdict for c in comparisons}
    assert verdicts == {"a1a1a1a1": "beyond noise", "b2b2b2b2": OTHER_DATA}
    assert f"data b2b2b2b2 (1,000,001 bytes): D = 1, {TEXT}=b2b2b2b2" in text


def test_digests_with_equal_beginnings_are_two_texts(tmp_path: Path) -> None:
    settings = sweep(tmp_path, {1: (A, A, A[:8] + 24 * "0")})
    assert sorted(len(s.done) for s in settings.all) == [1, 2]
    assert len(by_text(settings.all)) == 2


def test_an_unfinished_run_joins_the_only_text_of_its_setting(tmp_path: Path) -> None:
    write_run(tmp_path / "late", {"mtp.depth": 1, "seed": 7}, done=False)
    settings = sweep(tmp_path, {1: A})
    assert [(len(s.runs), len(s.done)) for s in settings.all] == [(4, 3)]
    assert [len(s.done) for s in sweep(tmp_path / "two", {1: (A, B)}, seeds=2).all] == [1, 1]
    write_run(tmp_path / "two" / "late", {"mtp.depth": 1, "seed": 7}, done=False)
    write_run(tmp_path / "two" / "other", {"mtp.depth": 2}, summary=on_text(A))
    write_run(tmp_path / "two" / "later", {"mtp.depth": 2, "seed": 7}, done=False)
    three = settings_of(tmp_path / "two")
    assert [(s.label, len(s.runs), len(s.done)) for s in three.all] == [
        (f"mtp.depth=1, {TEXT}=a1a1a1a1", 1, 1),
        (f"mtp.depth=1, {TEXT}=b2b2b2b2", 1, 1),
        (f"mtp.depth=1, {TEXT}=unknown", 1, 0),
        (f"mtp.depth=2, {TEXT}=a1a1a1a1", 2, 1),
    ]


def test_unknown_parts_of_a_text_are_not_compared(tmp_path: Path) -> None:
    """Two settings may have evaluated different parts; seeds of one setting evaluate the same."""
    settings = sweep(tmp_path, {0: None, 1: None})
    assert [len(s.done) for s in settings.all] == [3, 3]
    (comparison,), text, _ = compared(settings, tmp_path)
    assert comparison.verdict == OTHER_DATA and "lowest" not in text
    part = "unknown data, or a part that each has for itself (1,000,000 to 1,000,001"
    assert f"{part} bytes): D = 0; D = 1" in text
    # Other counts of bytes in one setting mean another part.
    write_run(tmp_path / "more", {"seed": 3, "mtp.depth": 1}, summary=on_text(None, bytes=5))
    parts = settings_of(tmp_path).all
    assert [len(s.done) for s in parts if s.depth == 1] == [3, 1]


def test_runs_without_the_entry_of_a_text_are_not_compared(tmp_path: Path) -> None:
    settings = sweep(tmp_path, {0: NO_ENTRY, 1: A, 2: NO_ENTRY})
    comparisons, text, _ = compared(settings, tmp_path)
    assert [c.verdict for c in comparisons] == [OTHER_DATA] * 2
    assert "unknown data, or a part that each has for itself: D = 0; D = 2" in text
    mixed = sweep(tmp_path / "mixed", {1: (NO_ENTRY, A, None)})
    names = ["a1a1a1a1", "unknown", "unknown (1,000,001 bytes)"]
    assert [s.values[TEXT] for s in mixed.all] == names


@pytest.mark.parametrize("entry", [[], "x", {"fingerprint": 7, "bytes": "many"}, {}])
def test_a_malformed_entry_is_an_unknown_text(tmp_path: Path, entry: Any) -> None:
    write_run(tmp_path / "a", {"mtp.depth": 0}, summary={"evaluation": entry})
    write_run(tmp_path / "b", {"mtp.depth": 1}, summary=on_text(A))
    settings = settings_of(tmp_path)
    assert [c.verdict for c in compare(settings)] == [OTHER_DATA]


# Bytes of context of each model.


def tokenized(name: str, rate: float | None = None) -> dict[str, Any]:
    """The data of a run: its tokenizer, and bytes per token of the validation split."""
    return trained_on(name, name, **({} if rate is None else {"val": {"bytes_per_token": rate}}))


def contexts_of(folder: Path, *runs: tuple[str, int, dict[str, Any]]) -> list[str]:
    """The sentences about the contexts of runs with these tokenizers, windows and summaries."""
    for kind, seq_len, summary in runs:
        config = {"tokenizer.kind": kind, "data.seq_len": seq_len}
        write_run(folder / f"{kind}_{seq_len}", config, summary=summary)
    return contexts(settings_of(folder).all)


def test_equal_windows_of_tokens_are_unequal_in_bytes(tmp_path: Path) -> None:
    """256 x 1 byte against 256 x 3.9 bytes, by the rate of the evaluated text, not of the split."""
    text = on_text("a" * 32, bytes=3_900, tokens=1_000)
    notes = contexts_of(
        tmp_path,
        ("byte", 256, {**tokenized("t", 9.0), **on_text("a" * 32, bytes=3_900, tokens=3_900)}),
        ("bpe", 256, {**tokenized("u", 9.0), **text}),
    )
    assert len(notes) == 1 and notes[0].startswith("The context is not equal")
    assert "256 tokens x 1.00 bytes = 256 bytes with tokenizer.kind=byte" in notes[0]
    assert "256 tokens x 3.90 bytes = 998 bytes with tokenizer.kind=bpe" in notes[0]
    assert page_of(tmp_path).count("The context is not equal") == 3  # notes and both tables


BYTE, BPE, TWICE = tokenized("t", 1.0), tokenized("u", 4.0), tokenized("t", 2.0)
CONTEXTS = {
    "equal bytes": (
        [("byte", 1000, BYTE), ("bpe", 256, BPE)],
        ("The context is equal in bytes, within 5 %", "= 1,000 bytes", "= 1,024 bytes"),
    ),
    "5.6 % less": ([("byte", 970, BYTE), ("bpe", 256, BPE)], ("The context is not equal",)),
    "one tokenizer": ([("byte", 128, TWICE)], ()),
    "two windows": (
        [("byte", 128, TWICE), ("byte", 256, TWICE)],
        ("The context is not equal", "128 tokens x 2.00 bytes = 256 bytes"),
    ),
    "nobody knows": (
        [("byte", 128, BYTE), ("bpe", 128, tokenized("u"))],
        ("Whether the context is equal in bytes is unknown", "128 tokens x unknown bytes"),
    ),
    "not compared": (
        [("byte", 128, {**BYTE, **on_text(A)}), ("bpe", 128, {**BPE, **on_text(B)})],
        (),
    ),
}


@pytest.mark.parametrize("case", CONTEXTS)
def test_notes_on_contexts_compare_windows_in_bytes(tmp_path: Path, case: str) -> None:
    runs, parts = CONTEXTS[case]
    notes = contexts_of(tmp_path, *runs)
    assert len(notes) == bool(parts)
    for note in notes:
        assert note.startswith(parts[0]) and all(part in note for part in parts)


# The sampling error of the text, which is not the interval over seeds.


NOT_A_DIFFERENCE = "it is not the error of a difference between runs on the same text"


def with_errors(folder: Path, errors: dict[int, tuple[float | None, ...]], **more: Any) -> Path:
    """Runs of some depths; ``errors`` has the error of the text for each depth and seed."""
    for depth, values in errors.items():
        for seed, error in enumerate(values):
            config, loss = {"mtp.depth": depth, "seed": seed}, 2.0 - 0.1 * depth + 0.02 * seed
            summary = {BITS_ERROR: error, **on_text("a" * 32), **more}
            write_run(folder / f"d{depth}_s{seed}", config, loss=loss, summary=summary)
    return folder


def test_the_error_of_a_text_is_the_mean_over_seeds(tmp_path: Path) -> None:
    folder = with_errors(tmp_path, {0: (0.010, 0.012), 1: (0.02, 0.02), 2: (0.5, None)})
    settings = settings_of(folder)
    assert [error_of_text(s) for s in settings.all] == [pytest.approx(0.011), 0.02, None]
    text = text_errors(settings.all)
    assert "The text's own error in bits per byte is 0.0110 to 0.0200" in text
    assert NOT_A_DIFFERENCE in text


def test_the_table_has_the_interval_and_the_error_of_the_text(tmp_path: Path) -> None:
    html = page_of(with_errors(tmp_path, {0: (0.0101, 0.0121), 1: (0.02, 0.02)}))
    cells_with_error = [(c.text, c.half, c.beside) for c in cells(tmp_path) if c.beside]
    # 1.0 and 1.01 bits: the interval over seeds is t(1) x 0.005.
    assert cells_with_error == [
        ("1.0050", "± 0.0635", "text: s.e. 0.0111"),
        ("0.9550", "± 0.0635", "text: s.e. 0.0200"),
    ]
    assert html.count("text: s.e.") == 2
    assert NOT_A_DIFFERENCE in table_of(html, "settings").split("</caption>")[0]
    assert "text: s.e." not in table_of(html, "differences")
    with_errors(tmp_path / "none", {0: (None, None)})
    assert not any(cell.beside for cell in cells(tmp_path / "none"))
    head = of_settings(settings_of(tmp_path / "none"), []).head
    assert "bits per byte" not in [unit for _, unit in head]


def test_the_answer_in_bits_has_the_error_of_the_text(tmp_path: Path) -> None:
    with_errors(tmp_path, {0: (0.01, 0.01)})
    with_errors(tmp_path, {3: (0.02, 0.02)}, **trained_on("e", "u"))
    settings = settings_of(tmp_path)
    (best,) = [text for text in answer(settings, compare(settings)) if "has the lowest" in text]
    assert best.endswith("interval over 2 seeds); the text's own standard error is 0.0200.")
