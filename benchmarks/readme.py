"""README's tables, made from the committed result files.

`python -m benchmarks.readme` writes them into README.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import accuracy, accuracy_table, coverage_table, results_file

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- results: made by python -m benchmarks.readme -->"
END = "<!-- end of results -->"


def row(result: dict[str, Any]) -> dict[str, str]:
    """One result as a row."""
    accuracy, size = result["test_accuracy"], result["file_bytes"]
    latency = {name: times["median"] for name, times in result["latency_ms"].items()}
    settings = result["settings"]
    what = {"element": "single weights", "structured": "heads and FFN channels"}
    half = latency["dense"] / latency["converted_at_density_0.5"]
    return {
        "task": result["workload"],
        "pruned": what[settings["granularity"]],
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


def fill(readme: str, content: str, begin: str = BEGIN, end: str = END) -> str:
    """`readme` with `content` between the markers."""
    before, found_begin, rest = readme.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"README.md lacks the markers {begin!r} and {end!r}. Put them back")
    return f"{before}{begin}\n{content}\n{end}{after}"


def render(readme: str, results: list[dict[str, Any]]) -> str:
    """`readme` with all of its tables made anew."""
    coverage = coverage_table.table(results)
    studied = accuracy_table.table(list(accuracy.done(accuracy.RESULT).values()))
    filled = fill(readme, table(results))
    filled = fill(filled, studied, accuracy_table.BEGIN, accuracy_table.END)
    return fill(filled, coverage, coverage_table.BEGIN, coverage_table.END)


def main() -> None:
    """Write the tables into README.md."""
    text = README.read_text(encoding="utf-8")
    README.write_text(render(text, results_file.read_all()), encoding="utf-8")


if __name__ == "__main__":
    main()
