"""Converted models in a folder: tensors as safetensors, all else as JSON; no code, no pickle.

Reading order: `save`, `load`, then what they check.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mvpfx.blueprint import Blueprint, class_before, describe, fill
from mvpfx.expected_tensors import FLOATS, check_types
from mvpfx.file_limits import FileLimits, Room
from mvpfx.manifest import digest_of, flush, measured, replacing, settled
from mvpfx.packing import (
    LONGEST,
    VALUES,
    as_scale,
    as_shape,
    is_worth_it,
    lengthen,
    pack,
    pack_indices,
    shorten,
    unpack,
    unpack_indices,
)
from mvpfx.pipeline import Decision, Record
from mvpfx.report import Report, Row
from mvpfx.skeleton import make_skeleton
from mvpfx.state import State, attach_state, find_state
from mvpfx.totals import Totals

TENSORS = "model.safetensors"
DESCRIPTION = "mvpfx_model.json"
FORMAT = "mvpfx model"
VERSION = 2
READABLE = (1, 2)
"""Versions that can be loaded; the first had the indices of sparse weights as they are."""
_ROW_BYTES = 24
"""That a row takes while its indices are unpacked."""
ADVICE = "Save the model again with mvpfx.save."


def save(model: nn.Module, folder: str | Path, *, values: str = "exact") -> Path:
    """Save a converted model; all of it is there, or nothing is.

    Weights with many zeros take one byte a nonzero besides its value, whatever their storage in
    memory. What `folder` held before is replaced; a process that is killed while saving leaves the
    old model or the new one, and `load` finds either.

    Args:
        model: what `convert` returned, fine-tuned since or not.
        folder: where to.
        values: "exact"; or "bf16" or "int8" (one scale a weight), for the values of weights with
            many zeros: smaller, and the loaded model differs by the rounding.

    Returns:
        `folder`, as a path.

    Raises:
        ValueError: the model was not converted, or `values` is unknown.
    """
    state = find_state(model)
    if state is None or state.report is None:
        raise ValueError(
            f"{type(model).__name__} was not converted. mvpfx.save is for what mvpfx.convert "
            "returns; a prepared model is saved with mvpfx.save_checkpoint."
        )
    if values not in VALUES:
        raise ValueError(f"values must be one of {', '.join(VALUES)}; found {values!r}.")
    blueprint, tensors = describe(model)
    check_types(blueprint.tensors)
    stored, packed = _pack_all(tensors, values)
    indices = _pack_indices(stored)
    body = {
        "format": FORMAT,
        "version": VERSION,
        "blueprint": asdict(blueprint),
        "packed": packed,
        "indices": indices,
        "report": report_data(state.report),
    }
    folder = Path(folder)
    with replacing(folder) as staged:
        save_file(stored, staged / TENSORS, metadata={"format": "pt"})
        body["files"] = {TENSORS: measured(staged / TENSORS)}
        text = json.dumps({**body, "digest": digest_of(body)}, indent=1, sort_keys=True)
        (staged / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
        for path in (staged / TENSORS, staged / DESCRIPTION, staged):
            flush(path)
    return folder


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model of a folder, as modules; `mvpfx.load` has it run as chains, and says the rest."""
    folder = settled(Path(folder))
    try:
        body = _read(folder)
        blueprint = Blueprint(**body["blueprint"])
        tensors = _tensors(folder)
        shapes = [tensor.shape for tensor in tensors.values()]
        limits = FileLimits.of(folder / TENSORS, shapes, len(blueprint.modules))
        tensors = _unpack_all(tensors, body["packed"], limits.room)
        _unpack_indices(tensors, body.get("indices", {}), limits.room)
        _check_tensors(blueprint, tensors)
        loaded = make_skeleton(blueprint, limits) if model is None else model
        found = type(loaded).__name__
        if found not in (blueprint.kind, class_before(blueprint.kind)):
            raise ValueError(f"a {blueprint.kind} was saved, not a {found}")
        report = read_report(body["report"])
        told = {row.site: (row.shape_before, row.shape_after) for row in report.rows}
        fill(loaded, blueprint, tensors, told)
    except _DAMAGE as error:
        raise ValueError(f"{folder} cannot be loaded: {error}. {ADVICE}") from error
    attach_state(loaded, State(records=report.records, report=report))
    return loaded.eval()


_DAMAGE = (
    *(ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError),
    *(ArithmeticError, AssertionError, MemoryError),
)
"""What reading a file raises that holds something other than what `save` writes."""


def report_data(report: Report) -> dict[str, Any]:
    """A report as plain data, without graphs."""
    return {
        "records": [
            {
                "name": record.name,
                "seconds": record.seconds,
                "decisions": [asdict(decision) for decision in record.decisions],
            }
            for record in report.records
        ],
        "rows": [asdict(row) for row in report.rows],
        "max_difference": report.max_difference,
        "latency_before_ms": report.latency_before_ms,
        "latency_after_ms": report.latency_after_ms,
        "before": report.before and asdict(report.before),
        "after": report.after and asdict(report.after),
    }


def read_report(data: Mapping[str, Any]) -> Report:
    """The report in a file."""
    records = [
        Record(r["name"], {}, {}, tuple(Decision(**d) for d in r["decisions"]), r["seconds"], True)
        for r in data["records"]
    ]
    shapes = ("shape_before", "shape_after")
    listed: list[dict[str, Any]] = [dict(row) for row in data["rows"]]
    for row in listed:
        row.update({name: tuple(row[name]) for name in shapes})
    rows = [Row(**row) for row in listed]
    rest = {f.name: data[f.name] for f in fields(Report) if f.name not in ("records", "rows")}
    for name in ("before", "after"):
        rest[name] = None if rest[name] is None else Totals(**rest[name])
    return Report(records, rows, **rest)


