"""The table of training steps: time and memory over those of dense fine-tuning."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

BEGIN = "<!-- training step: made by python -m benchmarks.readme -->"
END = "<!-- end of training step -->"


def table(results: list[dict[str, Any]]) -> str:
    """One row a way of training, a column for each cell: times, then memory; then what was measured
    alone.
    """
    found = [result for result in results if result["benchmark"] == "training_step"]
    if not found:
        return "No result file yet."
    (result,) = found
    cells = result["cells"]
    measured = [cell for cell in cells if _MEMORY in cell["rows"][0] and not cell["memory_kept"]]
    return "\n\n".join(
        [
            _table(cells, "time_over_dense", "{:.2f}"),
            time_notes(result),
            _table(measured, _MEMORY, "{:+.1f}"),
            _MEMORY_NOTE,
            *notes(result),
        ]
    )


_MEMORY = "bytes_a_prunable_weight"
_MEMORY_NOTE = (
    "Peak memory beyond the dense step's, of all tensors alive at once, in bytes a prunable weight."
)


def _table(cells: list[dict[str, Any]], figure: str, form: str) -> str:
    """One figure of each case in each cell."""
    names = dict.fromkeys(row["case"] for cell in cells for row in cell["rows"])
    rows = [row_of(name, cells, figure, form) for name in names]
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def row_of(name: str, cells: list[dict[str, Any]], figure: str, form: str) -> dict[str, str]:
    """One way of training: its figure in each cell, nothing where it was not measured."""
    shown = {"training": name}
    for cell in cells:
        known = next((row for row in cell["rows"] if row["case"] == name), {})
        shown[column(cell)] = form.format(known[figure]) if figure in known else ""
    return shown


def column(cell: dict[str, Any]) -> str:
    """The heading of a cell's times, with those of the dense step."""
    dense = cell["rows"][0]["ms"]["median"]
    compiled = ", compiled" if cell["mode"] == "compiled" else ""
    kept = ", memory kept" if cell["memory_kept"] else ""
    return (
        f"{cell['shape']}, {cell['tokens']:,} tokens{compiled}{kept} (dense: {dense / 1000:.2f} s)"
    )


def time_notes(result: dict[str, Any]) -> str:
    """What the times are."""
    environment, settings = result["environment"], result["settings"]
    cpu = f"{environment['processor']} ({environment['instructions']})"
    where = environment["device"] if environment["device"] != "cpu" else cpu
    sequences, optimizer = settings["sequences"], settings["optimizer"]
    return (
        "Time of a step over that of the dense one, taken in turns. "
        f"{sequences} sequences a step, {optimizer}, "
        f"random weights, density {settings['density']:.0%} and falling; "
        f"{environment['threads']} thread(s) of {where}, torch {environment['torch']}, medians of "
        "ratios in one round."
    )


def notes(result: dict[str, Any]) -> list[str]:
    """What was measured alone."""
    texts: list[str] = []
    alone = result.get("threshold")
    if alone is not None:
        texts.append(
            f"The exact threshold of {alone['scores'] / 1e6:.0f} M scores alone takes as long as "
            f"{alone['passes']:.1f} times `scores.sum()`, and {alone['extra_memory']:.1%} of their "
            "memory."
        )
    return texts + [
        f"Evaluation of a prepared {row['shape']} on {row['tokens']:,} tokens: "
        f"{row['time_over_dense']:.2f} of the dense model's time."
        for row in result.get("evaluation", [])
    ]
