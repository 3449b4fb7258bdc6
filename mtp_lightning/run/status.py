"""``status.json``: the state of a sweep's job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mtp_lightning.run.atomic import write_json
from mtp_lightning.run.layout import LOG_FILE, STATUS_FILE
from mtp_lightning.stored import read_json

VERSION = 1
STATES = ("pending", "running", "done", "failed", "interrupted")
PRUNED = "pruned"  # begins the reason of an interrupted trial that its search does not continue


def now() -> str:
    """The current time (UTC) in the files' format."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_status(folder: Path) -> dict[str, Any]:
    """Read a job's status; empty if there is no readable file."""
    try:
        status = read_json(folder / STATUS_FILE)
    except (OSError, ValueError):
        return {}
    if not isinstance(status, dict) or status.get("state") not in STATES:
        return {}
    return {**_blank(()), **status}


def state_of(folder: Path) -> str:
    """Read a job's state; ``pending`` if there is no readable file."""
    return str(read_status(folder).get("state", "pending"))


def write_status(folder: Path, overrides: Sequence[str], state: str, **values: Any) -> None:
    """Write a job's status into its folder, which is created if needed. ``values`` are those of the
    other keys; keys that are left out are null."""
    assert state in STATES
    folder.mkdir(parents=True, exist_ok=True)
    content = {**_blank(overrides), "state": state, **values}
    if state == "pending":
        # A lost pending file means the same as an intact one, so a thousand of them skip the sync.
        (folder / STATUS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return
    write_json(content, folder / STATUS_FILE, shared=True)  # a sweep and its cluster both write it


def _blank(overrides: Sequence[str]) -> dict[str, Any]:
    others = ("device", "pid", "started", "ended", "exit_code", "reason")
    known = {"version": VERSION, "state": "pending", "overrides": list(overrides)}
    return known | dict.fromkeys(others)


def describe_failure(folder: Path) -> str:
    """One line with the job's state, the reason, and the path of its log."""
    status = read_status(folder) or {"state": "pending", "reason": "no readable status"}
    return f"{status['state']}: {folder.name}: {status['reason']} (log: {folder / LOG_FILE})"


def last_words(log: Path) -> str:
    """The line of a log that explains best why its process ended: the last error, or else the last
    line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 20_000))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return "no log"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    # Only a hint of one or two lines follows the final error; one above is of an earlier start.
    if errors and errors[-1] in lines[-3:]:
        return errors[-1]
    return lines[-1] if lines else "nothing in the log"
