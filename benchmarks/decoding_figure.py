"""The figure of greedy decoding with a real model, a pair of axes for every processor measured.

    python -m benchmarks.decoding_figure docs/images/smollm2_heads.svg

It draws the results of ``benchmarks.pretrained_heads`` in ``benchmarks/results``.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.harness import ROOT, Row
from mtp_lightning.command_line.shell import Parser, readable_errors
from mtp_lightning.run.atomic import write_bytes
from sweeps.claims.figure import digest
from sweeps.report.chart import COLORS, INK, QUIET, Chart, Look, styled

RESULTS = ROOT / "benchmarks" / "results"
# The ways in the order of their bars, and what people call them.
WAYS = {
    "transformers": ("transformers", QUIET),
    "llama.cpp": ("llama.cpp", COLORS[4]),
    "plain": ("here, plain", COLORS[0]),
    "drafts": ("here, with drafts", COLORS[2]),
    "drafts_of_both": ("here, with lookups, too", COLORS[1]),
}


def best_of(rows: list[Row]) -> str:
    """The way of drafting by heads whose mean speed over plain decoding is the highest."""
    others = ("drafts_of_the_text", "drafts_of_both")
    ways = [name for name in rows[0] if name.startswith("drafts") and name not in others]
    return max(ways, key=lambda way: sum(row[way]["over_plain_cpu"] for row in rows))


def draw(results: list[Row]) -> bytes:
    """The figure as SVG: tokens per second of one thread by kind of text."""
    with styled():
        there = {name for result in results for name in result["rows"][0]} | {"drafts"}
        key = [(name, Look(color, "", "s")) for way, (name, color) in WAYS.items() if way in there]
        chart = Chart(key, panels=len(results))
        for axes, result in zip(chart.panels, results, strict=True):
            rows = [row for row in result["rows"] if row["temperature"] == 0]
            own = {"drafts": best_of(rows)}
            ways = [way for way in WAYS if own.get(way, way) in rows[0]]
            width = 0.8 / len(ways)
            for i, way in enumerate(ways):
                at = [n + (i - (len(ways) - 1) / 2) * width for n in range(len(rows))]
                found = [row[own.get(way, way)]["tokens_per_cpu_second"] for row in rows]
                axes.bar(at, found, 0.92 * width, color=WAYS[way][1])
                for x, y in zip(at, found, strict=True):
                    axes.annotate(f"{y:.0f}", (x, y), ha="center", va="bottom", fontsize=8)
            if limit := result.get("memory_limit"):
                axes.axhline(limit, color=INK, linestyle=":", linewidth=1.2)
                said = "reading the weights once a token"
                place = axes.get_yaxis_transform()
                axes.text(0.01, limit, said, transform=place, va="bottom", fontsize=8)
            axes.set_xticks(range(len(rows)), [row["kind"] for row in rows])
            axes.grid(visible=False, axis="x")
            gains = [row[own["drafts"]]["over_plain_cpu"] for row in rows]
            steps = f", head of {result['head']['steps']:,} steps" if "head" in result else ""
            gain = f"drafts make {min(gains):.2f} to {max(gains):.2f} x plain"
            axes.set_title(f"{result['processor']}{steps}\n{gain}", fontsize=10)
            if axes.get_subplotspec().is_first_col():
                axes.set_ylabel("tokens per CPU second (higher is better)")
        return chart.svg(of=digest(results))


def stored() -> list[Row]:
    """The results of all processors."""
    files = sorted(RESULTS.glob("pretrained_heads*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def main() -> None:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.decoding_figure", description=__doc__)
    parser.add_argument("figure", type=Path, help="the SVG file that is written")
    args = parser.parse_args()
    with readable_errors():
        write_bytes(draw(stored()), args.figure)


if __name__ == "__main__":
    main()
