"""``mtp-lightning heads``: the plan, its measurements, the phases, refused arguments."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtp_lightning.chat_template import ChatTemplate
from mtp_lightning.command_line.quote import literal
from mtp_lightning.errors import UserError
from mtp_lightning.experiment.compose import checked_config
from mtp_lightning.heads import planning, timing
from mtp_lightning.heads.__main__ import certify_command, main
from mtp_lightning.heads.phases import PLAN, RUN, make_plan, run_phase
from mtp_lightning.opening import open_model
from mtp_lightning.run.folder import claimed
from tests.heads.conftest import Refused
from tests.integration import helpers
from tests.interop import folders


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a model without heads."""
    base = tmp_path_factory.mktemp("trunk")
    no_mtp = {"mtp": "none", "mtp.depth": 0, "mtp_lambda": 0, "lambda_schedule": "constant"}
    helpers.train_here(base / "run", base / "cache", {**no_mtp, "data.seq_len": 48})
    return folders.export_run(base / "run", base / "hub", verify=False)


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed speeds of reading and writing in place of measurements."""
    monkeypatch.setattr(timing, "_reading_speed", lambda *_, **__: 1e8)
    monkeypatch.setattr(planning, "writing_speed", lambda run: 1000.0)


_config_of = cache(lambda words: checked_config(list(words)))


@pytest.fixture(autouse=True)
def compose_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composes a config only once for the same words: most plans begin with the same ones."""
    monkeypatch.setattr(planning, "checked_config", lambda words: _config_of(tuple(words)))


