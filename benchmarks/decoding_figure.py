"""The figure of greedy decoding with a real model, a pair of axes for every processor measured.

    python -m benchmarks.decoding_figure docs/images/smollm2_heads.svg

It draws the results of ``benchmarks.pretrained_heads`` in ``benchmarks/results``.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness import ROOT, Row
from mtp_lightning.command_line.shell import Parser, readable_errors
from mtp_lightning.run.atomic import write_bytes
from sweeps.claims.figure import digest
from sweeps.claims.pages import measured_heads
from sweeps.report.chart import COLORS, INK, PAPER, QUIET, Chart, Look, styled

# The ways in the order of their bars, and what people call them.
WAYS = {
    "transformers": ("transformers", QUIET),
    "llama.cpp": ("llama.cpp", COLORS[4]),
    "plain": ("here, plain", COLORS[0]),
    "drafts": ("here, with drafts", COLORS[2]),
    "drafts_of_both": ("here, with lookups, too", COLORS[1]),
}
# The ground of a label, so that no line crosses it.
_PAPER = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.6}


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
        if any(result.get("memory_limit") for result in results):
            key.append(("reading the weights once a token", Look(INK, ":", "")))
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
                    axes.text(x, y, f"{y:.0f}", ha="center", va="bottom", fontsize=8, bbox=_PAPER)
            if limit := result.get("memory_limit"):
                axes.axhline(limit, color=INK, linestyle=":", linewidth=1.2, zorder=0.5)
            axes.margins(y=0.1)
            axes.set_xticks(range(len(rows)), [row["kind"] for row in rows])
            axes.grid(visible=False, axis="x")
            gains = [row[own["drafts"]]["over_plain_cpu"] for row in rows]
            steps = f"head of {result['head']['steps']:,} steps, " if "head" in result else ""
            gain = f"drafts make {min(gains):.2f} to {max(gains):.2f} x plain"
            axes.set_title(f"{result['processor']}\n{steps}{gain}", fontsize=10)
            if axes.get_subplotspec().is_first_col():
                axes.set_ylabel("tokens per CPU second (higher is better)")
        return chart.svg(source=digest(results))


def main() -> None:
    parser = Parser(prog="python -m benchmarks.decoding_figure", description=__doc__)
    parser.add_argument("figure", type=Path, help="the SVG file that is written")
    args = parser.parse_args()
    with readable_errors():
        write_bytes(draw(measured_heads(ROOT)), args.figure)


if __name__ == "__main__":
    main()
