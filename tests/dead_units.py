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
        found += _in_stacks(name, module, said)
        if not isinstance(module, KINDS) or not module.weight.numel():
            continue
        live = (module.weight.detach() != 0).flatten(1)
        inputs = live.view(len(live), module.weight.shape[1], -1).any(dim=2).any(dim=0)
        for word, dead in (("rows", ~live.any(dim=1)), ("columns", ~inputs)):
            reason = said.get(f"{name}.weight", "")
            if bool(dead.any()) and f"{word} are zero" not in reason:
                found.append(f"{name}.weight: {int(dead.sum())} {word}; {reason}")
    return found


def _in_stacks(name: str, module: nn.Module, said: dict[str, str]) -> list[str]:
    """Slices and matrices of zeros in stacks of experts that no declined decision speaks of."""
    found: list[str] = []
    for leaf, stack in module.named_parameters(recurse=False):
        if stack.dim() != 3 or getattr(module, "num_experts", None) != len(stack):
            continue
        live = stack.detach() != 0
        whole = live.flatten(1).any(dim=1)
        reason = said.get(f"{name}.{leaf}", "")
        single = any(not bool(live[whole].any(dim=dim).all()) for dim in (1, 2))
        if (single and "single experts" not in reason) or (
            not bool(whole.all()) and "experts are zero" not in reason
        ):
            found.append(f"{name}.{leaf}: slices of experts; {reason}")
        for dim in (1, 2):
            everywhere = ~live.flatten(0, 0).any(dim=0).any(dim=2 - dim)
            if bool(everywhere.any()) and not reason:
                found.append(f"{name}.{leaf}: {int(everywhere.sum())} slices of all experts")
    return found
