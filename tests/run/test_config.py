"""A stored config is read as plain data; anything else in the file is refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mtp_lightning.errors import UserError
from mtp_lightning.run.config import read_yaml

# Eight lines of aliases that would expand to 9^7 keys.
BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}\n" for i in range(1, 8)
)


def test_a_plain_config_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("a: {b: 1}\nc: '*.py & more'\n")
    assert read_yaml(file) == {"a": {"b": 1}, "c": "*.py & more"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB.encode(), r"has the alias \*a0, which no run writes"),
        (b"a: [1", "is not YAML"),
        (b"a: " + b"[" * 100_000, "is not YAML"),
        (b"a: !!python/object/apply:os.system ['exit']", "is not YAML"),
        (b"a: \xff", "is not YAML"),
    ],
    ids=["aliases", "cut", "deep", "code", "bytes"],
)
def test_a_config_with_aliases_code_or_damage_is_refused(tmp_path, content, message):
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    began = time.monotonic()
    with pytest.raises(UserError, match=message):
        read_yaml(file)
    assert time.monotonic() - began < 60
