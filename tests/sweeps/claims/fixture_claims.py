"""Claims and observations written by hand: what becomes of them is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sweeps.claims.claim import Claim
from sweeps.claims.observe import Arms, Seed, key
from sweeps.claims.read import read_claim

CONTENT: dict[str, Any] = {
    "sentence": "MTP helps.",
    "source": "Somebody 2024, arXiv 2404.00000",
    "equal": "steps",
    "seeds": [0, 1, 2, 3, 4],
    "minimum": 3,
    "minutes": 7,
    "shared": ["mtp.depth=2"],
    "arms": {"plain": ["mtp=none", "mtp.depth=0"], "mtp": ["mtp=sequential"]},
    "measure": {"tag": "val/bits_per_byte"},
    "predictions": [{"arm": "mtp", "against": "plain", "side": "below"}],
}
SOLVED = {"tag": "val/exact_match", "solved": 0.95}


class _NoAlias(yaml.SafeDumper):
    """Writes what stands twice twice: a claim has no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def write_claim(folder: Path, name: str = "mine", **changes: Any) -> Path:
    """A claim's file: CONTENT with changes; a change to None leaves the key out."""
    content = {k: v for k, v in {**CONTENT, **changes}.items() if v is not None}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(yaml.dump(content, Dumper=_NoAlias, sort_keys=False))
    return file


def claim_of(folder: Path, **changes: Any) -> Claim:
    """The claim that such a file gives."""
    write_claim(folder, **changes)
    return read_claim("mine", folder)


def observed(
    claim: Claim,
    values: Mapping[str, Sequence[float | None | str]],
    *,
    costs: Mapping[str, float] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Arms:
    """Runs by arm: for every seed the claim's first measure, None for a run without that number, or
    the state of one that is not done.

    Args:
        claim: whose measure it is.
        values: of seeds 0, 1, ..
        costs: of the claim's ``equal``, by arm; 1,000 where not given.
        texts: fingerprints of the evaluation text by arm.
    """
    measure = claim.measures[0]
    arms: dict[str, dict[int, Seed]] = {}
    for arm, of_arm in values.items():
        arms[arm] = {}
        for seed, value in enumerate(of_arm):
            if isinstance(value, str):
                arms[arm][seed] = Seed(folder=f"{arm}-{seed}", state=value)
                continue
            arms[arm][seed] = Seed(
                folder=f"{arm}-{seed}",
                state="done",
                values={} if value is None else {key(measure): value},
                costs={claim.equal: (costs or {}).get(arm, 1000.0), "seconds": 60.0},
                text=(texts or {}).get(arm, "e" * 32),
                machine="Linux x86_64, 2 cores",
                commit="c" * 40,
                ended="2026-11-25T10:00:00+00:00",
            )
    return arms
