"""Names follow their modules: after prepare, PEFT and other tools put layers into new ones."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from mvpfx.mask import Mask
from mvpfx.region import region_of
from mvpfx.swap import MASK_SUFFIX
from mvpfx.weights import parameter_names

if TYPE_CHECKING:
    from mvpfx.state import State


def refresh_names(model: nn.Module, state: State) -> None:
    """Give the sites and regions of a prepared model the names they have in it now.

    A layer that was copied with its mask, as PEFT does for `modules_to_save`, is a site more.
    """
    masks: dict[str, Mask] = {}
    regions: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Mask) and name.endswith(MASK_SUFFIX):
            masks[name.removesuffix(MASK_SUFFIX)] = module
        region = region_of(module)
        if region is not None:
            region.name = name
            regions.append(name)
    state.regions = regions
    if masks.keys() == state.sites.keys():
        return
    known = parameter_names(model)
    order = {name: index for index, name in enumerate(state.sites)}
    found = sorted(masks.items(), key=lambda item: order.get(item[1].site.name, len(order)))
    state.sites = {}
    for name, mask in found:
        if name != mask.site.name:
            state.seen = {name if seen == mask.site.name else seen for seen in state.seen}
            aliases = tuple(other for other in known.get(name, ()) if other != name)
            mask.site = replace(mask.site, name=name, aliases=aliases)
        state.sites[name] = mask.site
