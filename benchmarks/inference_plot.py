"""Latency against density, a line an engine: docs/images/, a plot each kind of processor.

    python -m benchmarks.inference_plot

BERT-base's shape in float32 on one thread; a row of panels a pattern of zeros, a column a batch.
`benchmarks.readme` draws it too. The file tells by a digest what points it was drawn from.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from benchmarks.inference_cells import curves, results
from benchmarks.inference_models import FOR_PEOPLE

IMAGES = Path(__file__).parent.parent / "docs" / "images"
MODEL, DTYPE, THREADS = "bert", "fp32", 1
COLOURS = {
    "mvpfx": "#c1272d",
    "deepsparse": "#0072b2",
    "openvino": "#009e73",
    "onnxruntime": "#e69f00",
    "torch.compile": "#7f7f7f",
    "torch": "#000000",
}

Points = dict[str, dict[str, list[tuple[float, float]]]]


def file_name(processor: str) -> str:
    """Of the plot of a kind of processor, in `IMAGES`."""
    return f"cpu_inference_{processor}.svg"


def points(lines: list[dict[str, Any]]) -> Points:
    """Panel -> engine -> pairs of density and median milliseconds, densest first."""
    found: Points = {}
    for cell, curve in curves(lines).items():
        if (cell.model, cell.dtype, cell.threads) != (MODEL, DTYPE, THREADS):
            continue
        panel = f"{cell.pattern} {cell.block or ''}".strip() + f", batch {cell.batch}"
        for engine in COLOURS:
            measured = {d: line["engines"].get(engine, {}) for d, line in curve.items()}
            pairs = [(d, each["median"]) for d, each in measured.items() if "median" in each]
            if pairs:
                found.setdefault(panel, {})[engine] = pairs
    return found


def digest(drawn: Points) -> str:
    """A text that is the same for the same points."""
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()[:16]


def draw(lines: list[dict[str, Any]], path: Path) -> bool:
    """Draw what there is. Returns False, and writes nothing, where there is none of it."""
    panels = points(lines)
    if not panels:
        return False
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    places = {panel: panel.split(", ") for panel in panels}
    rows = list(dict.fromkeys(row for row, _ in places.values()))
    columns = list(dict.fromkeys(column for _, column in places.values()))
    # The same points give the same file: no date, no random names.
    with matplotlib.rc_context({"svg.hashsalt": "mvpfx", "svg.fonttype": "none"}):
        figure = Figure(figsize=(4.6 * len(columns), 3.4 * len(rows) + 0.5), layout="constrained")
        for panel, (row, column) in places.items():
            place = rows.index(row) * len(columns) + columns.index(column) + 1
            axes: Any = figure.add_subplot(len(rows), len(columns), place)
            _draw_panel(axes, panel, panels[panel])
        shown = {engine for engines in panels.values() for engine in engines}
        handles: Any = [
            Line2D([], [], color=colour, marker="o", markersize=3, label=engine)
            for engine, colour in COLOURS.items()
            if engine in shown
        ]
        wide = 3 * len(columns)  # as many as fit below the panels
        figure.legend(handles=handles, loc="outside lower center", ncols=wide, frameon=False)
        figure.suptitle(f"{FOR_PEOPLE[MODEL]} shape, {DTYPE}, {THREADS} thread, 128 tokens")
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata: Any = {"Date": None, "Description": f"points {digest(panels)}"}
        figure.savefig(path, format="svg", metadata=metadata)
    return True


def _draw_panel(axes: Any, panel: str, engines: dict[str, list[tuple[float, float]]]) -> None:
    for engine, pairs in engines.items():
        densities, medians = zip(*pairs, strict=True)
        width = 2.2 if engine == "mvpfx" else 1.2
        axes.plot(densities, medians, "o-", color=COLOURS[engine], markersize=3, linewidth=width)
    from matplotlib.ticker import LogLocator, NullLocator

    ticks = sorted({density for pairs in engines.values() for density, _ in pairs})
    axes.set(xscale="log", yscale="log", title=panel, xlabel="density", ylabel="latency, ms")
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def main() -> None:
    """Draw from the result files."""
    for processor, lines in results().items():
        if not draw(lines, IMAGES / file_name(processor)):
            print(f"{processor} has no {FOR_PEOPLE[MODEL]}, {DTYPE}, {THREADS} thread yet")


if __name__ == "__main__":
    main()
