"""The claim ``lossless``, which certificates test instead of runs (``mtp-lightning certify``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtp_lightning.stored import read_json
from sweeps.claims.decide import FAILS, HOLDS


def lossless(root: Path) -> dict[str, Any] | None:
    """The verdict over all certificates of ``results/certificates``, with the texts of each and of
    the other programs in it; None if there are none.

    The claim holds if no certificate has a broken promise.
    """
    rows, others, holds = [], [], True
    for file in sorted((root / "results" / "certificates").glob("*.json")):
        content = read_json(file)
        cells, samples = content["cells"], [c["p"] for c in content["cells"] if "p" in c]
        holds = holds and not content["broken"]
        rows.append(
            {
                "file": file.name,
                "model": content["model"],
                "processor": content["processor"],
                "weights": list(dict.fromkeys(cell["weights"] for cell in cells)),
                "cells": len(cells),
                "texts": sum(cell["texts"] for cell in cells),
                "texts_equal": sum(cell["texts_equal"] for cell in cells),
                "tokens": sum(cell["tokens"] for cell in cells),
                "logits_equal": sum(cell["logits_equal"] for cell in cells),
                "samples": len(samples),
                "least_p": min(samples, default=None),
            }
        )
        others += [{"processor": content["processor"], **count} for count in content["others"]]
    if not rows:
        return None
    return {"state": HOLDS if holds else FAILS, "rows": rows, "others": others}