def plan_of(model: Path, *overrides: str, hours: float = 1.0) -> planning.HeadsPlan:
    return planning.plan(model, hours=hours, files=[], overrides=list(overrides))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for a CPU on which bf16 and integer products are fast, without the later phases."""
    monkeypatch.setattr(timing, "_reading_speed", lambda *_, half, **__: 1e9 if half else 1e8)
    monkeypatch.setattr(planning, "pick_accelerator", lambda name: "cpu")
    monkeypatch.setattr(planning, "multiply_integers", lambda model: None)
    monkeypatch.setattr(planning, "writing_speed", lambda run: 1000.0)
    monkeypatch.setattr(planning, "other_seconds", lambda *_: 0.0)


def test_the_time_of_the_later_phases_grows_with_the_model() -> None:
    assert timing.other_seconds(135 * 10**6, 80e9) == pytest.approx(505, abs=5)  # SmolLM2
    assert timing.other_seconds(1000, 80e9) == pytest.approx(150, abs=1)


def test_the_hours_are_divided_into_texts_and_steps(
    model: Path, on_cpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (plan_of(model, hours=hours) for hours in (1.0, 2.0))
    # 35 of the 48 tokens of a text are new, at 1,000 per second; reading them also takes time.
    assert 0.8 < one.texts * 35 / 1000 / (0.45 * 3600) < 1 and one.window == 48
    assert two.steps in (2 * one.steps, 2 * one.steps + 1) and two.texts - 2 * one.texts in (0, 1)
    words = one.train()
    assert f"data.n_prompts={one.texts}" in words and f"trainer.max_steps={one.steps}" in words
    assert "data.prompt_tokens=13" in words and "data.new_tokens=35" in words
    assert "trainer.precision=bf16-mixed" in words and "data.activations=int8" in words
    assert not any(word.startswith("objective.draft_vocab") for word in words)
    assert "optimizer.lr=0.004" in words and one.context == 48
    with pytest.raises(UserError, match="--hours=1e-06 holds 0 steps") as too_few:
        plan_of(model, hours=1e-6)
    enough = float(str(too_few.value).rpartition("=")[2].rstrip("."))
    least = plan_of(model, hours=enough)
    assert 64 <= least.texts < 75 and least.steps >= 10
    with pytest.raises(UserError, match="holds 0 steps of this .* heads need 10: give"):
        planning.plan(model, hours=1e-6, files=["README.md"], overrides=[])
    assert plan_of(model, hours=1e9).texts == 1 << 22  # the most that data.n_prompts may be
    main([str(model), "--dry-run"])
    output = capsys.readouterr().out
    assert "texts that the model writes itself and then reads, about 27 minutes at 1,000" in output
    assert not Path("hub_heads").exists()


def test_a_wide_trunk_has_a_lower_rate_and_a_large_vocabulary_is_cut(
    model: Path, on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = open_model(model).model.config.trunk.d_model
    monkeypatch.setattr(planning, "_WIDTH", width // 4)
    whole = plan_of(model)
    assert "optimizer.lr=0.001" in whole.train(), "a rate of 1 / d_model"
    monkeypatch.setattr(planning, "_VOCAB", 16)  # of 257 tokens
    short = plan_of(model)
    assert "objective.draft_vocab=16" in short.train() and short.texts == whole.texts
    assert short.steps > whole.steps, "a step takes less time"
    assert "on the first 16 tokens alone" in "\n".join(short.lines())


def test_a_plan_for_text_files_generates_no_texts(model: Path, on_cpu: None) -> None:
    files = ["/a b", "/it's ${x}.txt"]
    one = planning.plan(model, hours=1.0, files=files, overrides=["optimizer.lr=0.1"])
    two = planning.plan(model, hours=1.0, files=files, overrides=["mtp.depth=2"])
    assert two.depth == 2 and "2 sequential modules" in "\n".join(two.lines())
    assert two.head_weights > one.head_weights
    (paths,) = (word for word in one.train() if word.startswith("data.paths="))
    cfg = helpers.composed("config", literal(["data=text", paths]))
    assert one.texts == 0 and list(cfg.data.paths) == files
    assert one.train()[-1] == "optimizer.lr=0.1"


def test_a_plan_counts_the_embeddings_that_an_export_repeats(model: Path, on_cpu: None) -> None:
    plan = plan_of(model)
    trunk = open_model(model).model.config.trunk
    assert plan.embedding == trunk.vocab_size * trunk.d_model
    large = replace(plan, embedding=10**9, depth=2, state_bytes=0)
    assert "16.0 GB of disk" in "\n".join(large.lines())


def test_overrides_change_the_plan(
    model: Path, speeds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "other_seconds", lambda *_: 600.0)

    def lines(*overrides: str, hours: float = 1.0) -> str:
        return "\n".join(plan_of(model, *overrides, hours=hours).lines())

    numbers = ["data.n_prompts=500", "trainer.max_steps=2000", "data.batch_size=4"]
    text = lines(*numbers, "data.seq_len=24", "optimizer.lr=0.3", "data.activations=fp32")
    assert "500 texts that" in text and "2,000 steps of 96 tokens" in text
    assert "with learning rate 0.3" in text and "with activations=fp32" in text
    assert "about 15 minutes in all" in text
    assert "others     about 10 minutes for start, certificate, export, timing" in text
    assert "one parallel module of" in lines("mtp=parallel")
    assert "2 parallel modules of" in lines("mtp=parallel", "mtp.depth=2")
    for own in (["mtp=masked", "mtp.lora_rank=2"], ["mtp.freeze_trunk=false"]):
        assert "data.cache_states=false" in plan_of(model, *own).train()
    with pytest.raises(UserError, match="mtp.depth=0"):
        lines("mtp.depth=0")
    with pytest.raises(UserError, match="data.seq_len must be a whole"):
        lines("data.seq_len=none")
    # The later phases take ten minutes: they leave 50 minutes of an hour, and half of six minutes.
    text = lines()
    assert "about 22 minutes at" in text and "about 60 minutes in all on" in text
    assert "validation up to 10 minutes" in text
    assert "about 13 minutes in all on this machine, more than --hours=0.1" in lines(hours=0.1)
    assert max(map(len, text.splitlines()[4:])) <= 80, "the time is to be seen at a glance"


def test_the_model_is_measured_on_the_device_of_training(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def opened(path: Path, *, device: str) -> Any:
        calls.append(device)
        return open_model(path)

    def reading_speed(run: Any, window: int, half: bool) -> float:
        calls.append(half)
        return 1e8

    monkeypatch.setattr(planning, "open_model", opened)
    monkeypatch.setattr(timing, "_reading_speed", reading_speed)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(planning, "writing_speed", lambda run: 1000.0)
    plan = planning._plan("cuda", model, 1.0, [], [], False)
    assert calls == ["cuda", True] and plan.precision == "auto"


def test_a_slow_precision_is_measured_with_one_window(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[bool, int]] = []

    def reading_speed(run: Any, window: int, *, half: bool, batch: int = 8) -> float:
        calls.append((half, batch))
        return bf16 if half else 70e9

    monkeypatch.setattr(timing, "_reading_speed", reading_speed)
    run: Any = None
    bf16 = 7e9
    assert timing.fastest_precision(run, 128, on_cpu=True) == ("32-true", 70e9)
    assert calls == [(False, 8), (True, 1)]
    bf16 = 60e9
    assert timing.fastest_precision(run, 128, on_cpu=True) == ("32-true", 70e9)
    assert calls[2:] == [(False, 8), (True, 1), (True, 8)]


@pytest.mark.parametrize(("seconds", "n"), [(0.5, 4), (3.0, 1)])
def test_a_long_measurement_is_not_repeated(
    seconds: float, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, calls = iter([x for i in range(4) for x in (10.0 * i, 10.0 * i + seconds)]), []
    monkeypatch.setattr(time, "perf_counter", clock.__next__)
    assert timing._seconds(lambda: calls.append(1)) == seconds
    assert len(calls) == n


@pytest.mark.slow
def test_a_gpu_is_measured_in_a_process_that_ends(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "pick_accelerator", lambda name: torch.device("cpu"))
    plan = plan_of(model)
    assert plan.steps > 10 and plan.precision == "auto"  # a device is not the word "cpu"


def test_a_chat_model_writes_chats_if_the_context_has_room(
    model: Path, speeds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = ChatTemplate("${x}'Q\n{{ messages[0]['content'] }}\nA:", {})
    monkeypatch.setattr(ChatTemplate, "of", lambda state: template)
    assert planning._chat(open_model(model), 32) == ["${x}'Q\n", "\nA:"]
    # A window fills the context of 48 tokens: there is no room for the format.
    full = plan_of(model)
    assert full.chat == [] and not any("chat" in word for word in full.train())
    monkeypatch.setattr(planning, "_WINDOW", 32)
    plan = plan_of(model)
    assert plan.chat == ["${x}'Q\n", "\nA:"] and "(60% of them chats)" in "\n".join(plan.lines())
    chats = [word for word in plan.train() if word.startswith("data.chat")]
    cfg = helpers.composed("config", ["data=self_generated", *chats])
    assert [cfg.data.chat_share, cfg.data.chat_before, cfg.data.chat_after] == [0.6, *plan.chat]
    # With each chat, 7 + 3 tokens of the format are read; a state has 32 numbers.
    assert plan.state_bytes == 4 * plan.texts * (32 + 6) * 32


@pytest.mark.parametrize(
    "handler",
    ["", "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"],
    ids=["killed", "ends well"],
)
def test_a_signal_to_the_command_ends_its_phase(tmp_path: Path, handler: str) -> None:
    (tmp_path / "sleeper.py").write_text(
        f"{handler}import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    code = (
        "from pathlib import Path; from mtp_lightning.heads.phases import run_phase\n"
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
        _, error = command.communicate(timeout=30)
    assert command.returncode == 143
    assert b"the training was ended; the same command continues here." in error
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_the_command_of_a_phase_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["platform", "a folder/it's", "data.chat_after='<|end|>\n'"]
    run_phase("training", tmp_path / "result", command)
    printed = capsys.readouterr().out.partition("training    ")[2].rpartition("training ")[0]
    assert shlex.split(printed) == ["python", "-m", *command]


def test_the_result_of_a_failed_phase_is_renamed(
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


def test_the_certificate_tests_all_precisions_and_the_recommended_arithmetic() -> None:
    words = certify_command(Path("run"), "int8", Path("out"))
    assert words[-2:] == ["--weights", "fp32,bf16,int8,int4,fp32/int8"]
    assert "--weights" not in certify_command(Path("run"), "fp32", Path("out"))


def test_wrong_arguments_are_refused(
    model: Path, tmp_path: Path, speeds: None, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hours, number in (("0", "0.0"), ("nan", "nan"), ("inf", "inf")):
        message = f"--hours must be a number above 0, not {number}"
        assert message in refused(main, model, "--hours", hours)
    assert "are required: model. (" in refused(main)
    assert "deeper is not a setting" in refused(main, model, "deeper")
    assert "mtp=none has no head to train" in refused(main, model, "mtp=none")
    assert "sets init_from by its models" in refused(main, model, "init_from=other")
    assert "sets run_dir by --output: leave" in refused(main, model, "run_dir=other")
    assert "sets data.paths by --text" in refused(main, model, "data.paths=x")
    assert "output is not a key" in refused(main, model, "output=out")
    assert "nowhere does not exist" in refused(main, "nowhere")
    assert "gone does not exist" in refused(main, model, "--text", "gone")
    assert "give settings before --text" in refused(main, model, "--text", model, "mtp=parallel")
    (tmp_path / "blank").touch()
    assert "blank is empty" in refused(main, model, "--text", tmp_path / "blank")
    assert "is a run of this project" in refused(main, model.parent / "run")
    assert "lies inside" in refused(main, model, "--output", model / "heads")
    out = tmp_path / "out"
    plan = plan_of(model, hours=9.0)
    with claimed(out):
        monkeypatch.setattr(planning, "plan", None)
        assert f"Another process works in {out}" in refused(main, model, "--output", out)
    assert not (out / PLAN).exists()
    (out / RUN).mkdir(parents=True)
    (out / PLAN).write_text(json.dumps(vars(plan)))
    assert "begun with hours=9.0, not 1.0" in refused(main, model, "--output", out)
    texts = ("--hours", "9", "--text", PLAN, "--output", out)
    (tmp_path / PLAN).write_text("a text")
    assert "begun with --text=[], not" in refused(main, model, *texts)
    (out / PLAN).write_text("{")
    assert "is damaged" in refused(main, model, "--output", out)


def test_a_plan_can_change_until_its_training_begins(
    model: Path, tmp_path: Path, speeds: None
) -> None:
    """For example, after training refused an override."""

    def planned_hours(hours: float) -> float:
        args = SimpleNamespace(hours=hours, text=[], overrides=[])
        return make_plan(model, tmp_path, args, [model], keep=True).hours

    assert [planned_hours(hours) for hours in (1.0, 2.0)] == [1.0, 2.0]
    (tmp_path / RUN).mkdir()
    with pytest.raises(UserError, match="begun with hours=2.0, not 3.0"):
        planned_hours(3.0)


def test_a_chat_template_that_cannot_be_read_is_reported_and_not_used(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def invalid(state: Any) -> None:
        ChatTemplate("{{ }", {})

    monkeypatch.setattr(ChatTemplate, "of", invalid)
    assert planning._chat(open_model(model), 32) == []
    message = capsys.readouterr().err
    assert f"{model}: the model's chat template is not valid Jinja: " in message
    assert message.endswith(" No text is a chat.\n")
