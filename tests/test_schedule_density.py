"""Schedule density: every mask has a plan, and a pool where the scope is global."""

from __future__ import annotations

import mvpfx
from mvpfx.mask import Mask
from mvpfx.passes.capture import Capture
from mvpfx.passes.find_sites import FindSites
from mvpfx.passes.insert_masks import InsertMasks
from mvpfx.passes.schedule_density import ScheduleDensity
from mvpfx.pipeline import run
from mvpfx.program import Program
from tests.models import build


def scheduled(config: mvpfx.PruningConfig) -> tuple[list[Mask], list[str]]:
    model, _ = build("bert")
    passes = (Capture(), FindSites(config), InsertMasks(), ScheduleDensity(config.schedule))
    program, records = run(passes, Program(model))
    masks = [mask for mask in program.modules.values() if isinstance(mask, Mask)]
    return masks, [decision.reason for decision in records[-1].decisions]


def test_cubic_starts_dense() -> None:
    masks, reasons = scheduled(mvpfx.PruningConfig())
    assert {mask.density for mask in masks} == {1.0}
    cubic = "CubicSchedule(warmup=0.1, cooldown=0.2, freeze=False, cuts=None)"
    assert set(reasons) == {f"{cubic}, ranked alone"}


def test_global_scope_is_one_pool() -> None:
    schedule = mvpfx.ConstantSchedule()
    masks, reasons = scheduled(mvpfx.PruningConfig(scope="global", density=0.3, schedule=schedule))
    assert len({id(mask.ranking) for mask in masks}) == 1
    assert set(reasons) == {"ConstantSchedule(), ranked with 11 other sites"}
    kept = sum(int(mask.kept().sum()) for mask in masks)
    assert kept == round(0.3 * sum(mask.units for mask in masks))
