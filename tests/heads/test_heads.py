"""Heads for a finished model in one command."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtp_lightning.chat_template import ChatTemplate
from mtp_lightning.command_line.quote import literal
from mtp_lightning.errors import UserError
from mtp_lightning.heads import planning, timing
from mtp_lightning.heads.__main__ import PLAN, RUN, main, make_plan, run_phase
from mtp_lightning.opening import open_model
from mtp_lightning.run.folder import claimed
from tests.heads.conftest import Refused
from tests.integration import helpers
from tests.interop import folders


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk that somebody else could have trained: a Hugging Face folder."""
    base = tmp_path_factory.mktemp("trunk")
    alone = {"mtp": "none", "mtp.depth": 0, "mtp_lambda": 0, "lambda_schedule": "constant"}
    helpers.train_here(base / "run", base / "cache", {**alone, "data.seq_len": 48})
    return folders.export_run(base / "run", base / "hub", verify=False)


def test_the_hours_are_divided(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "_reading_speed", lambda *_, half, **__: 1e9 if half else 1e8)
    monkeypatch.setattr(planning, "pick_accelerator", lambda name: "cpu")
    monkeypatch.setattr(planning, "multiply_integers", lambda model: None)
    monkeypatch.setattr(planning, "writing_speed", lambda run: 1000.0)
    assert timing.other_seconds(135 * 10**6, 80e9) == pytest.approx(505, abs=5)  # SmolLM2
    assert timing.other_seconds(1000, 80e9) == pytest.approx(150, abs=1)
    monkeypatch.setattr(planning, "other_seconds", lambda *_: 0.0)
    one, two = (planning.plan(model, hours=h, files=[], overrides=[]) for h in (1.0, 2.0))
    # 35 of the 48 tokens of a text are new, at 1,000 per second; reading them takes some time, too.
    assert 0.8 < one.texts * 35 / 1000 / (0.45 * 3600) < 1 and one.window == 48
    assert two.steps in (2 * one.steps, 2 * one.steps + 1) and two.texts - 2 * one.texts in (0, 1)
    words = one.train()
    assert f"data.n_prompts={one.texts}" in words and f"trainer.max_steps={one.steps}" in words
    assert "data.prompt_tokens=13" in words and "data.new_tokens=35" in words
    assert "trainer.precision=bf16-mixed" in words and "data.activations=int8" in words
    assert not any(word.startswith("objective.draft_vocab") for word in words)
    assert "optimizer.lr=0.004" in words and one.context == 48
    width = open_model(model).model.config.trunk.d_model
    monkeypatch.setattr(planning, "_WIDTH", width // 4)
    wide = planning.plan(model, hours=1.0, files=[], overrides=[])
    assert "optimizer.lr=0.001" in wide.train(), "a rate of 1 / d_model"
    monkeypatch.setattr(planning, "_VOCAB", 16)  # of 257 tokens
    short = planning.plan(model, hours=1.0, files=[], overrides=[])
    assert "objective.draft_vocab=16" in short.train() and short.texts == one.texts
    assert short.steps > one.steps, "a step takes less"
    assert "on the first 16 tokens alone" in "\n".join(short.lines())
    texts = ["/a b", "/it's ${x}.txt"]
    mine = planning.plan(model, hours=1.0, files=texts, overrides=["optimizer.lr=0.1"])
    two = planning.plan(model, hours=1.0, files=texts, overrides=["mtp.depth=2"])
    assert two.depth == 2 and "2 sequential modules" in "\n".join(two.lines())
    assert two.head_weights > mine.head_weights
    (paths,) = (word for word in mine.train() if word.startswith("data.paths="))
    cfg = helpers.composed("config", literal(["data=text", paths]))
    assert mine.texts == 0 and list(cfg.data.paths) == texts
    assert mine.train()[-1] == "optimizer.lr=0.1"
    with pytest.raises(UserError, match="--hours=1e-06 holds 0 steps") as few:
        planning.plan(model, hours=1e-6, files=[], overrides=[])
    enough = float(str(few.value).rpartition("=")[2].rstrip("."))
    least = planning.plan(model, hours=enough, files=[], overrides=[])
    assert 64 <= least.texts < 75 and least.steps >= 10
    main([str(model), "--dry-run"])
    said = capsys.readouterr().out
    assert "texts that the model writes itself and then reads, about 27 minutes at 1,000" in said
    assert not Path("hub_heads").exists()


def test_the_plan_is_of_the_run_that_is_trained(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_reading_speed", lambda *_, **__: 1e8)
    monkeypatch.setattr(planning, "writing_speed", lambda run: 1000.0)
    monkeypatch.setattr(planning, "other_seconds", lambda *_: 600.0)

    def said(hours: float, *overrides: str) -> str:
        found = planning.plan(model, hours=hours, files=[], overrides=list(overrides))
        return "\n".join(found.lines())

    numbers = ["data.n_prompts=500", "trainer.max_steps=2000", "data.batch_size=4"]
    told = said(1.0, *numbers, "data.seq_len=24", "optimizer.lr=0.3", "data.activations=fp32")
    assert "500 texts that" in told and "2,000 steps of 96 tokens" in told
    assert "at a rate of 0.3" in told and "with activations=fp32" in told
    assert "about 15 minutes in all" in told and "with 10 minutes for" in told
    assert "one parallel module of" in said(1.0, "mtp=parallel")
    assert "2 parallel modules of" in said(1.0, "mtp=parallel", "mtp.depth=2")
    with pytest.raises(UserError, match="mtp.depth=0"):
        said(1.0, "mtp.depth=0")
    with pytest.raises(UserError, match="data.seq_len must be a whole"):
        said(1.0, "data.seq_len=none")
    # The other phases take ten minutes: they leave 50 of an hour, and half of five.
    assert "about 22 minutes at" in said(1.0) and "about 60 minutes in all on" in said(1.0)
    short = said(0.1)
    assert "about 13 minutes in all on this machine, more than --hours=0.1," in short


def test_the_model_is_measured_where_it_is_trained(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Any] = []

    def opened(path: Path, *, device: str) -> Any:
        used.append(device)
        return open_model(path)

    def reads(run: Any, window: int, half: bool) -> float:
        used.append(half)
        return 1e8

    monkeypatch.setattr(planning, "open_model", opened)
    monkeypatch.setattr(timing, "_reading_speed", reads)
    monkeypatch.setattr(planning, "writing_speed", lambda run: 1000.0)
    found = planning._plan("cuda", model, 1.0, [], [], False)
    assert used == ["cuda", True] and found.precision == "auto"


def test_a_slow_precision_is_not_timed_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, int]] = []

    def reads(run: Any, window: int, *, half: bool, batch: int = 8) -> float:
        asked.append((half, batch))
        return slow if half else 70e9

    monkeypatch.setattr(timing, "_reading_speed", reads)
    run: Any = None
    slow = 7e9
    assert timing.fastest_precision(run, 128, on_cpu=True) == ("32-true", 70e9)
    assert asked == [(False, 8), (True, 1)], "one window tells"
    slow = 60e9
    assert timing.fastest_precision(run, 128, on_cpu=True) == ("32-true", 70e9)
    assert asked[2:] == [(False, 8), (True, 1), (True, 8)]
    for seconds, calls in ((0.5, 4), (3.0, 1)):
        clock, worked = iter([x for i in range(4) for x in (10.0 * i, 10.0 * i + seconds)]), []
        monkeypatch.setattr(time, "perf_counter", clock.__next__)
        assert timing._seconds(lambda: worked.append(1)) == seconds  # noqa: B023
        assert len(worked) == calls


