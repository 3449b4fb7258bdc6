"""Errors of the user are printed in one line; defects keep their traceback."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from mtp_lightning.command_line.shell import Stopped, readable_errors
from mtp_lightning.errors import UserError
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.paths import ROOT


def user_error() -> None:
    raise UserError("a sentence")


def value_error_of_this_project() -> None:
    TrunkConfig(vocab_size=37, d_model=33, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48)


def value_error_of_the_users_code() -> None:
    int("many")  # raised by C code that a file outside any library calls


def missing_file() -> None:
    Path("/no/such/file").read_text()


def missing_value() -> None:
    OmegaConf.create({"a": {"b": "???"}}).a.b  # noqa: B018


@pytest.mark.parametrize(
    ("fails", "of_users_code"),
    [
        (user_error, False),
        (value_error_of_this_project, False),
        (missing_value, False),
        (missing_file, False),
        (value_error_of_the_users_code, True),
    ],
)
def test_errors_that_a_user_can_correct_are_one_line(fails, of_users_code, capsys):
    with pytest.raises(SystemExit) as ended, readable_errors():
        fails()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "Errno" not in line
    assert line.endswith("(HYDRA_FULL_ERROR=1 shows where)") == of_users_code
    assert ("HYDRA_FULL_ERROR" in line) == of_users_code


def torch_without_memory() -> None:
    torch.empty(1 << 50)


def gpu_without_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 8 GiB.")


def python_without_memory() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        (torch_without_memory, "can't allocate memory: you tried to allocate 4503599627370496"),
        (gpu_without_memory, "error: CUDA out of memory. Tried to allocate 9 GiB:"),
        (python_without_memory, "error: The memory is full:"),
    ],
)
def test_a_lack_of_memory_is_one_line(fails, reason, capsys):
    with pytest.raises(SystemExit) as ended, readable_errors():
        fails()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and reason in line
    assert line.endswith(": take smaller batches, shorter windows or a smaller model.")


def value_error_of_torch() -> None:
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=-1.0)


def value_error_of_the_standard_library() -> None:
    json.loads("{")


def defect_of_this_project() -> None:
    exec(compile("int('many')", ROOT / "mtp_lightning" / "made.py", "exec"))


@pytest.mark.parametrize(
    "fails", [value_error_of_torch, value_error_of_the_standard_library, defect_of_this_project]
)
def test_value_errors_of_libraries_and_defects_keep_tracebacks(fails, capsys):
    with pytest.raises(ValueError), readable_errors():
        fails()
    assert capsys.readouterr().err == ""


def test_only_user_errors_of_an_installed_extension_are_one_line(tmp_path, capsys):
    file = tmp_path / "site-packages" / "theirs.py"
    file.parent.mkdir()
    file.write_text(
        "from mtp_lightning.errors import UserError\n"
        "def fail(kind):\n    raise {'user': UserError, 'value': ValueError}[kind]('theirs')\n"
    )
    spec = importlib.util.spec_from_file_location("theirs", file)
    assert spec is not None and spec.loader is not None
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    with pytest.raises(ValueError), readable_errors():
        extension.fail("value")
    with pytest.raises(SystemExit), readable_errors():
        extension.fail("user")
    assert "error: theirs" in capsys.readouterr().err


def test_hydra_full_error_keeps_every_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError), readable_errors():
        user_error()


def test_a_stop_exits_with_the_code_of_its_signal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, readable_errors():
        raise Stopped("saved", 15)
    assert ended.value.code == 143 and capsys.readouterr().err == "saved\n"