def _pack_all(
    tensors: Mapping[str, Tensor], values: str
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """What goes into the file, and how each packed tensor is read back."""
    stored: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        sparse = name.endswith(".values") and f"{name[:-7]}.crow_indices" in tensors
        if not sparse and not is_worth_it(tensor):
            stored[name] = tensor
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")
        entry: dict[str, Any] = {"shape": list(tensor.shape), "dtype": dtype}
        found, gaps = (tensor, None) if sparse else pack(tensor)
        stored[f"{name}.packed"], entry["scale"] = shorten(found, values)
        if gaps is not None:
            stored[f"{name}.gaps"] = gaps
        packed[name] = entry
    return stored, packed


def _unpack_all(
    stored: dict[str, Tensor], packed: Mapping[str, Mapping[str, Any]], room: Room
) -> dict[str, Tensor]:
    tensors = dict(stored)
    for name, entry in packed.items():
        try:
            tensors[name] = _unpack(name, tensors, entry, room)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return tensors


def _unpack(name: str, tensors: dict[str, Tensor], entry: Mapping[str, Any], room: Room) -> Tensor:
    if entry["dtype"] not in FLOATS:
        raise ValueError(f"it cannot be of type {entry['dtype']!r}")
    dtype, shape = getattr(torch, entry["dtype"]), as_shape(entry["shape"])
    short, gaps = tensors.pop(f"{name}.packed"), tensors.pop(f"{name}.gaps", None)
    if short.dtype not in (dtype, torch.bfloat16, torch.int8):
        raise ValueError(f"values of {short.dtype} do not stand for {dtype}")
    values = lengthen(short, as_scale(entry["scale"]), dtype)
    if gaps is not None:
        # A byte of a gap stands for so many places; zeros after the last one have nothing.
        attested = LONGEST * (gaps.numel() + 1)
        room.take(name, (math.prod(shape) - attested) * values.element_size())
        return unpack(values, gaps, shape)
    if tuple(values.shape) != shape:
        raise ValueError(f"it is {list(values.shape)}, and {list(shape)} was saved")
    return values


def _pack_indices(stored: dict[str, Tensor]) -> dict[str, dict[str, int]]:
    """Put gaps where indices of sparse weights were; returns the size of each matrix, by layer."""
    packed: dict[str, dict[str, int]] = {}
    for name in [n for n in stored if n.endswith(".crow_indices")]:
        layer = name.removesuffix(".crow_indices")
        if (found := pack_indices(stored[name], stored[f"{layer}.col_indices"])) is not None:
            packed[layer] = {"rows": len(stored.pop(name)) - 1, "columns": found[1]}
            del stored[f"{layer}.col_indices"]
            stored[f"{layer}.gaps"] = found[0]
    return packed


def _unpack_indices(
    tensors: dict[str, Tensor], packed: Mapping[str, Mapping[str, int]], room: Room
) -> None:
    for layer, size in packed.items():
        try:
            rows, columns = as_shape([size["rows"], size["columns"]])
            room.take(layer, _ROW_BYTES * rows)
            crow, col = unpack_indices(tensors.pop(f"{layer}.gaps"), rows, columns)
        except ValueError as error:
            raise ValueError(f"{layer}: {error}") from None
        tensors[f"{layer}.crow_indices"], tensors[f"{layer}.col_indices"] = crow, col


def _read(folder: Path) -> dict[str, Any]:
    """The description, once it and the files it lists are known to be whole."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise ValueError(f"it has no {DESCRIPTION}, so it holds no converted model")
    try:
        body = json.loads(path.read_bytes())
        kind, found, version = body["format"], body.pop("digest"), body["version"]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{DESCRIPTION} is cut short or corrupted") from None
    if kind != FORMAT:
        raise ValueError(f"{DESCRIPTION} is of {kind!r}, and {FORMAT!r} is needed")
    if found != digest_of(body):
        raise ValueError(f"{DESCRIPTION} does not match its own digest")
    if version not in READABLE:
        raise ValueError(f"it has version {version}, and this release of mvpfx reads {VERSION}")
    for name, listed in body["files"].items():
        if name != TENSORS or not (folder / name).is_file() or measured(folder / name) != listed:
            raise ValueError(f"{name} is missing, cut short, corrupted or of another model")
    if TENSORS not in body["files"]:
        raise ValueError(f"{TENSORS} is not listed")
    return body


def _tensors(folder: Path) -> dict[str, Tensor]:
    try:
        found = load_file(folder / TENSORS)
        # Kernels read whole numbers of a type's bytes at a time, and a header may be of any length.
        askew = {n: t.clone() for n, t in found.items() if t.data_ptr() % t.element_size()}
        return {**found, **askew}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{TENSORS} is no safetensors file: {error}") from None


def _check_tensors(blueprint: Blueprint, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor has the shape and type that are written down, and none is there besides."""
    expected = {name for name in blueprint.tensors if name not in blueprint.tied}
    different = expected ^ set(tensors)
    if different:
        raise ValueError(f"{min(different)} is either in {TENSORS} or written down, not both")
    for name, source in blueprint.tied.items():
        if source not in expected or blueprint.tensors[name] != blueprint.tensors[source]:
            raise ValueError(f"{name} is tied to {source}, which is another tensor")
    for name in expected:
        entry, tensor = blueprint.tensors[name], tensors[name]
        found = [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        if found != [entry["shape"], entry["dtype"]]:
            raise ValueError(f"{name} is {found}, and {entry} is written down")
