"""Conversion: what becomes of a pruned model for inference, and what loads it again."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from mvpfx import store
from mvpfx.careless import warn_of_density
from mvpfx.comparison import Comparison, agree, compare_models
from mvpfx.computed import duplicate
from mvpfx.distributed import check_whole
from mvpfx.facts import NATIVE_DENSE, REDUCED, SPARSE
from mvpfx.kernels.chain import Chain
from mvpfx.kernels.fused_region import FusedRegion
from mvpfx.kernels.library import LIBRARY, MISSING
from mvpfx.native_linear import NativeLinear
from mvpfx.net import caught
from mvpfx.passes.capture import Capture
from mvpfx.passes.choose_storage import HOPELESS, ChooseStorage
from mvpfx.passes.find_sites import FindSites
from mvpfx.passes.fold_computed import FoldComputed
from mvpfx.passes.fold_masks import FoldMasks
from mvpfx.passes.fuse_tiles import FuseTiles
from mvpfx.passes.insert_masks import InsertMasks
from mvpfx.passes.lower_matmuls import LowerMatmuls
from mvpfx.passes.propagate_layout import PropagateLayout
from mvpfx.passes.shrink_dims import ShrinkDims, narrows_results
from mvpfx.pipeline import Decision, Record, run
from mvpfx.program import Program, copy_graph
from mvpfx.ranking import leading
from mvpfx.recording import CaptureError
from mvpfx.region import Region, captured, make_region, region_modules, region_of
from mvpfx.report import make_report
from mvpfx.scheduler import masks_of
from mvpfx.state import State, attach_state, detach_state, find_state, unwrapped
from mvpfx.storage import SparseLinear
from mvpfx.swap import drop_runtimes, restore
from mvpfx.totals import measure_totals

CSR_PAYS = 1.25
"""How many times as long as the native kernel csr may take at a site, and still be worth a try for
the whole model; natively, neighbours save what getting into tiles costs a site by itself."""
WORTH_MS = 0.1
"""Milliseconds of a call for which a smaller model is given up."""
UNTOUCHED = "the model as it was is faster than a smaller one"
EDGES = 3.0
"""How many times as long as the dense matmul a native one may take by itself, into tiles and out of
them, and still pay in a chain that has few such edges."""


def convert(
    model: nn.Module, *, example_inputs: Any = None, lowering: str = "auto", multiple_of: int = 1
) -> nn.Module:
    """Lower a model with zeros in its weights to the smallest, fastest one that computes the same.

    Masks are folded, dead channels and heads removed, and each weight gets the storage that is
    fastest. The result is a plain module that runs without graphs, in eval mode; `model` is left as
    it was. With example inputs the outputs of both are compared.

    Args:
        model: prepared by `prepare`, or any model with zeros in its weights.
        example_inputs: one batch, as `model` is called with. Storages are measured on it. Without
            it they come from a break-even table, and only a prepared model that was called before
            has graphs in which dead channels can be found.
        lowering: "auto" takes the fastest; "dense", "csr", "bsr" or "native" is
            taken wherever it can be.
        multiple_of: what the sizes of smaller weights are rounded up to a multiple of.

    Returns:
        A new model. `sparsity_table` and `explain` say what was done to it.

    Raises:
        ValueError: the example inputs do not fit, an option is unknown, a weight is read both
            with its mask and without it under one name, weights are sharded over ranks, or a
            wrapper may compute more than the prepared model in it (DDP is taken off).
        RuntimeError: the outputs differ by more than `TOLERANCE` allows; nothing is returned.
    """
    shrink = ShrinkDims(multiple_of, returned=example_inputs is not None)
    with torch.inference_mode(False):  # whose tensors would not tell when they are written to
        return _convert(model, example_inputs, shrink, ChooseStorage(lowering))


def _convert(
    model: nn.Module, example_inputs: Any, shrink: ShrinkDims, choose: ChooseStorage
) -> nn.Module:
    model = unwrapped(model)
    _warn_without_kernels(model, choose.lowering)
    check_whole(model)
    warn_of_density(leading(masks_of(model)))
    source = duplicate(model).eval()
    drop_runtimes(source)
    state = find_state(model)
    known = captured(model, state.regions) if state and example_inputs is None else {}
    folding = (FoldComputed(), Capture(example_inputs), FindSites(), InsertMasks(), FoldMasks())
    seen = Program(
        source,
        graphs={name: copy_graph(variant.graph) for name, variant in known.items()},
        calls={name: variant.call for name, variant in known.items()},
    )
    folded, records = run(folding, seen)
    _check_folded(folded)
    shrunk, shrinking = _shrunk(shrink, folded, example_inputs)
    chosen, lowerings = run((choose, PropagateLayout(), LowerMatmuls()), shrunk)
    small, comparison, name = _plain(chosen), None, "converted"
    if example_inputs is not None:
        versions = {"dense": _plain(folded), name: small}
        smaller = any(decision.applied for record in shrinking for decision in record.decisions)
        auto = choose.lowering == "auto"
        others = _alternatives(chosen, shrunk, smaller) if auto else {}
        versions |= {other: _plain(result) for other, (result, _) in others.items()}
        comparison = compare_models(source, versions, example_inputs)
        dense = _dense_version(chosen, smaller)
        name = _fastest(comparison, dense, [name, *others]) if auto else name
        if name in others:
            (chosen, lowerings), small = others[name], versions[name]
        pair = {other: versions[other] for other in ("dense", name)}
        if (
            auto
            and smaller
            and _is_slower(comparison, name)
            and _is_slower(compare_models(source, pair, example_inputs), name)
        ):  # twice: something else on the machine may have slowed one of them down
            shrinking = [_undone(record, comparison, name) for record in shrinking]
            name, small = "dense", versions["dense"]
            steps = (ChooseStorage("dense", why=UNTOUCHED), PropagateLayout(), LowerMatmuls())
            chosen, lowerings = run(steps, folded)
    records = [*records, *shrinking, *lowerings]
    totals = [measure_totals(version, example_inputs) for version in (folded.model, small)]
    report = make_report(chosen, records, comparison, name, totals)
    attach_state(small, State(records=records, report=report, graphs=chosen.graphs))
    return _forget_calls(small)


def _dense_version(chosen: Program, smaller: bool) -> str:
    """The name of the version without sparse storages."""
    if not {*chosen.storages.values()} & {*SPARSE, NATIVE_DENSE}:
        return "converted"
    return "all dense" if smaller else "dense"


def _fastest(comparison: Comparison, dense: str, names: list[str]) -> str:
    """The version to take: one with sparse storages where that is faster than the dense one by more
    than timings scatter.
    """
    sparse = [name for name in names if name != dense]
    if not sparse:
        return dense
    best = comparison.fastest(*sparse)
    return best if comparison.is_clearly_faster(best, dense) else dense


def _is_slower(comparison: Comparison, name: str) -> bool:
    """Whether a smaller version takes clearly longer than the model as it was: it is worth keeping
    for its size where that is next to nothing.
    """
    lost_ms = comparison.latency[name].median_ms - comparison.latency["dense"].median_ms
    return lost_ms > WORTH_MS and comparison.is_clearly_faster("dense", name)


def _undone(record: Record, comparison: Comparison, name: str) -> Record:
    """What is recorded of a pass whose result was measured as slower than what it was given."""
    before, after = (comparison.latency[version].median_ms for version in ("dense", name))
    reason = f"the smaller model is slower: {before:.3f} ms -> {after:.3f} ms"
    declined = (Decision("", "shrink", False, reason),)
    return replace(record, after=record.before, decisions=declined, modified=False)


def _warn_without_kernels(model: nn.Module, lowering: str) -> None:
    """Say that a CPU's native kernels are missing, where they could be chosen."""
    on_cpu = any(p.device.type == "cpu" for p in model.parameters())
    if LIBRARY is None and on_cpu and lowering in ("auto", "native"):
        warnings.warn(
            f"sparse weights are multiplied by torch.sparse or stay dense: {MISSING}. Install one "
            'and then mvpfx again, or pass lowering="dense" or "csr".',
            UserWarning,
            stacklevel=4,
        )


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """A model that `save` saved, in eval mode, on the CPU.

    Nothing in the folder is run: the model's class comes from transformers by its name, and every
    size, shape and index is checked before it is used.

    Args:
        folder: where from.
        model: for a class that is not in transformers: a model of it as it was before it was
            pruned. It is changed in place and returned.

    Raises:
        ValueError: a file is missing, damaged, or does not fit; the text says which and where.
    """
    with torch.inference_mode(False):
        return fuse(store.load(folder, model).requires_grad_(False))


