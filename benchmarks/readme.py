"""README's tables and those of docs/, made from the committed result files.

`python -m benchmarks.readme` writes them into the pages, and draws the plots of docs/cpu.md. A
table stands in the page that has its markers: to move it, move them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import (
    accuracy,
    accuracy_table,
    architectures,
    coverage_table,
    inference_cells,
    inference_plot,
    inference_profile,
    inference_table,
    presets,
    removal,
    results_file,
    structured_table,
    training_step_table,
)

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
BEGIN = "<!-- results: made by python -m benchmarks.readme -->"
END = "<!-- end of results -->"


def row(result: dict[str, Any]) -> dict[str, str]:
    """One result as a row."""
    accuracy, size = result["test_accuracy"], result["file_bytes"]
    latency = {name: times["median"] for name, times in result["latency_ms"].items()}
    settings = result["settings"]
    half = latency["dense"] / latency["converted_at_density_0.5"]
    return {
        "task": result["workload"],
        "pruned": presets.WHAT[settings["granularity"]],
        "remaining weights": f"{settings['density']:.0%}",
        "accuracy, dense": f"{accuracy['dense']:.3f}",
        "pruned and converted": f"{accuracy['converted']:.3f}",
        "file, MB": f"{size['dense'] / 1e6:.1f} → {size['converted'] / 1e6:.1f}",
        "latency, ms": f"{latency['dense']:.1f} → {latency['converted']:.1f}",
        "faster": f"{latency['dense'] / latency['converted']:.2f}x",
        "faster at 50%": f"{half:.2f}x",
        "largest difference": f"{result['largest_output_difference']:.0e}",
    }


def table(results: list[dict[str, Any]]) -> str:
    """The table in Markdown, and what it was measured on."""
    results = [result for result in results if result["benchmark"] == "fine_prune"]
    rows = [row(result) for result in results]
    if not rows:
        return "No result files yet."
    machines = sorted({machine(result) for result in results})
    text = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    return f"{text}\n\n" + "\n".join(machines)


def machine(result: dict[str, Any]) -> str:
    """What a latency was measured on, and on what input."""
    environment = result["environment"]
    return (
        f"{result['workload']}: {result['timed']} on {environment['threads']} thread(s) of "
        f"{environment['processor']} ({environment['instructions']}), "
        f"torch {environment['torch']}, medians of interleaved runs.  "
    )


def fill(page: str, content: str, begin: str = BEGIN, end: str = END) -> str:
    """`page` with `content` between the markers."""
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"a page lacks the markers {begin!r} and {end!r}. Put them back")
    return f"{before}{begin}\n{content}\n{end}{after}"


def studied(results: list[dict[str, Any]]) -> str:
    """The table of the study of criteria, which has a result file of its own."""
    return accuracy_table.table(list(accuracy.done(accuracy.RESULT).values()))


def inference(results: list[dict[str, Any]]) -> str:
    """The tables of inference on a CPU, which has result files of its own, too."""
    return inference_table.table(inference_cells.results())


def inference_summary(results: list[dict[str, Any]]) -> str:
    """A part of them, for README."""
    return inference_table.summary(inference_cells.results())


def of_folder(benchmark: Any) -> Callable[[list[dict[str, Any]]], str]:
    """What makes the table of a benchmark that has a folder of result files of its own, too."""
    return lambda results: benchmark.table(results_file.read_all(benchmark.FOLDER))


TABLES: dict[tuple[str, str], Callable[[list[dict[str, Any]]], str]] = {
    (BEGIN, END): table,
    (accuracy_table.BEGIN, accuracy_table.END): studied,
    (inference_table.BEGIN, inference_table.END): inference,
    (inference_table.SUMMARY_BEGIN, inference_table.SUMMARY_END): inference_summary,
    (architectures.BEGIN, architectures.END): of_folder(architectures),
    (inference_profile.BEGIN, inference_profile.END): of_folder(inference_profile),
    (removal.BEGIN, removal.END): of_folder(removal),
    (coverage_table.BEGIN, coverage_table.END): coverage_table.table,
    (structured_table.LATENCY_BEGIN, structured_table.LATENCY_END): structured_table.latency,
    (training_step_table.BEGIN, training_step_table.END): training_step_table.table,
    (structured_table.PEERS_BEGIN, structured_table.PEERS_END): structured_table.peers,
}
"""Markers -> what makes the table between them."""


def render(page: str, results: list[dict[str, Any]]) -> str:
    """`page` with all of its tables made anew."""
    for (begin, end), make in TABLES.items():
        if begin in page or end in page:
            page = fill(page, make(results), begin, end)
    return page


def main() -> None:
    """Write the tables into the pages, and draw the plots."""
    inference_plot.main()
    results = results_file.read_all()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(render(text, results), encoding="utf-8")


if __name__ == "__main__":
    main()
