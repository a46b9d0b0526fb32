"""Short runs: said before training where scores cannot tell units apart in the time they have."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mvpfx.score_init import MAGNITUDE, SENSITIVITY

if TYPE_CHECKING:
    from mvpfx.mask import Mask
    from mvpfx.schedule import Schedule

UPDATES = 100
"""Of scores while the density falls: at a learning rate of 1e-2 they move by 1 at most in these,
half of the range that `score_init="magnitude"` starts from.
"""
MEASURED = 20
"""Gradients that a sensitivity is the sum of, at least."""
UPDATES_FROM_EQUAL = 1000
"""Of scores that start all equal before the first cut: with 130, on 6,920 sentences, it removes
weights at random, which a pretrained model does not survive; the paper's runs have 5,400 and more.
"""


def warn_of_short_run(masks: Iterable[Mask], total_steps: int) -> None:
    """Warn where learned or accumulated scores have too few updates for the schedule's cuts.

    Args:
        masks: with their plans.
        total_steps: length of the run, in optimizer steps.
    """
    said: set[str] = set()
    known: dict[int, tuple[int, int]] = {}  # sites share their schedule, and runs are long
    for mask in masks:
        if mask.plan is None or mask.criterion.stored != "parameter":
            continue
        if id(mask.plan) not in known:
            known[id(mask.plan)] = _cuts(mask.plan, total_steps)
        first, ramp = known[id(mask.plan)]
        equal = mask.criterion.learned and mask.rule.score_init not in (MAGNITUDE, SENSITIVITY)
        if equal and first < UPDATES_FROM_EQUAL:
            said.add(
                f"scores that start all equal (score_init={mask.rule.score_init!r}) have {first} "
                f"updates before the first cut of a run of total_steps={total_steps}, so noise "
                'chooses what goes. Use score_init="magnitude", or a warm-up of '
                f"{UPDATES_FROM_EQUAL} steps or more."
            )
        elif mask.measures and first < MEASURED:
            said.add(
                f"a warm-up of {first} steps is too short for score_init={SENSITIVITY!r}: what the "
                f"loss would miss is added up in it, and needs about {MEASURED} steps. Train for "
                'more steps, make the warm-up longer, or use score_init="magnitude".'
            )
        elif ramp < UPDATES:
            said.add(
                f"a run of total_steps={total_steps} is too short for {mask.rule.criterion}: its "
                f"scores have {ramp} updates until the last cut, and need about {UPDATES} to tell "
                "units apart. Train for more steps, make warmup and cooldown of the schedule "
                'shorter, or use criterion="magnitude".'
            )
    for text in sorted(said):
        warnings.warn(text, stacklevel=3)


def _cuts(plan: Schedule, total_steps: int) -> tuple[int, int]:
    """Updates before the first cut, and those from the end of the warm-up to the last cut; of a
    single cut those before it.
    """
    falls = plan.moves(total_steps)
    if plan(0, total_steps, 1.0, 0.0) != 1.0:
        return 0, falls[-1] if falls else total_steps
    if not falls:
        return total_steps, total_steps
    ramp = falls[-1] - falls[0] + 1
    return falls[0], falls[0] if len(falls) == 1 else ramp
