"""A recorded terminal as a picture, light and dark: what a newcomer sees of the first command.

    script -q -f -c 'stty cols 100; python train.py' typescript
    python docs/terminal.py typescript docs/assets/terminal 'python train.py'

The bar is shown where it stood about a third of the way; everything else is as it was printed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rich.console import CONSOLE_SVG_FORMAT, Console  # type: ignore[attr-defined]
from rich.terminal_theme import DIMMED_MONOKAI, TerminalTheme
from rich.text import Text

WIDTH = 100
LIGHT = TerminalTheme(
    (255, 255, 255),
    (31, 39, 48),
    [
        *((31, 39, 48), (160, 40, 40), (20, 110, 60), (130, 85, 0)),
        *((37, 102, 168), (140, 50, 140), (0, 105, 120), (90, 100, 110)),
    ],
)
# Rich names a font on the network; a page that shows the picture shall ask nobody.
FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL).replace(
    "Fira Code", "ui-monospace"
)
_CONTROL = re.compile(r"\x1b\[\??[\d;]*[A-HJKfhlnrsu]|\x1b[=>]")
_BAR = re.compile(r"train: +\d+%.*?(?=\r|\Z)")


def lines(typescript: str) -> list[str]:
    """What stood on the screen, each line as it was last written; the bar once."""
    text = re.sub(r"^Script (started|done).*\n?", "", typescript, flags=re.MULTILINE)
    shown: list[str] = []
    bars: list[str] = []
    for line in _CONTROL.sub("", text).replace("\r\n", "\n").split("\n"):
        bars += [bar for bar in _BAR.findall(line) if " L0 " in bar]
        last = next((part for part in reversed(line.split("\r")) if part.strip()), "")
        if not _BAR.match(last):
            shown.append(last.rstrip())
        elif not any(map(_BAR.match, shown)):
            shown.append(last)
    at = next((i for i, line in enumerate(shown) if _BAR.match(line)), None)
    if at is not None and bars:
        shown[at] = bars[len(bars) // 3].strip()
    # Redrawing the bar leaves empty lines.
    return [line for line in shown if line.strip()]


def picture(shown: list[str], command: str, theme: TerminalTheme) -> str:
    """The SVG."""
    with open("/dev/null", "w") as nowhere:
        console = Console(width=WIDTH, record=True, file=nowhere, force_terminal=True)
        console.print(Text(f"$ {command}", style="bold"))
        for line in shown:
            console.print(Text.from_ansi(line), overflow="crop", no_wrap=True, crop=True)
        return console.export_svg(
            title=command, theme=theme, code_format=FORMAT, unique_id="terminal"
        )


def main(typescript: str, target: str, command: str = "python train.py") -> None:
    """Write both pictures."""
    shown = lines(Path(typescript).read_text(encoding="utf-8", errors="replace"))
    for name, theme in (("light", LIGHT), ("dark", DIMMED_MONOKAI)):
        Path(f"{target}-{name}.svg").write_text(picture(shown, command, theme), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
