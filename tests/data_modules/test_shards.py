"""Token files that another program changes while they are read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from data_modules.shards import Shard, ShardedTokens, stamp_of


@pytest.mark.parametrize("change", ["written to", "cut off", "removed"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, change: str) -> None:
    """A run would read other ids, or be killed. A removed file can still be read."""
    file = tmp_path / "ids.bin"
    file.write_bytes(np.arange(4000, dtype="<u2").tobytes())
    tokens = ShardedTokens([Shard(file, "<u2", 0, 4000, stamp_of(file))])
    assert tokens[10:12].tolist() == [10, 11]
    if change == "removed":
        file.unlink()
        assert tokens[10:12].tolist() == [10, 11]
        return
    with file.open("r+b") as handle:
        handle.truncate(100) if change == "cut off" else handle.write(b"\0" * 40)
    os.utime(file, (0, 0))  # within a clock's tick, too
    with pytest.raises(ValueError, match="ids.bin was written to or replaced while it"):
        tokens[10:12]
    with pytest.raises(ValueError, match="was written to"):
        tokens.windows(np.array([3]), 5)
