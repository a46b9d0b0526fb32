"""Schedule density: give every mask the plan by which its density moves while the user trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from mvpfx.facts import fact
from mvpfx.mask import Mask
from mvpfx.pipeline import Decision, Pass
from mvpfx.program import Program
from mvpfx.ranking import rank_together
from mvpfx.schedule import CubicSchedule, Schedule


@dataclass(frozen=True)
class ScheduleDensity(Pass):
    """Attach the schedule, and rank together the masks that share a global scope.

    Attributes:
        schedule: optimizer step -> density (or threshold); see `mvpfx.schedule`.
    """

    schedule: Schedule = field(default_factory=CubicSchedule)
    name: ClassVar[str] = "schedule_density"
    requires: ClassVar[tuple[str, ...]] = ("masked",)
    ensures: ClassVar[tuple[str, ...]] = ("scheduled",)

    def apply(self, program: Program) -> Iterator[Decision]:
        """Set `plan` on every new mask."""
        masks = [m for m in program.modules.values() if isinstance(m, Mask)]
        for mask in masks:
            mask.plan = self.schedule
        rank_together(masks)
        for mask in masks:
            together = len(mask.ranking.masks)
            scope = f"ranked with {together - 1} other sites" if together > 1 else "ranked alone"
            if mask.leader is not None:
                scope = f"kept as in {mask.leader.site.name}"
            yield Decision(mask.site.name, "schedule", True, f"{self.schedule}, {scope}")


@fact("scheduled")
def scheduled(program: Program) -> str | None:
    """Every mask is ranked."""
    for module in program.modules.values():
        if isinstance(module, Mask) and (module.leader or module) not in module.ranking.masks:
            return f"{module.site.name} is in no ranking"
    return None
