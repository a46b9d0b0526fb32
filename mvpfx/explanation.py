"""Every decision made for a model, as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tabulate import tabulate
from torch import nn

from mvpfx.facts import NATIVE
from mvpfx.kernels.library import MISSING, isa
from mvpfx.kernels.operators import faults
from mvpfx.pipeline import Decision
from mvpfx.region import NOT_CALLED, region_of
from mvpfx.report import Report
from mvpfx.state import State, inner_model, state_of
from mvpfx.totals import Totals

_TOTALS = {
    "parameters": "parameters",
    "nonzero": "nonzero parameters",
    "tensor_bytes": "bytes",
    "flops": "FLOPs",
}


def explain(model: nn.Module) -> str:
    """Return every decision made for a prepared or converted model, by site, with its reason.

    `+` marks what was done, `-` what was declined.

    Raises:
        ValueError: the model is neither prepared nor converted.
    """
    state, model = state_of(model), inner_model(model)
    report = state.report
    if report is not None:
        decisions = list(report.decisions)
    else:
        made = [decision for record in state.records for decision in record.decisions]
        decisions = [decision for decision in made if decision.reason != NOT_CALLED]
    lines = [decisions_text([*_calls(model, state), *decisions, *state.late])]
    if report is not None:
        lines += _outcome(report)
    return "\n".join(line for line in lines if line)


def decisions_text(decisions: Iterable[Decision]) -> str:
    """Return decisions as text, grouped by site in the order sites first appear."""
    by_site: dict[str, list[Decision]] = {}
    for decision in decisions:
        by_site.setdefault(decision.site, []).append(decision)
    lines: list[str] = []
    for site, group in by_site.items():
        lines.append(site or "(model)")
        lines += [f"  {'+' if d.applied else '-'} {d.action}: {d.reason}" for d in group]
    return "\n".join(lines)


def _calls(model: nn.Module, state: State) -> Iterator[Decision]:
    """What became of the calls of a model's regions: graphs, or the own forward."""
    converted = state.report is not None
    names = [name for name, _ in model.named_modules()] if converted else state.regions
    for name in names:
        module = model.get_submodule(name)
        for reason, times in faults(module).items():
            yield Decision(name, "native kernels", False, f"{reason} ({_count(times, 'time')})")
        region = region_of(module)
        if region is None:
            continue
        if region.calls:
            graphs = len(region.captured())
            reason = f"{_count(region.calls, 'call')} ran as {_count(graphs, 'graph')}"
            yield Decision(name, "capture", True, reason)
        for reason, calls in region.declined.items():
            text = f"{reason} ({_count(calls, 'call')} ran its own forward)"
            yield Decision(name, "capture", False, text)
        for reason, times in region.faults.items():
            yield Decision(name, "native kernels", False, f"{reason} ({_count(times, 'time')})")
        if not (region.calls or region.declined or converted or name in state.graphs):
            yield Decision(name, "capture", False, NOT_CALLED)


def _outcome(report: Report) -> list[str]:
    lines: list[str] = []
    if report.rows and all(r.bytes_after >= r.bytes_before for r in report.rows):
        lines.append("Nothing was gained: no site became smaller.")
    if report.before is not None and report.after is not None:
        lines.append(totals_table(report.before, report.after))
    if any(row.storage in NATIVE for row in report.rows):
        lines.append(f"Native kernels: {isa() or MISSING}")
    elif report.rows and isa() is None:
        lines.append(f"Sparse weights are multiplied by torch.sparse: {MISSING}.")
    if report.max_difference is not None:
        lines.append(f"Largest output difference, masked vs converted: {report.max_difference:.2e}")
    if report.latency_before_ms is not None and report.latency_after_ms is not None:
        before, after = report.latency_before_ms, report.latency_after_ms
        lines.append(f"Latency: {before:.2f} ms -> {after:.2f} ms ({before / after:.2f}x)")
    return lines


def totals_table(before: Totals, after: Totals) -> str:
    """Return a whole model before and after conversion as text."""
    lines: list[list[str]] = []
    for name, label in _TOTALS.items():
        first, last = getattr(before, name), getattr(after, name)
        if first and last is not None:
            lines.append([label, f"{first:,}", f"{last:,}", f"{last / first:.4f}"])
    headers = ["whole model", "before", "after", "ratio"]
    align = ("left", "right", "right", "right")
    return tabulate(lines, headers=headers, colalign=align, disable_numparse=True)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
