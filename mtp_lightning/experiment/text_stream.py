"""Writes text to a terminal or a pipe while it is generated, with or without its drafts."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY, dataclass
from typing import Any, TextIO

from mtp_lightning.command_line.shell import has_styles, printable
from mtp_lightning.decoding.sequence import Fresh, Generation
from mtp_lightning.errors import counted

_LOOKED_UP = "looked up in the text"


class Colors:
    """Marks of drafts for a terminal: one color per depth, rejected drafts struck through, drafts
    from the text itself underlined."""

    _COLORS = (32, 36, 34, 35, 33)  # green, cyan, blue, magenta, yellow

    def accepted(self, depth: int, text: str, *, looked_up: bool = False) -> str:
        return f"\x1b[{self._style(depth, looked_up)}m{text}\x1b[0m"

    def rejected(self, depth: int, text: str, *, looked_up: bool = False) -> str:
        return f"\x1b[{self._style(depth, looked_up)};9m{text}\x1b[0m"

    def legend(self, depths: int, *, rejected: bool = True, lookups: bool = False) -> str:
        shown = " ".join(self.accepted(k, str(k)) for k in range(1, depths + 1))
        text = f"drafts of depth {shown}"
        if rejected:
            text += f"; {self.rejected(1, 'struck through')}: rejected"
        if lookups:
            text += f"; {self.accepted(1, 'underlined', looked_up=True)}: {_LOOKED_UP}"
        return text

    def _style(self, depth: int, looked_up: bool) -> str:
        color = self._COLORS[(depth - 1) % len(self._COLORS)]
        return f"{color};4" if looked_up else str(color)


def wants_colors() -> bool:
    """Whether drafts are shown by :class:`Colors`: not with NO_COLOR (https://no-color.org)."""
    return has_styles() and not os.environ.get("NO_COLOR")


class Brackets:
    """Marks of drafts for a pipe, in wdiff's notation for added and removed text, with a star for
    drafts from the text itself."""

    def accepted(self, depth: int, text: str, *, looked_up: bool = False) -> str:
        return f"{{+{depth}{'*' if looked_up else ''}:{text}+}}"

    def rejected(self, depth: int, text: str, *, looked_up: bool = False) -> str:
        return f"[-{depth}{'*' if looked_up else ''}:{text}-]"

    def legend(self, depths: int, *, lookups: bool = False) -> str:
        text = (
            f"{self.accepted(1, 'text')} is an accepted draft of depth 1, "
            f"{self.rejected(depths, 'text')} a rejected one of depth {depths}"
        )
        return f"{text}; *: {_LOOKED_UP}" if lookups else text


@dataclass
class TextStream:
    """Writes the prompt with the first token, and then each token's text once it is accepted."""

    tokenizer: Any
    out: TextIO
    prompt: str
    _: KW_ONLY
    terminal: bool  # whether ``out`` is one: control characters in the text are then replaced
    marks: Colors | Brackets | None  # for drafts; None writes the text alone

    def __post_init__(self) -> None:
        self._length = 0  # characters of the generated text written so far
        self.begun = False

    def add(self, fresh: Fresh) -> None:
        """Write new tokens. An incomplete character waits for the rest of its bytes."""
        marks = self.marks
        annotated = zip(fresh.pieces, fresh.depths, fresh.looked_up, fresh.rejected, strict=True)
        for piece, depth, from_text, rejected in annotated:
            if marks is not None:
                for draft in rejected:
                    text, looked_up = self._rejected(draft.token), draft.looked_up
                    self.write(marks.rejected(draft.depth, text, looked_up=looked_up))
            if piece:
                self._length += len(piece)
                shown = self._shown(piece)
                if depth and marks is not None:
                    shown = marks.accepted(depth, shown, looked_up=from_text)
                self.write(shown)

    def end(self, generation: Generation) -> None:
        """Write the rest of a finished text, which is an incomplete character."""
        self.write(self._shown((generation.text or "")[self._length :]) + "\n")

    def write(self, text: str) -> None:
        """Write text as it is, after the prompt."""
        if not self.begun:
            self.begun = True
            self.out.write(self._shown(self.prompt))
        self.out.write(text)
        self.out.flush()

    def _rejected(self, token: int) -> str:
        if token in self.tokenizer.end_ids:
            return "<end of text>"
        # A rejected draft does not belong to the text, so it must not break its lines.
        return self._shown(self.tokenizer.decode([token])).replace("\n", "\\n")

    def _shown(self, text: str) -> str:
        return printable(text) if self.terminal else text


def cost_line(generation: Generation) -> str:
    """One line about the cost of a text: ``80 tokens in 37 passes, 2.16 per pass; 43 drafts
    accepted of 72``. The passes are the trunk's, including the one that reads the prompt."""
    tokens, passes = generation.new_tokens, generation.verify_passes + 1
    line = f"{counted(tokens, 'token')} in {counted(passes, 'pass')}"
    if not generation.drafts:
        return line
    accepted = counted(sum(generation.accepted_mask), "draft")
    line += f", {tokens / passes:.2f} per pass; {accepted} accepted of {generation.drafts}"
    if not generation.lookups:
        return line
    n = generation.lookups_accepted
    return f"{line}; {n} of the {generation.lookups} looked up in the text were accepted"


def ends_at_once(generation: Generation) -> str | None:
    """Say in a sentence why the generated text is empty; None if it is not."""
    reasons = {
        "eot": "The text ends at once: the model's first token is the end of text.",
        "stop": "The text ends at once: it begins with a stop string.",
    }
    return None if generation.text else reasons.get(generation.finish_reason)
