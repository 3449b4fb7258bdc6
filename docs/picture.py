"""docs/images/architecture.svg from the table of layers in docs/architecture.md.

python docs/picture.py
"""

from __future__ import annotations

import re
from pathlib import Path
from xml.sax.saxutils import escape

DOCS = Path(__file__).parent
SVG = DOCS / "images" / "architecture.svg"
_WIDTH, _ROW, _LEFT, _GAP = 720, 38, 110, 8


def layers() -> list[tuple[str, list[str]]]:
    """Name and modules of every layer, from the top."""
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- table: layers -->\n((?:\|.*\n)+)", page)
    assert found, "architecture.md has no table of layers"
    rows = [[cell.strip() for cell in line.split("|")] for line in found[1].splitlines()[2:]]
    return [(row[1], row[2].split(", ")) for row in rows]


def drawn(rows: list[tuple[str, list[str]]]) -> str:
    """The picture: a line of boxes for each layer."""
    height = len(rows) * _ROW + _GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="13">',
        "<style>text{fill:#1a237e} .layer{fill:#5c6bc0} "
        "rect{fill:#e8eaf6;stroke:#5c6bc0;rx:4px}</style>",
    ]
    for line, (name, modules) in enumerate(rows):
        y = _GAP + line * _ROW
        base = y + (_ROW - _GAP) / 2 + 5
        parts.append(f'<text class="layer" x="{_GAP}" y="{base:g}">{escape(name)}</text>')
        width = (_WIDTH - _LEFT - _GAP * len(modules)) / len(modules)
        for place, module in enumerate(modules):
            x = _LEFT + place * (width + _GAP)
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_ROW - _GAP}"/>')
            middle = f'x="{x + width / 2:.1f}" y="{base:g}" text-anchor="middle"'
            parts.append(f"<text {middle}>{escape(module)}</text>")
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    SVG.write_text(drawn(layers()), encoding="utf-8")
