"""What saving costs is measured by real saves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import checkpoints


@pytest.mark.slow
def test_both_ways_are_measured(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    result = checkpoints.main(["--megabytes", "48", "--rounds", "1", "--output", str(output)])
    assert json.loads(output.read_text()) == result
    one, other = result["file"], result["parts"]
    assert 0 < one["waits_s"] == one["named_s"]
    assert 0 < other["waits_s"] < other["named_s"]
    # The first process gathers 48 MB, and copies 24.
    assert one["beside_bytes"] > 40e6 and other["beside_bytes"] > 20e6
    assert other["steps_meanwhile"] > 0
