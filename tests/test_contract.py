"""The contract of passes, for every pass and every toy model; a new pass gets these free."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mvpfx
from mvpfx.mask import Mask
from mvpfx.passes.capture import Capture
from mvpfx.passes.choose_storage import ChooseStorage
from mvpfx.passes.find_sites import FindSites
from mvpfx.passes.fold_computed import FoldComputed
from mvpfx.passes.fold_masks import FoldMasks
from mvpfx.passes.insert_masks import InsertMasks
from mvpfx.passes.lower_matmuls import LowerMatmuls
from mvpfx.passes.propagate_layout import PropagateLayout
from mvpfx.passes.schedule_density import ScheduleDensity
from mvpfx.passes.shrink_dims import ShrinkDims
from mvpfx.pipeline import Pass, run
from mvpfx.program import Program, graph_text
from mvpfx.swap import drop_runtimes
from tests.models import ZOO, build

CONFIG = mvpfx.PruningConfig(density=0.3, schedule=mvpfx.ConstantSchedule())
PREPARE: list[Pass] = [FindSites(CONFIG), InsertMasks(), ScheduleDensity(CONFIG.schedule)]
CONVERT: list[Pass] = [
    FoldComputed(),
    FindSites(),
    InsertMasks(),
    FoldMasks(),
    ShrinkDims(),
    ChooseStorage("csr"),
    PropagateLayout(),
    LowerMatmuls(),
]


def start(name: str, prepared_first: bool) -> tuple[Program, Any]:
    """A captured program of a toy model, prepared first where passes of convert are to run."""
    model, batch = build(name)
    if prepared_first:
        mvpfx.prepare(model, CONFIG, example_inputs=batch)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for mask in model.modules():
                if isinstance(mask, Mask) and mask.scores is not None:
                    mask.scores.copy_(torch.rand(mask.scores.shape, generator=generator))
        drop_runtimes(model.eval())
    program, _ = run((Capture(batch),), Program(model))
    return program, batch


def snapshot(program: Program) -> tuple[Any, ...]:
    """All a pass could change of its input."""
    texts = {region: graph_text(graph) for region, graph in program.graphs.items()}
    state = {name: value.clone() for name, value in program.model.state_dict().items()}
    overlay = (dict(program.parameters), dict(program.modules), dict(program.attributes))
    return texts, state, overlay, dict(program.sites), dict(program.storages)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("pipeline", [PREPARE, CONVERT], ids=["prepare", "convert"])
def test_passes_leave_their_input_and_do_nothing_twice(name: str, pipeline: list[Pass]) -> None:
    program, _ = start(name, pipeline is CONVERT)
    for step in pipeline:
        texts, state, overlay, sites, storages = snapshot(program)
        result, (record,) = run((step,), program)
        after = snapshot(program)
        assert (texts, sites, storages) == (after[0], after[3], after[4]), step.name
        assert overlay[1] == after[2][1] and overlay[2] == after[2][2], step.name
        assert overlay[0].keys() == after[2][0].keys(), step.name
        assert all(overlay[0][key] is after[2][0][key] for key in overlay[0]), step.name
        assert all(torch.equal(state[key], after[1][key]) for key in state), step.name
        for graph in result.graphs.values():
            graph.lint()
        assert all(decision.reason and decision.action for decision in record.decisions)
        _, (again,) = run((step,), result)
        assert not again.modified, f"{step.name} changed {name} twice"
        program = result


@pytest.mark.parametrize("step", [*PREPARE, *CONVERT], ids=lambda step: step.name)
def test_a_violated_requirement_raises_before_anything_runs(step: Pass) -> None:
    if not step.requires:
        pytest.skip("requires nothing")
    model, batch = build("mlp")
    program = Program(model)
    if step.requires == ("masks_folded",):
        mvpfx.prepare(model, CONFIG, example_inputs=batch)
        program, _ = run((Capture(batch), FindSites(), InsertMasks()), program)
    elif step.requires != ("captured",):
        program, _ = run((Capture(batch), FindSites()), program)
    holds = all(_holds(name, program) for name in step.requires)
    if holds:
        pytest.skip("holds for any program")
    with pytest.raises(ValueError, match=f"^pass {step.name} requires "):
        run((step,), program)


def _holds(name: str, program: Program) -> bool:
    from mvpfx.facts import find_fact

    return find_fact(name)(program) is None