def fuse(model: nn.Module) -> nn.Module:
    """Let the parts of a converted model that have layers on native kernels run as chains.

    Whatever holds a stack of blocks is tried as a whole first.
    """
    owners = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (SparseLinear, NativeLinear)) and module.output_layout == "tiled"
    }
    if owners and LIBRARY is not None:
        inner = dict(region_modules(model, owners))
        stacks = {name.rpartition(".")[0].rpartition(".")[0] for name in inner}
        for name in {*inner, *stacks}:
            region = FusedRegion(name, fuse_region, None, once=name not in inner)
            make_region(model.get_submodule(name), region)
    return model


def fuse_region(module: nn.Module, region: Region, graph: fx.Graph) -> fx.Graph:
    """Put chains into a graph that was recorded at a region's first call of its kind.

    Raises:
        CaptureError: there is nothing to fuse, or the forward asks for gradients of its own.
    """
    if any(getattr(node.meta.get("val"), "requires_grad", False) for node in graph.nodes):
        raise CaptureError("its forward asks for gradients itself")
    result, (record,) = run((FuseTiles(),), Program(module, graphs={"": graph}, regions=[""]))
    for decision in record.decisions:
        if not decision.applied:
            raise CaptureError(decision.reason)
    graph = result.graphs[""]
    for node in graph.nodes:
        if isinstance(node.target, Chain) and node.target.spare is not None:
            node.target.spare.report = region.fault
    return graph


