"""The text that a run was evaluated on, as its summary has it: a number of one text says nothing
beside a number of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sweeps.report.read import Run


@dataclass(frozen=True)
class Text:
    """The validation documents that a run's final numbers are of.

    Attributes:
        fingerprint: hex digest of the documents; None if only a part of them was evaluated, or
            nobody knows which.
        documents: how many; None if unknown, as the others.
        bytes: of UTF-8 in the evaluated depth-0 targets. A document mask leaves out every
            document's first token, so runs on one text may differ in it a little.
        tokens: evaluated depth-0 targets.
    """

    fingerprint: str | None
    documents: int | None
    bytes: int | None
    tokens: int | None

    @property
    def short(self) -> str:
        """The name for people: eight characters of the digest, or what else there is."""
        if self.fingerprint:
            return self.fingerprint[:8]
        return "unknown" if self.bytes is None else f"unknown ({self.bytes:,} bytes)"

    @property
    def same(self) -> Any:
        """Equal for two runs *of one setting* that were evaluated on one text. Without a digest
        it is what was counted: equal configs on equal data evaluate the same part."""
        return self.fingerprint or (self.documents, self.bytes, self.tokens)


def text_of(run: Run) -> Text | None:
    """What a finished run was evaluated on; None if its summary does not mention it (older runs
    do not)."""
    if not isinstance(run.fact("evaluation"), dict):
        return None
    digest = run.fact("evaluation", "fingerprint")
    counts = [run.fact("evaluation", name) for name in ("documents", "bytes", "tokens")]
    known = isinstance(digest, str) and digest != ""
    return Text(digest if known else None, *(c if isinstance(c, int) else None for c in counts))


def rests_on_text(tag: str) -> bool:
    """Whether a metric is measured on the evaluation text. Decoding is: its prompts are held-out
    documents, and what is accepted of the drafts, and so the speed, depends on them. Training
    loss, throughput, parameters, FLOPs and seconds are not."""
    return tag.startswith(("val/", "decode/"))
