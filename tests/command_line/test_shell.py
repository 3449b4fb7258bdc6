"""Which errors are the user's, and which are shown in full."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from mtp_lightning.command_line.shell import Stopped, readable_errors
from mtp_lightning.errors import UserError
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.paths import ROOT


def user_error() -> None:
    raise UserError("a sentence")


def own_value_error() -> None:
    TrunkConfig(vocab_size=37, d_model=33, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48)


def users_value_error() -> None:
    int("many")  # raised by C code that a file outside any library calls


def missing_file() -> None:
    Path("/no/such/file").read_text()


def missing_value() -> None:
    OmegaConf.create({"a": {"b": "???"}}).a.b  # noqa: B018


@pytest.mark.parametrize(
    ("fails", "of_users_code"),
    [
        (user_error, False),
        (own_value_error, False),
        (missing_value, False),
        (missing_file, False),
        (users_value_error, True),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    fails: Callable[[], Any], of_users_code: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, readable_errors():
        fails()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "Errno" not in line
    assert line.endswith("(HYDRA_FULL_ERROR=1 shows where)") == of_users_code
    assert ("HYDRA_FULL_ERROR" in line) == of_users_code


def torchs_value_error() -> None:
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=-1.0)


def standard_librarys_value_error() -> None:
    json.loads("{")


def own_defect() -> None:
    exec(compile("int('many')", ROOT / "mtp_lightning" / "made.py", "exec"))


@pytest.mark.parametrize("fails", [torchs_value_error, standard_librarys_value_error, own_defect])
def test_another_value_error_of_a_library_or_of_this_project_is_a_defect(
    fails: Callable[[], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError), readable_errors():
        fails()
    assert capsys.readouterr().err == ""


def test_an_installed_extension_is_a_library_and_a_user_error_of_it_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "site-packages" / "theirs.py"
    file.parent.mkdir()
    file.write_text(
        "from mtp_lightning.errors import UserError\n"
        "def fail(kind):\n    raise {'user': UserError, 'value': ValueError}[kind]('theirs')\n"
    )
    spec = importlib.util.spec_from_file_location("theirs", file)
    assert spec is not None and spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    with pytest.raises(ValueError), readable_errors():
        theirs.fail("value")
    with pytest.raises(SystemExit), readable_errors():
        theirs.fail("user")
    assert "error: theirs" in capsys.readouterr().err


def test_all_errors_are_shown_in_full_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError), readable_errors():
        user_error()


def test_a_stop_ends_with_the_signals_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, readable_errors():
        raise Stopped("saved", 15)
    assert ended.value.code == 143 and capsys.readouterr().err == "saved\n"
