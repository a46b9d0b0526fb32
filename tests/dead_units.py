"""An independent count of dead units: rows and columns of zeros, read off a converted model."""

from __future__ import annotations

from torch import nn

import mvpfx

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def unexplained(small: nn.Module) -> list[str]:
    """Rows and columns of zeros in a converted model that no declined decision speaks of."""
    said = {d.site: d.reason for d in mvpfx.report_of(small).decisions if not d.applied}
    found: list[str] = []
    for name, module in small.named_modules():
        if not isinstance(module, KINDS):
            continue
        live = (module.weight.detach() != 0).flatten(1)
        inputs = live.view(len(live), module.weight.shape[1], -1).any(dim=2).any(dim=0)
        for word, dead in (("rows", ~live.any(dim=1)), ("columns", ~inputs)):
            reason = said.get(f"{name}.weight", "")
            if bool(dead.any()) and f"{word} are zero" not in reason:
                found.append(f"{name}.weight: {int(dead.sum())} {word}; {reason}")
    return found
