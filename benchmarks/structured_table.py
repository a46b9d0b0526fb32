"""Tables of structured removal: its latency, and what peers make of the same channels."""

from __future__ import annotations

import re
from typing import Any

from tabulate import tabulate

PEERS_BEGIN = "<!-- structured peers: made by python -m benchmarks.readme -->"
PEERS_END = "<!-- end of structured peers -->"
LATENCY_BEGIN = "<!-- hybrid latency: made by python -m benchmarks.readme -->"
LATENCY_END = "<!-- end of hybrid latency -->"
MOST_OVER_BOUND = 1.15
"""Latency over its bound that was asked for."""
NAMES = {"torch_pruning": "torch-pruning", "torch_ao": "torch.ao.pruning"}


def latency(results: list[dict[str, Any]]) -> str:
    """A table for each processor."""
    found = [result for result in results if result["benchmark"] == "hybrid_latency"]
    return "\n\n".join(map(latency_of, found)) or "No result file yet."


def latency_of(result: dict[str, Any]) -> str:
    """One row a converted model, then what the columns are and what it was measured on."""
    rows = [latency_row(case, row) for case in result["cases"] for row in case["converted"]]
    text = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    environment, settings = result["environment"], result["settings"]
    shape = settings["shape"]
    machine = (
        f"{shape['layers']} layers of width {shape['hidden']}, {shape['heads']} heads, FFN "
        f"{shape['ffn']}, sequences of {shape['sequence']} tokens, on {environment['threads']} "
        f"thread(s) of {environment['processor']} ({environment['instructions']}), torch "
        f"{environment['torch']}, medians of {settings['rounds']} interleaved runs. The bound is "
        "the dense model's time outside its encoder linears, plus its time in them times the "
        f"density of what is stored; asked for was at most {MOST_OVER_BOUND} of it."
    )
    return f"{text}\n\n{machine}"


def latency_row(case: dict[str, Any], row: dict[str, Any]) -> dict[str, str]:
    """One converted model."""
    return {
        "dtype": case["dtype"],
        "batch": str(case["batch"]),
        "linear density, nonzero": f"{row['linear_density_nonzero']:.3f}",
        "stored": f"{row['linear_density_stored']:.3f}",
        "dense, ms": f"{case['dense_ms']['median']:.1f}",
        "of it linears": f"{case['dense_linears_ms']['median']:.1f}",
        "converted, ms (quartiles)": quartiles(row["latency_ms"]),
        "of it linears, ms": f"{row['linears_ms']['median']:.1f}",
        "faster": f"{row['faster']:.2f}x",
        "over the bound": f"{row['latency_over_bound']:.2f}",
    }


def quartiles(times: dict[str, float]) -> str:
    """A median with its quartiles."""
    return f"{times['median']:.1f} ({times['q1']:.1f} to {times['q3']:.1f})"


def peers(results: list[dict[str, Any]]) -> str:
    """One row a model and its biases, then why channels stayed or a peer could not."""
    found = [result for result in results if result["benchmark"] == "structured_peers"]
    if not found:
        return "No result file yet."
    rows = found[0]["rows"]
    text = tabulate(
        [peers_row(row) for row in rows],
        headers="keys",
        tablefmt="github",
        disable_numparse=True,
    )
    environment = found[0]["environment"]
    versions = f"torch-pruning {environment['torch-pruning']}, torch {environment['torch']}."
    return "\n".join([text, "", versions, "", *(f"- {line}" for line in notes(rows))])


def peers_row(row: dict[str, Any]) -> dict[str, str]:
    """One model."""
    cells = {
        "model": row["case"],
        "dead channels hand on": "zeros" if row["silent"] else "constants",
        "parameters": f"{row['parameters']:,}",
    }
    for key, name in {"mvpfx": "mvpfx", **NAMES}.items():
        answer = row[key]
        able = "cannot" not in answer
        cells[f"{name} leaves"] = f"{answer['parameters']:,}" if able else "cannot"
        cells[f"{name} differs"] = f"{answer['difference']:.0e}" if able else ""
    return cells


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """Why `convert` kept channels, and why a peer could not remove any; each reason once."""
    models: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for reason in row["mvpfx"]["left"]:
            models.setdefault(("mvpfx keeps", reason), []).append(row["case"])
    for row in rows:
        for key, name in NAMES.items():
            if "cannot" in row[key]:
                # A module's text is long; what is in its parentheses is in the result file.
                reason = re.sub(r"\(.*\)", "(...)", row[key]["cannot"])
                models.setdefault((f"{name} cannot", reason), []).append(row["case"])
    return [
        f"{who} ({'; '.join(dict.fromkeys(where))}): `{reason}`"
        for (who, reason), where in models.items()
    ]