def _shrunk(
    shrink: ShrinkDims, folded: Program, example_inputs: Any
) -> tuple[Program, list[Record]]:
    """Shrink a program; where a model computes with attention weights that its blocks return, with
    these as they were.
    """
    try:
        shrunk, records = run((shrink,), folded)
    except Exception as error:  # noqa: BLE001  the net
        reason = caught(error, "making the model smaller")
        declined = (Decision("", "shrink", False, reason),)
        return folded, [Record(shrink.name, {}, {}, declined, 0.0, False)]
    if narrows_results(records) and not agree(_plain(folded), _plain(shrunk), example_inputs):
        shrunk, records = run((replace(shrink, returned=False),), folded)
    return shrunk, records


def _forget_calls(model: nn.Module) -> nn.Module:
    """Count no calls that were made to measure."""
    for module in model.modules():
        region = region_of(module)
        if region is not None:
            region.calls = 0
            region.declined.clear()
            region.faults.clear()
    return model


def _check_folded(program: Program) -> None:
    for name in sorted(program.unfolded):
        raise ValueError(
            f"{name} is read by a matmul, with its mask, and elsewhere without it, so one stored "
            "weight cannot serve both. Hold it under two names (a tied parameter), or leave it "
            f'alone when preparing: overrides={{"{name}": None}}.'
        )


def _alternatives(
    chosen: Program, shrunk: Program, smaller: bool
) -> dict[str, tuple[Program, list[Record]]]:
    """Other choices of storage worth a comparison end to end, by the name of the version.

    All dense is the version "dense", where nothing was made `smaller`.
    """
    storages, timings = set(chosen.storages.values()), chosen.timings.values()
    choices: list[tuple[str, bool]] = []
    if storages & {*SPARSE}:
        choices += [("dense", False)]
        if any(t.ms["csr"] < CSR_PAYS * t.ms.get("native", math.inf) for t in timings):
            choices += [("csr", False)]
    unknown = not timings and REDUCED in storages
    if unknown or any(t.ms.get("native", math.inf) < EDGES * t.ms["dense"] for t in timings):
        choices += [("native", False), ("native", True)]
    timed = replace(shrunk, timings=chosen.timings)
    why = "alike for all sites, which is fastest end to end"
    found: dict[str, tuple[Program, list[Record]]] = {}
    known = [chosen.storages]
    for storage, dense_too in choices:
        choose = ChooseStorage(storage, HOPELESS, dense_too, why)
        result = run((choose, PropagateLayout(), LowerMatmuls()), timed)
        if result[0].storages not in known:
            known.append(result[0].storages)
            name = f"all {storage}{', dense too' * dense_too}"
            found["dense" if name == "all dense" and not smaller else name] = result
    return found


def _plain(program: Program) -> nn.Module:
    """The model of a program, with its overlay written in and nothing of ours but the storages."""
    model = duplicate(program.model)
    restore(model)
    detach_state(model)
    return fuse(program.build(model).eval().requires_grad_(False))
