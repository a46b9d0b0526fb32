"""What `prepare` and `convert` did, as data and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from mvpfx.comparison import Comparison
from mvpfx.kernels.weight import values_of
from mvpfx.native_linear import NativeLinear
from mvpfx.pipeline import Decision, Record
from mvpfx.program import Program
from mvpfx.scheduler import refresh_weights
from mvpfx.site import Site
from mvpfx.state import State, inner_model, state_of
from mvpfx.storage import SparseLinear
from mvpfx.totals import Totals

_DENSE_GRANULARITY = "-"


@dataclass(frozen=True)
class Row:
    """One site before and after conversion.

    Attributes:
        site: the weight's full name.
        shape_before, shape_after: of the matrix that is multiplied.
        granularity: what it was pruned in; "-" where it was not pruned by this package.
        kept, total: nonzero values after, all values before.
        storage: dense, reduced, csr, bsr, native or native_dense.
        bytes_before, bytes_after: of the weight with its indices, without the bias.
        before_ms, after_ms: measured at `tokens` rows of activations; None where not measured.
    """

    site: str
    shape_before: tuple[int, ...]
    shape_after: tuple[int, ...]
    granularity: str
    kept: int
    total: int
    storage: str
    bytes_before: int
    bytes_after: int
    tokens: int | None = None
    before_ms: float | None = None
    after_ms: float | None = None

    @property
    def density(self) -> float:
        """Fraction of the original values that is kept."""
        return self.kept / self.total if self.total else 0.0


@dataclass
class Report:
    """What `convert` did.

    Attributes:
        records: one entry a pass.
        rows: one entry a site.
        max_difference: largest absolute difference of outputs, masked against converted, on the
            example inputs; None where none were given.
        latency_before_ms, latency_after_ms: of the whole model on the example inputs; None where
            not measured.
        before, after: what the whole model holds and computes, dense and converted.
    """

    records: list[Record] = field(default_factory=list[Record])
    rows: list[Row] = field(default_factory=list[Row])
    max_difference: float | None = None
    latency_before_ms: float | None = None
    latency_after_ms: float | None = None
    before: Totals | None = None
    after: Totals | None = None

    @property
    def decisions(self) -> list[Decision]:
        """Every decision of every pass, in order."""
        return [decision for record in self.records for decision in record.decisions]


def make_report(
    program: Program,
    records: list[Record],
    comparison: Comparison | None,
    version: str,
    totals: Sequence[Totals],
) -> Report:
    """Return the report of a converted model.

    Args:
        program: after all passes.
        records: of all passes.
        comparison: with the masked model, None where there were no example inputs.
        version: which of the compared versions was taken; "dense" is the one before.
        totals: of the model before and after.
    """
    report = Report(records, make_rows(program))
    report.before, report.after = totals
    if comparison is not None:
        report.max_difference = comparison.difference
        report.latency_before_ms = comparison.latency["dense"].median_ms
        report.latency_after_ms = comparison.latency[version].median_ms
    return report


def make_rows(program: Program) -> list[Row]:
    """Return one row a site of a program that went through the passes of convert; one an expert
    where a site stacks them.
    """
    rows: list[Row] = []
    for site in program.sites.values():
        before = _raw(program.model, site.name)
        module = program.module(site.module_name)
        if isinstance(module, (SparseLinear, NativeLinear)):
            values, after_bytes = values_of(module), module.storage_bytes
            shape_after = (module.out_features, module.in_features)[:: 1 - 2 * site.out_dim]
        else:
            value = program.parameter(site.name)
            assert value is not None
            values, after_bytes, shape_after = value, _bytes(value), tuple(value.shape)
        rule = program.rules.get(site.name)
        timing = program.timings.get(site.name)
        storage = program.storages.get(site.name, "dense")
        for name, part in site_parts(site, values.detach()):
            rows.append(
                Row(
                    name,
                    site.shape[1:] if site.parts > 1 else site.shape,
                    shape_after[1:] if site.parts > 1 else shape_after,
                    str(rule.granularity) if rule is not None else _DENSE_GRANULARITY,
                    int(torch.count_nonzero(part)),
                    before.numel() // site.parts,
                    storage,
                    _bytes(before) // site.parts,
                    after_bytes // site.parts,
                    timing.tokens if timing else None,
                    timing.before_ms if timing else None,
                    timing.after_ms(storage) if timing else None,
                )
            )
    return rows


def sparsity_table(model: nn.Module) -> str:
    """Return a table of a prepared or converted model, one line a site, with totals.

    A prepared model shows the current density and the target of the schedule; a converted one
    shapes, bytes and (where measured) milliseconds of the matmul before and after.

    Raises:
        ValueError: the model is neither prepared nor converted.
    """
    state = state_of(model)
    if state.report is not None:
        return converted_table(state.report.rows)
    return _prepared_table(inner_model(model), state)


def converted_table(rows: Sequence[Row]) -> str:
    """Return the table of a converted model.

    Its total has the density of the weights that were pruned, as the table of the prepared model
    has, and the bytes and milliseconds of all lines: layers that were not pruned have lines too.
    """
    timed = any(row.before_ms is not None for row in rows)
    headers = ["site", "shape", "granularity", "density", "kept / total", "storage"]
    headers += ["bytes before", "bytes after", *(["ms before", "ms after"] if timed else [])]
    lines = [_line(row, timed) for row in rows]
    pruned = [row for row in rows if row.granularity != _DENSE_GRANULARITY] or rows
    kept, total = sum(r.kept for r in pruned), sum(r.total for r in pruned)
    before, after = sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows)
    totals: list[Any] = ["total", "", "", _ratio(kept, total), f"{kept:,} / {total:,}", ""]
    totals += [f"{before:,}", f"{after:,}"]
    if timed:
        totals += [_ms([r.before_ms for r in rows]), _ms([r.after_ms for r in rows])]
    return _tabulate([*lines, totals], headers)


def _line(row: Row, timed: bool) -> list[Any]:
    shape = _shape(row.shape_before)
    if row.shape_after != row.shape_before:
        shape += f" -> {_shape(row.shape_after)}"
    counts = f"{row.kept:,} / {row.total:,}"
    line: list[Any] = [row.site, shape, row.granularity, f"{row.density:.4f}", counts, row.storage]
    line += [f"{row.bytes_before:,}", f"{row.bytes_after:,}"]
    return line + ([_ms([row.before_ms]), _ms([row.after_ms])] if timed else [])


def _prepared_table(model: nn.Module, state: State) -> str:
    headers = ["site", "shape", "granularity", "density", "target now", "target", "kept / total"]
    lines: list[list[Any]] = []
    sums = [0, 0]
    refresh_weights(model)
    for site in state.sites.values():
        mask: Any = model.get_submodule(f"{site.name}_mask")
        for name, part in site_parts(site, mask.mask()):
            kept, total = int(torch.count_nonzero(part)), part.numel()
            sums = [sums[0] + kept, sums[1] + total]
            line = [name, _shape(part.shape), str(mask.rule.granularity), _ratio(kept, total)]
            lines.append([*line, *_targets(mask), f"{kept:,} / {total:,}"])
    totals = ["total", "", "", _ratio(*sums), "", "", f"{sums[0]:,} / {sums[1]:,}"]
    return _tabulate([*lines, totals], headers)


def _targets(mask: Any) -> list[str]:
    """What the schedule asks for now and at the end; without a density, the threshold."""
    if mask.steered is not None:
        return [f"{mask.steered:.4f}", f"{mask.rule.density:.4f}"]
    if mask.density is None:
        return [f"tau {mask.threshold:.4f}", f"tau {mask.rule.threshold:.4f}"]
    return [f"{mask.density:.4f}", f"{mask.rule.density:.4f}"]


def site_parts(site: Site, values: Tensor) -> list[tuple[str, Tensor]]:
    """The matrices of a site with their names: itself, or each expert that it stacks."""
    if site.parts == 1:
        return [(site.name, values)]
    return [(f"{site.name}[{index}]", part) for index, part in enumerate(values)]


def _raw(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    value = model.get_submodule(owner)._parameters[leaf]
    assert value is not None
    return value


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def _ratio(kept: int, total: int) -> str:
    return f"{kept / total:.4f}" if total else "-"


def _ms(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known):.3f}" if known else ""


def _tabulate(lines: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    align = [
        "left" if h in ("site", "shape", "granularity", "storage") else "right" for h in headers
    ]
    return tabulate(lines, headers=headers, colalign=align, disable_numparse=True)
