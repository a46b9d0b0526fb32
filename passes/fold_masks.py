"""Multiply every mask into its weight, and take the mask nodes out of the graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from mvpfx.facts import is_mask_node
from mvpfx.pipeline import Decision, Pass
from mvpfx.program import Program, full_name, parent_name
from mvpfx.site import Site


@dataclass(frozen=True)
class FoldMasks(Pass):
    """Give each masked site the weight its matmul sees, `W' = W * M`.

    A tied weight is folded under the names that matmuls read. A name that a lookup reads
    (an embedding) keeps the raw weight, as it does while training; the two are no longer tied.
    """

    name: ClassVar[str] = "fold_masks"
    ensures: ClassVar[tuple[str, ...]] = ("masks_folded",)

    def apply(self, program: Program) -> Iterator[Decision]:
        """Fold site by site; a site without a mask has nothing to fold."""
        for site in program.sites.values():
            mask = program.module(f"{site.name}_mask")
            if mask is not None:
                yield self._fold(program, site, mask)

    def _fold(self, program: Program, site: Site, mask: nn.Module) -> Decision:
        action = "fold mask"
        masked = {site.name, *_masked_names(program, site)}
        both = sorted(masked & _raw_names(program, site))
        if both:
            program.unfolded.add(site.name)
            reason = f"{both[0]} is read with its mask and, elsewhere, without it"
            return Decision(site.name, action, False, reason)
        value = _masked_value(program, site, mask)
        raw = {name for name in site.aliases if _is_lookup(program, name)}
        for name in (site.name, *site.aliases):
            if name not in raw:
                program.parameters[name] = value
        program.modules[f"{site.name}_mask"] = None
        _drop_mask_nodes(program, site)
        reason = f"density {program.density(site.name):.4f}"
        if raw:
            reason += f"; {', '.join(sorted(raw))} keeps the raw weight and is no longer tied"
        return Decision(site.name, action, True, reason)


def _masked_value(program: Program, site: Site, mask: nn.Module) -> Tensor:
    weight = program.parameter(site.name)
    assert weight is not None
    training = mask.training
    mask.eval()
    try:
        with torch.no_grad():
            value: Tensor = mask(weight.detach())
    finally:
        mask.train(training)
    # A mask that keeps everything may hand back the weight itself.
    return value.clone() if value.data_ptr() == weight.data_ptr() else value


def _nodes(program: Program, site: Site) -> Iterator[tuple[str, fx.Node]]:
    """Reads of the site's weight, under any of its names, with that name."""
    names = {site.name, *site.aliases}
    for region, node in program.nodes():
        if node.op == "get_attr" and full_name(region, node.target) in names:
            yield full_name(region, node.target), node


def _masked_names(program: Program, site: Site) -> set[str]:
    nodes = _nodes(program, site)
    return {name for name, node in nodes if any(is_mask_node(user) for user in node.users)}


def _raw_names(program: Program, site: Site) -> set[str]:
    nodes = _nodes(program, site)
    return {name for name, node in nodes if any(not is_mask_node(user) for user in node.users)}


def _is_lookup(program: Program, name: str) -> bool:
    return isinstance(program.module(parent_name(name)), (nn.Embedding, nn.EmbeddingBag))


def _drop_mask_nodes(program: Program, site: Site) -> None:
    for _, read in list(_nodes(program, site)):
        for node in list(read.users):
            if is_mask_node(node):
                node.replace_all_uses_with(read)
                node.graph.erase_node(node)
