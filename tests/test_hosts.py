"""The Host header: names of this server, and names that a foreign name server could give it."""

from __future__ import annotations

import pytest

from mtp_lightning.hosts import is_called

OWN = "localhost LocalHost:8000 localhost. 127.0.0.1:8000 10.1.2.3 [::1]:8000 gpu.example.org"
FOREIGN = """evil.example evil.example:8000 localhost.evil.example 127.0.0.1.evil.example
    evil@localhost localhost@evil.example localhost/evil [::1].evil.example [evil] localhost:8000x
    ::1:evil xgpu.example.org"""


@pytest.mark.parametrize("header", [None, *OWN.split(), "GPU.Example.org:80"])
def test_names_of_this_server_are_accepted(header: str | None) -> None:
    assert is_called(header, ["gpu.example.org"])


@pytest.mark.parametrize("header", ["", *FOREIGN.split(), "localhost, evil.example"])
def test_foreign_names_are_refused(header: str) -> None:
    assert not is_called(header, ["gpu.example.org"])
    assert is_called(header, ["*"])
