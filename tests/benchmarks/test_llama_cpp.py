"""benchmarks/llama_cpp.py: both programs decode the same file, and its rates can be true."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import llama_cpp

pytestmark = pytest.mark.extras


def test_rows(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="needs pip install -e '.[engines]'")
    pytest.importorskip("gguf")
    from tests.interop.gguf_files import write_gguf

    file = write_gguf(tmp_path / "small.gguf")
    task = {"model": str(file), "threads": 1, "batch": 2, "new_tokens": 8}
    task["prompts"] = [[5, 6, 7, 8], [9, 10, 11, 12]]
    options = {"precisions": ("fp32", "int8"), "turns": 1, "python": sys.executable}
    rows = llama_cpp.measure(task, heads="", **options)
    assert [row["side"].split()[0] for row in rows] == ["xllamacpp", "plain,", "plain,"]
    for row in rows:
        assert row["megabytes"] > 10 and row["prompt_tokens_per_second"] > 0
    assert rows[0]["over"] == rows[0]["prompt_over"] == 1
