"""Heads for a finished model in one command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtp_lightning.errors import UserError
from mtp_lightning.heads import planning
from mtp_lightning.heads.__main__ import PLAN, main
from mtp_lightning.interop.exporting import export
from tests.integration import helpers

pytest.importorskip("safetensors", reason="Hugging Face folders need it: pip install safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk that somebody else could have trained: a Hugging Face folder."""
    base = tmp_path_factory.mktemp("trunk")
    alone = {"mtp": "none", "mtp.depth": 0, "mtp_lambda": 0, "lambda_schedule": "constant"}
    helpers.train_here(base / "run", base / "cache", {**alone, "data.seq_len": 48})
    with helpers.initialize_config_dir(str(helpers.CONF), version_base="1.3"):
        words = [f"checkpoint={base / 'run'}", f"output={base / 'hub'}", "verify=false"]
        export(helpers.compose("export", overrides=words))
    return base / "hub"


def refused(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_the_hours_are_divided(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "_reads", lambda run, window: 1e9)
    monkeypatch.setattr(planning, "_writes", lambda run, window: 1000.0)
    one, two = (planning.plan(model, hours=h, files=[], overrides=[]) for h in (1.0, 2.0))
    # 35 % of an hour at 1,000 tokens per second, 35 of the 48 tokens of a text being new
    assert one.texts == int(0.35 * 3600 * 1000 / 35) and one.window == 48
    assert two.steps in (2 * one.steps, 2 * one.steps + 1) and two.texts - 2 * one.texts in (0, 1)
    words = one.train()
    assert f"data.n_prompts={one.texts}" in words and f"trainer.max_steps={one.steps}" in words
    assert "data.prompt_tokens=13" in words and "data.new_tokens=35" in words
    mine = planning.plan(model, hours=1.0, files=["/a b"], overrides=["optimizer.lr=0.1"])
    assert mine.texts == 0 and "data.paths=['/a b']" in mine.train()
    assert mine.train()[-1] == "optimizer.lr=0.1"
    with pytest.raises(UserError, match="--hours=1e-06 holds 0 steps"):
        planning.plan(model, hours=1e-6, files=[], overrides=[])
    main([str(model), "--dry-run"])
    said = capsys.readouterr().out
    assert "texts that the model writes itself, about 21 minutes at 1,000 tokens" in said
    assert not Path("hub_heads").exists()


def test_whoever_ends_the_command_ends_its_phase(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(
        "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    code = (
        "from pathlib import Path; from mtp_lightning.heads.__main__ import run_phase; "
        "run_phase('training', Path('none'), ['sleeper'])"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{helpers.ROOT}"}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, stderr=subprocess.PIPE
    ) as command:
        while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
            time.sleep(0.05)
        command.terminate()
        _, said = command.communicate(timeout=30)
    assert command.returncode == 1 and b"the training ended with code -15" in said
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_mistakes(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(model)
    assert "--hours=0 must be above 0" in refused(folder, "--hours", "0", capsys=capsys)
    assert "deeper is not a setting" in refused(folder, "deeper", capsys=capsys)
    assert "nowhere does not exist" in refused("nowhere", capsys=capsys)
    assert "gone does not exist" in refused(folder, "--text", "gone", capsys=capsys)
    run = str(model.parent / "run")
    assert "is a run of this project" in refused(run, capsys=capsys)
    out = tmp_path / "out"
    plan = planning.plan(model, hours=9.0, files=[], overrides=[])
    out.mkdir()
    (out / PLAN).write_text(json.dumps({**vars(plan)}))
    said = refused(folder, "--output", str(out), capsys=capsys)
    assert "begun with hours=9.0, not 1.0" in said
    (out / PLAN).write_text("{")
    assert "is damaged" in refused(folder, "--output", str(out), capsys=capsys)
