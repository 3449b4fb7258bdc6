"""The tables that a run and evaluate.py print at the end."""

from __future__ import annotations

import pytest

from mtp_lightning.run.summary import print_answer, print_paths, print_summary


@pytest.mark.parametrize("columns", ["80", "120"])
@pytest.mark.parametrize("expected", [{}, {"decode/expected_tokens_per_step": 2.1}])
def test_acceptance_is_shown_with_its_interval_and_setting(monkeypatch, capsys, columns, expected):
    monkeypatch.setenv("COLUMNS", columns)
    rates = {f"val/{name}_depth_{k}": 0.5 for name in ("loss", "accuracy") for k in (0, 1)}
    rates |= {f"val/{name}_depth_1": 0.4 for name in ("agreement", "overlap")}
    accepted = {"": 0.5843, "_low": 0.55, "_high": 0.6168}
    rates["val/loss_depth_0"] = 3.6382
    steps = {"": 1.98, "_low": 1.9, "_high": 2.05}
    print_summary(
        {
            **rates,
            **{f"decode/acceptance_position_1{end}": value for end, value in accepted.items()},
            **{f"decode/tokens_per_step{end}": value for end, value in steps.items()},
            "decode/n_prompts": 64.0,
            "decode/new_tokens": 64.0,
            "decode/agreement_position_1": 0.5,
            **expected,
        },
        depth=1,
    )
    shown = capsys.readouterr().out
    assert "1.98 [1.90, 2.05]" in shown
    assert "[55.0, 61.7]" in shown and (expected or "58.4% [55.0, 61.7]" in shown)
    assert "64 prompts x 64 tokens, greedy" in shown
    assert "agreement: " in shown and "overlap: " in shown
    assert "…" not in shown


def test_shared_lines_are_shown_of_the_model_s_own_text_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary = {"data": {"val": {"lines_in_training": 0.026}}}
    print_summary(summary, depth=0)
    assert "2.6% of the validation split's long lines" in capsys.readouterr().out
    print_summary(summary, depth=0, own_text=False)
    assert "long lines" not in capsys.readouterr().out


def test_one_prompt_has_no_interval(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary({"decode/acceptance_position_1": 0.5, "decode/tokens_per_step": 1.5}, depth=1)
    shown = capsys.readouterr().out
    assert "50.0%" in shown and "1.50" in shown and "[" not in shown
    print_answer({"decode/tokens_per_step": 1.5})
    assert "1.50 │ 1 without drafts" in capsys.readouterr().out


def test_the_reason_for_no_decoding_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary({"not_decoded": "too short"}, depth=1)
    assert "accepted: nothing was decoded, too short" in " ".join(capsys.readouterr().out.split())


def test_the_short_table_of_a_text_has_five_rows(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    of_text = {
        **{"val/bits_per_byte": 1.5279, "val/loss_depth_0": 2.9, "parameters": 9},
        **{"decode/tokens_per_step": 1.98, "decode/speedup": 1.03},
        **{"decode/tokens_per_step_low": 1.9, "decode/tokens_per_step_high": 2.05},
        **{"perf/tokens_per_second": 7654.3, "seconds": 540.0},
    }
    print_answer(of_text)
    output = capsys.readouterr().out
    rows = [line for line in output.splitlines() if line.startswith("│")]
    assert len(rows) == 5 and max(map(len, rows)) <= 80
    for words in ("1.528", "lower is better", "1.98 [1.90, 2.05]", "1.03", "7,654", "9.0 min"):
        assert words in output
    assert "│ 95 % interval; 1 without drafts" in output
    assert "--verbose" in output and "summary.json" in output
    print_answer({"val/exact_match": 0.5, "val/chance": 0.0625, "seconds": 30.0})
    output = capsys.readouterr().out
    assert "50.0%" in output and "chance 6.25%" in output and "bits per byte" not in output
    assert "30.0 s │" in output
    hidden = {"val/excess_loss": 0.0398, "val/belief_r2": 0.9681}
    print_answer({"val/exact_match": 1.0, "val/chance": 1.0, **hidden})
    output = capsys.readouterr().out
    assert "right answers" not in output, "every answer is right"
    assert "0.0398" in output and "0.968" in output


def test_tensorboard_is_named_only_where_it_has_events(tmp_path, capsys):
    print_paths(tmp_path, writes=True)
    assert "charts" not in capsys.readouterr().out
    (tmp_path / "events.out.tfevents.1.host").touch()
    print_paths(tmp_path, writes=True)
    assert f"charts        tensorboard --logdir {tmp_path}" in capsys.readouterr().out


def test_the_command_for_text_allows_the_packages_that_the_model_needs(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    print_paths(tmp_path, writes=True)
    assert f"checkpoint={tmp_path} prompt='...'" in capsys.readouterr().out
    print_paths(tmp_path, writes=True, allow=["mine", "yours"])
    assert f"checkpoint={tmp_path} 'allow=[mine,yours]' prompt=" in capsys.readouterr().out
