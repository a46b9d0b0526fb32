"""The tables of docs/cpu.md, made from `results/cpu_inference/`, one part a kind of processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from benchmarks import inference_plot
from benchmarks.inference_cells import Cell, curves
from benchmarks.inference_models import DENSE, FOR_PEOPLE

BEGIN = "<!-- cpu inference: made by python -m benchmarks.readme -->"
END = "<!-- end of cpu inference -->"
SUMMARY_BEGIN = "<!-- cpu summary: made by python -m benchmarks.readme -->"
SUMMARY_END = "<!-- end of cpu summary -->"
OWN, REFERENCE = "mvpfx", "torch"


def table(results: Mapping[str, list[dict[str, Any]]]) -> str:
    """What was found on each kind of processor."""
    parts = [part(processor, lines) for processor, lines in results.items()]
    return "\n\n".join(each for each in parts if each) or "No result file yet."


def part(processor: str, lines: list[dict[str, Any]]) -> str:
    """The plot, each engine on BERT-base, all else as ratios, and what it was measured on."""
    found = curves(lines)
    if not found:
        return ""
    shown = [line for curve in found.values() for line in curve.values()]
    parts = [
        f"### {full_name(processor, shown[0])}",
        *(
            [f"![Latency against density](images/{inference_plot.file_name(processor)})"]
            if inference_plot.points(lines)
            else []
        ),
        detail(found),
        overview(found),
        slowest(shown),
        "\n".join([*machines(shown), "", *notes(shown)]),
    ]
    return "\n\n".join(part for part in parts if part)


def summary(results: Mapping[str, list[dict[str, Any]]]) -> str:
    """For README: single weights of BERT-base, as times faster, on each kind of processor."""
    densities: dict[float, None] = {}
    rows: list[dict[str, str]] = []
    for processor, lines in results.items():
        for cell, curve in curves(lines).items():
            if (cell.model, cell.pattern) != (inference_plot.MODEL, "unstructured"):
                continue
            sparse = {density: line for density, line in curve.items() if density < 1}
            densities |= dict.fromkeys(sparse)
            line = next(iter(sparse.values()))
            rows.append(
                {
                    "processor": full_name(processor, line),
                    "dtype": cell.dtype,
                    "batch": str(cell.batch),
                    "threads": str(cell.threads),
                    **{f"{d:.0%}": both(line) for d, line in sparse.items()},
                }
            )
    if not rows:
        return "No result file yet."
    columns = [f"{density:.0%}" for density in sorted(densities, reverse=True)]
    names = ("processor", "dtype", "batch", "threads", *columns)
    table = [[row.get(name, "") for name in names] for row in rows]
    return tabulate(table, headers=names, tablefmt="github", disable_numparse=True)


def full_name(processor: str, line: dict[str, Any]) -> str:
    """A processor's name, and what tells it from others that have the same."""
    environment = line["environment"]
    kept = "kept to " if "kept_to" in environment else ""
    return f"{environment['processor']}, {kept}{processor.partition('-')[0]}"


def detail(found: dict[Cell, dict[float, dict[str, Any]]]) -> str:
    """Medians of every engine on what the plot shows, one row a cell."""
    wanted = (inference_plot.MODEL, inference_plot.DTYPE, inference_plot.THREADS)
    chosen = {c: curve for c, curve in found.items() if (c.model, c.dtype, c.threads) == wanted}
    # The dense model, which stands in several curves, is one row.
    once = {Cell(**line["cell"]): line for curve in chosen.values() for line in curve.values()}
    rows = [
        {
            "zeros": zeros(cell),
            "batch": str(cell.batch),
            "density": f"{cell.density:g}",
            **{f"{name}, ms": median(line, name) for name in inference_plot.COLOURS},
            "faster than torch": times(line, REFERENCE),
            "than the fastest other": fastest_other(line),
            "storages": storages(line),
        }
        for cell, line in once.items()
    ]
    if not rows:
        return ""
    text = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    model, dtype, threads = wanted
    return f"Medians, {FOR_PEOPLE[model]}'s shape, {dtype}, {threads} thread:\n\n{text}"


def overview(found: dict[Cell, dict[float, dict[str, Any]]]) -> str:
    """How many times faster than torch and than what was faster: one row a curve."""
    densities = sorted({density for curve in found.values() for density in curve}, reverse=True)
    rows = [
        {
            "model": FOR_PEOPLE[cell.model],
            "zeros": zeros(cell),
            "dtype": cell.dtype,
            "batch": str(cell.batch),
            "threads": str(cell.threads),
            **{f"{d:g}": both(curve[d]) if d in curve else "" for d in densities},
        }
        for cell, curve in found.items()
    ]
    text = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    return (
        "How many times faster mvpfx is than dense torch, and than the fastest other engine where "
        f"one was faster than torch, by density:\n\n{text}"
    )


