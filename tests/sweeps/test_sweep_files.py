"""Each file of conf/sweeps/ composes, and has its question, command and cost in its header."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import pytest
import yaml

from mtp_lightning.errors import UserError
from sweeps.compose import compose_run
from tests.integration.helpers import composed

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "conf" / "sweeps").glob("*.yaml"))


def params(file: Path) -> dict[str, list[str]]:
    params_of_file = yaml.safe_load(file.read_text())["hydra"]["sweeper"]["params"]
    return {key: str(values).split(",") for key, values in params_of_file.items()}


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_the_header_has_the_question_the_command_and_the_cost(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].endswith("?"), "the question"
    header = [line for line in lines if line.startswith("#")]
    (command,) = [line[1:].strip() for line in header if "python train.py" in line]
    words = shlex.split(command)
    assert words[:4] == ["python", "train.py", "-m", f"+sweeps={file.stem}"]
    jobs = math.prod(map(len, params(file).values()))
    assert any(re.match(rf"# {jobs} jobs, about \d+ minutes on 2 cores", line) for line in header)


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_value_composes(file: Path) -> None:
    varied = params(file)
    assert len(varied["seed"]) >= 2, "without seeds there is no noise to compare with"
    for i in range(max(map(len, varied.values()))):  # all values, several in one config
        chosen = [f"{key}={values[i % len(values)]}" for key, values in varied.items()]
        cfg = composed("config", [f"+sweeps={file.stem}", *chosen])
        assert cfg.trainer.max_steps == 1000
    if file.stem == "lambda":
        assert cfg.lambda_schedule._target_.endswith(".constant")


def test_unknown_sweeps_and_claims_are_refused_as_sweeps() -> None:
    with pytest.raises(UserError, match="sweeps has no option 'dept': did you mean depth?"):
        compose_run(["+sweeps=dept"])
    with pytest.raises(UserError, match="sweeps/claims has no option 'lambda'") as refused:
        compose_run(["+sweeps=claims/lambda"])
    assert "did you mean lambda" not in str(refused.value)
