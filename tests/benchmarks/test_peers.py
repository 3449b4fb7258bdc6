"""benchmarks/peers.py compares by medians of turns, with the best of the others."""

from __future__ import annotations

import pytest

from benchmarks import peers


def test_ratio_to_the_best_of_the_others() -> None:
    times = {"ours": [9.0, 1.0, 2.0], "transformers": [4.0, 5.0, 9.0], "litgpt": [3.0, 3.0, 0.1]}
    facts = {"rss_peak": 3e6, "loss": 1.0, "parameters": 2}
    row = peers.compare_steps(
        {n: [{"seconds": x, **facts} for x in own] for n, own in times.items()}
    )
    assert (row["ours_ms"], row["transformers_ms"], row["litgpt_ms"]) == (2000, 5000, 3000)
    assert row["times_the_best"] == 1.5
    assert row["ours_tokens_per_second"] == pytest.approx(8 * 256 / 2)
    assert (row["litgpt_peak_mb"], row["litgpt_parameters"]) == (3, 2)
