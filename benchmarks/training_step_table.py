"""The table of training steps: time and memory over those of dense fine-tuning."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

BEGIN = "<!-- training step: made by python -m benchmarks.readme -->"
END = "<!-- end of training step -->"


def table(results: list[dict[str, Any]]) -> str:
    """One row a way of training, a column of times for each cell; then what was measured alone."""
    found = [result for result in results if result["benchmark"] == "training_step"]
    if not found:
        return "No result file yet."
    (result,) = found
    cells = result["cells"]
    names = dict.fromkeys(row["case"] for cell in cells for row in cell["rows"])
    rows = [row_of(name, cells) for name in names]
    text = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    return "\n\n".join([text, *notes(result)])


def row_of(name: str, cells: list[dict[str, Any]]) -> dict[str, str]:
    """Times of one way of training, and the memory it takes where that was measured first."""
    row = {"training": name}
    bytes_a_weight = ""
    for cell in cells:
        known = next((row for row in cell["rows"] if row["case"] == name), None)
        row[column(cell)] = "" if known is None else f"{known['time_over_dense']:.2f}"
        if known is not None and not bytes_a_weight and "bytes_a_prunable_weight" in known:
            bytes_a_weight = f"{known['bytes_a_prunable_weight']:+.1f}"
    return {**row, "bytes a prunable weight": bytes_a_weight}


def column(cell: dict[str, Any]) -> str:
    """The heading of a cell's times, with those of the dense step."""
    dense = cell["rows"][0]["ms"]["median"]
    compiled = ", compiled" if cell["mode"] == "compiled" else ""
    kept = ", memory kept" if cell["memory_kept"] else ""
    return (
        f"{cell['shape']}, {cell['tokens']:,} tokens{compiled}{kept} (dense: {dense / 1000:.2f} s)"
    )


def notes(result: dict[str, Any]) -> list[str]:
    """What the figures are, and those of what was measured alone."""
    environment, settings = result["environment"], result["settings"]
    cpu = f"{environment['processor']} ({environment['instructions']})"
    where = environment["device"] if environment["device"] != "cpu" else cpu
    sequences, optimizer = settings["sequences"], settings["optimizer"]
    texts = [
        "Time of a step over that of the dense one, taken in turns, and peak memory beyond the "
        f"dense step's, of all tensors alive at once. {sequences} sequences a step, {optimizer}, "
        f"random weights, density {settings['density']:.0%} and falling; "
        f"{environment['threads']} thread(s) of {where}, torch {environment['torch']}, medians of "
        "ratios in one round."
    ]
    alone = result.get("threshold")
    if alone is not None:
        texts.append(
            f"The exact threshold of {alone['scores'] / 1e6:.0f} M scores alone takes as long as "
            f"{alone['passes']:.1f} times `scores.sum()`, and {alone['extra_memory']:.1%} of their "
            "memory."
        )
    texts += [
        f"Evaluation of a prepared {row['shape']} on {row['tokens']:,} tokens: "
        f"{row['time_over_dense']:.2f} of the dense model's time."
        for row in result.get("evaluation", [])
    ]
    return texts