def slowest(lines: list[dict[str, Any]]) -> str:
    """In how many cells mvpfx ran, and the one where it gains least over torch."""
    gains = {
        Cell(**line["cell"]): line["engines"][REFERENCE]["median"] / line["engines"][OWN]["median"]
        for line in lines
        if times(line, REFERENCE) != "-"
    }
    if not gains:
        return ""
    least = min(gains, key=gains.__getitem__)
    return f"Of {len(gains)} cells mvpfx gains least in this: {gains[least]:.2f}x, {least}."


def zeros(cell: Cell) -> str:
    """The pattern, with the size of its blocks where that was chosen."""
    if cell.pattern == DENSE:
        return "none"
    return f"{cell.pattern} {cell.block}" if cell.block else cell.pattern


def median(line: dict[str, Any], name: str) -> str:
    """Of an engine, "-" where it did not run."""
    found = line["engines"].get(name, {})
    return f"{found['median']:.1f}" if "median" in found else "-"


def times(line: dict[str, Any], name: str) -> str:
    """How many times faster than an engine mvpfx is; "-" where either did not run."""
    found = line["engines"]
    if "median" not in found.get(OWN, {}) or "median" not in found.get(name, {}):
        return "-"
    return f"{found[name]['median'] / found[OWN]['median']:.2f}x"


def fastest_other(line: dict[str, Any]) -> str:
    """The same against the fastest of the other engines, which is named."""
    if times(line, REFERENCE) == "-":
        return "-"
    name = fastest(line)
    return f"{times(line, name)} {name}"


def both(line: dict[str, Any]) -> str:
    """Against torch, and against the fastest other engine where that is another, in one field."""
    ratio = times(line, REFERENCE)
    if ratio == "-" or fastest(line) == REFERENCE:
        return ratio
    return f"{ratio}, {fastest_other(line)}"


def fastest(line: dict[str, Any]) -> str:
    """Of the engines that are not ours, torch among them, the one with the lowest median."""
    others = {
        name: found["median"]
        for name, found in line["engines"].items()
        if name != OWN and "median" in found
    }
    return min(others, key=lambda each: others[each])


def storages(line: dict[str, Any]) -> str:
    """How many weights mvpfx keeps in which storage."""
    found = line["engines"].get(OWN, {}).get("storages", {})
    return ", ".join(f"{count} {storage}" for storage, count in sorted(found.items()))


def machines(lines: list[dict[str, Any]]) -> list[str]:
    """What was measured on, and how far outputs were apart."""
    found = [machine(lines)]
    differences = [
        f"{difference:.0e} in {dtype}"
        for dtype in dict.fromkeys(line["cell"]["dtype"] for line in lines)
        if (difference := largest_difference(lines, dtype)) is not None
    ]
    said = f"Outputs of mvpfx differ from torch's by at most {', '.join(differences)}."
    return [*found, *([said] if differences else [])]


def machine(lines: list[dict[str, Any]]) -> str:
    """The processor, the versions and the rounds of lines of one kind of processor."""
    every = [line["environment"] for line in lines]
    names = ("torch", "onnxruntime", "openvino", "deepsparse")
    known = {f"{n} {found[n]}": None for n in names for found in every if found[n][0].isdigit()}
    rounds = sorted({line["rounds"] for line in lines})
    counts = str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    limit = f", all kept to {every[0]['kept_to']}" if "kept_to" in every[0] else ""
    return (
        f"On {every[0]['processor']} ({', '.join(every[0]['flags'])}){limit}, {', '.join(known)}; "
        f"sequences of {lines[0]['shape']['sequence']} tokens, medians of {counts} interleaved "
        "rounds."
    )


def largest_difference(lines: list[dict[str, Any]], dtype: str) -> float | None:
    """Of mvpfx's outputs to those of torch, over all cells of a dtype."""
    own = [line["engines"].get(OWN, {}) for line in lines if line["cell"]["dtype"] == dtype]
    return max((f["largest_output_difference"] for f in own if "median" in f), default=None)


def notes(lines: list[dict[str, Any]]) -> list[str]:
    """Why engines did not run, each reason once."""
    where: dict[tuple[str, str], dict[str, None]] = {}
    for line in lines:
        cell = line["cell"]
        for name, found in line["engines"].items():
            for verb in ("cannot", "left_out"):
                if verb in found:
                    key = (f"{name} {verb.replace('left_out', 'is left out')}", found[verb])
                    what = f"{FOR_PEOPLE[cell['model']]} in {cell['dtype']}"
                    where.setdefault(key, {})[what] = None
    return [f"- {who} ({'; '.join(what)}): `{why}`" for (who, why), what in where.items()]
