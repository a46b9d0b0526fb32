"""README's table of what capturing covers, made from `results/coverage.json`."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

BEGIN = "<!-- coverage: made by python -m benchmarks.readme -->"
END = "<!-- end of coverage -->"


def table(results: list[dict[str, Any]]) -> str:
    """One row a kind of model, then what was not captured or not found, with its reason."""
    found = [result for result in results if result["benchmark"] == "coverage"]
    if not found:
        return "No result file yet."
    models: list[dict[str, Any]] = found[0]["models"]
    groups = list(dict.fromkeys(model["group"] for model in models))
    rows = [row(group, [m for m in models if m["group"] == group]) for group in groups]
    rows.append(total(found[0]["totals"]))
    text = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    return "\n".join([text, "", *(f"- {line}" for line in notes(models))]).rstrip()


def row(group: str, models: list[dict[str, Any]]) -> dict[str, str]:
    """One kind of model."""
    return {
        "kind": group,
        "models": ", ".join(model["name"] for model in models),
        "equal": ratio(models, "shapes_equal", "shapes"),
        "largest difference": f"{max(m['largest_relative_difference'] for m in models):.0e}",
        "regions captured": ratio([m["regions"] for m in models], "captured", "total"),
        "weights found": ratio([m["sites"] for m in models], "found", "expected"),
    }


def total(totals: dict[str, Any]) -> dict[str, str]:
    """The last row."""
    return {
        "kind": "all",
        "models": str(totals["models"]),
        "equal": ratio([totals], "shapes_equal", "shapes"),
        "largest difference": "",
        "regions captured": ratio([totals["regions"]], "captured", "total"),
        "weights found": ratio([totals["sites"]], "found", "expected"),
    }


def ratio(counts: list[dict[str, int]], part: str, whole: str) -> str:
    """Sums as "part / whole"."""
    return f"{sum(c[part] for c in counts)} / {sum(c[whole] for c in counts)}"


def notes(models: list[dict[str, Any]]) -> list[str]:
    """Every region that was not captured and every weight that is no site, with the reason."""
    lines: list[str] = []
    for model in models:
        reasons = {reason for found in model["misses"].values() for reason in found}
        if reasons:
            count = len(model["misses"])
            regions = f"{count} region{'s' if count > 1 else ''}"
            lines.append(f"{model['name']}: {regions} not captured: {'; '.join(sorted(reasons))}.")
        for reason in sorted(set(model["documented"].values())):
            names = [name for name, why in model["documented"].items() if why == reason]
            lines.append(
                f"{model['name']}: no site: {', '.join(f'`{n}`' for n in names)}: {reason}."
            )
    return lines