@pytest.mark.slow
def test_a_gpu_is_looked_at_by_a_process_that_gives_it_back(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "pick_accelerator", lambda name: torch.device("cpu"))
    found = planning.plan(model, hours=1.0, files=[], overrides=[])
    assert found.steps > 10 and found.precision == "auto"  # not the word "cpu"


def test_a_chat_model_writes_chats(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("${x}'Q\n{{ messages[0]['content'] }}\nA:", {})
    monkeypatch.setattr(ChatTemplate, "of", lambda state: template)
    monkeypatch.setattr(timing, "_reading_speed", lambda *_, **__: 1e8)
    monkeypatch.setattr(planning, "writing_speed", lambda run: 1000.0)
    chats, around = planning._chat(open_model(model), 32)
    assert chats == ["${x}'Q\n", "\nA:"] and around == 10
    # A window fills the context of 48 tokens: there is no room for the format.
    alone = planning.plan(model, hours=1.0, files=[], overrides=[])
    assert alone.chat == [] and not any("chat" in word for word in alone.train())
    monkeypatch.setattr(planning, "_WINDOW", 32)
    found = planning.plan(model, hours=1.0, files=[], overrides=[])
    assert found.chat == ["${x}'Q\n", "\nA:"] and "(60% of them chats)" in "\n".join(found.lines())
    chats = [word for word in found.train() if word.startswith("data.chat")]
    cfg = helpers.composed("config", ["data=self_generated", *chats])
    assert [cfg.data.chat_share, cfg.data.chat_before, cfg.data.chat_after] == [0.6, *found.chat]
    # With every chat 7 + 3 tokens of the format are read; a state has 32 numbers.
    assert found.state_bytes == 4 * found.texts * (32 + 6) * 32


def test_whoever_ends_the_command_ends_its_phase(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(
        "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    code = (
        "from pathlib import Path; from mtp_lightning.heads.__main__ import run_phase\n"
        "from mtp_lightning.command_line.shell import readable_errors\n"
        "with readable_errors(): run_phase('training', Path('none'), ['sleeper'])"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{helpers.ROOT}"}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, stderr=subprocess.PIPE
    ) as command:
        while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
            time.sleep(0.05)
        command.terminate()
        _, said = command.communicate(timeout=30)
    assert command.returncode == 143
    assert b"the training was ended; the same command continues here." in said
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_the_command_of_a_phase_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["platform", "a folder/it's", "data.chat_after='<|end|>\n'"]
    run_phase("training", tmp_path / "result", command)
    said = capsys.readouterr().out.partition("training    ")[2].rpartition("training ")[0]
    assert shlex.split(said) == ["python", "-m", *command]


def test_what_a_failed_phase_leaves_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = tmp_path / "certificate.json"
    code = f"open({str(result)!r}, 'w').write('broken')\nraise SystemExit(2)\n"
    (tmp_path / "certifies.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for _ in range(2):
        with pytest.raises(UserError, match="the certificate ended with code 2"):
            run_phase("certificate", result, ["certifies"])
    assert (tmp_path / "failed_certificate.json").read_text() == "broken"


def test_mistakes(
    model: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hours in ("0", "nan", "inf"):
        told = f"--hours must be a number above 0, not {hours if hours != '0' else '0.0'}"
        assert told in refused(main, model, "--hours", hours)
    assert "are required: model. (" in refused(main)
    assert "deeper is not a setting" in refused(main, model, "deeper")
    assert "output is not a key" in refused(main, model, "output=out")
    assert "nowhere does not exist" in refused(main, "nowhere")
    assert "gone does not exist" in refused(main, model, "--text", "gone")
    assert "is a run of this project" in refused(main, model.parent / "run")
    out = tmp_path / "out"
    plan = planning.plan(model, hours=9.0, files=[], overrides=[])
    with claimed(out):
        monkeypatch.setattr(planning, "plan", None)
        assert f"Another process trains in {out}" in refused(main, model, "--output", out)
    assert not (out / PLAN).exists()
    (out / RUN).mkdir(parents=True)
    (out / PLAN).write_text(json.dumps(vars(plan)))
    assert "begun with hours=9.0, not 1.0" in refused(main, model, "--output", out)
    texts = ("--hours", "9", "--text", PLAN, "--output", out)
    (tmp_path / PLAN).write_text("a text")
    monkeypatch.chdir(tmp_path)
    assert "begun with --text=[], not" in refused(main, model, *texts)
    (out / PLAN).write_text("{")
    assert "is damaged" in refused(main, model, "--output", out)


def test_a_plan_that_no_training_has_begun_is_made_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in an override, which training found, does not stick to the folder."""
    monkeypatch.setattr(timing, "_reading_speed", lambda *_, **__: 1e8)
    monkeypatch.setattr(planning, "writing_speed", lambda run: 1000.0)
    for hours, begun in ((1.0, 1.0), (2.0, 2.0)):
        args = SimpleNamespace(hours=hours, text=[], overrides=[])
        assert make_plan(model, tmp_path, args, [model], keep=True).hours == begun
    (tmp_path / RUN).mkdir()
    with pytest.raises(UserError, match="begun with hours=2.0, not 3.0"):
        make_plan(
            model, tmp_path, SimpleNamespace(**{**vars(args), "hours": 3.0}), [model], keep=True
        )


def test_a_template_that_cannot_be_read_is_named(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def invalid(state: Any) -> None:
        ChatTemplate("{{ }", {})

    monkeypatch.setattr(ChatTemplate, "of", invalid)
    assert planning._chat(open_model(model), 32) == ([], 0)
    told = f"{model}: the model's chat template is not one of Jinja: "
    said = capsys.readouterr().err
    assert told in said and said.endswith(" No text is a chat.\n")
