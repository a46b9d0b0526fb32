"""Find sites: which weights feed a matmul, and which of them are to be pruned by which rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from mvpfx.adapters import is_adapter
from mvpfx.config import PruningConfig
from mvpfx.dims.coupling import find_channel_units
from mvpfx.facts import fact
from mvpfx.mask import Mask
from mvpfx.matmul import find_matmuls
from mvpfx.patterns import merge_overrides, specificity
from mvpfx.pipeline import Decision, Pass
from mvpfx.program import Program, full_name
from mvpfx.region import block_names
from mvpfx.site import Site
from mvpfx.swap import original_class
from mvpfx.transformers_types import base_model_name, is_pretrained, is_router
from mvpfx.weights import computed_weights, layer_sites, parameter_names, weight_owners

COMPUTED = (
    "its weight is computed from other parameters (a parametrization, weight norm, "
    "torch.nn.utils.prune); to prune it make it a parameter first, with "
    "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove"
)

LACKING: dict[object, str] = {
    "head": "attention whose number of heads is known",
    "channel": "two weights of which one reads the hidden channels that the other makes",
}
"""Granularity -> what a model lacks where it leaves no site."""


@dataclass(frozen=True)
class FindSites(Pass):
    """List the weights of known layers and those that graphs show feeding a matmul.

    Attributes:
        config: chooses among them and gives each its rule; None keeps them all, with the rules of
            the masks that are there.
    """

    config: PruningConfig | None = None
    name: ClassVar[str] = "find_sites"
    requires: ClassVar[tuple[str, ...]] = ("captured",)
    ensures: ClassVar[tuple[str, ...]] = ("sites",)

    def apply(self, program: Program) -> Iterator[Decision]:
        """Fill `program.sites` and `program.rules`.

        Raises:
            ValueError: no weight of the model feeds a matmul, or overrides leave none.
        """
        candidates = {site.name: site for site in layer_sites(program.model)}
        for region, graph in program.graphs.items():
            for site in graph_sites(program, region, graph):
                known = _tied_to(candidates, site)
                if known is None:
                    candidates[site.name] = site
        if self.config is None:
            _keep_all(program, candidates)
            return
        kind = original_class(program.model).__name__
        waiting = [] if program.graphs else list(weight_owners(program.model))
        if not candidates and not waiting:
            raise ValueError(
                f"{kind} has no weight that feeds a matmul, so there is nothing to prune. "
                "Needed: a linear or convolution layer, or example_inputs= that show a "
                "functional matmul on a parameter."
            )
        if self.config.couples:
            units = find_channel_units(program, list(candidates.values()))
            candidates = {n: replace(c, channel=units.get(n)) for n, c in candidates.items()}
        defaults = _defaults(program, candidates)
        _check_computed(program, self.config, candidates)
        program.rules = self.config.rules(list(candidates.values()), defaults)
        for name in computed_weights(program.model):
            yield Decision(name, "site", False, COMPUTED)
        for name in waiting if not candidates else ():
            yield Decision(name or kind, "site", False, "its weights are found at its first call")
        if candidates and not program.rules:
            raise ValueError(_without_sites(kind, self.config, list(candidates)))
        program.sites = {name: candidates[name] for name in candidates if name in program.rules}
        changes = merge_overrides(self.config.overrides, list(candidates.values()))
        for name in candidates:
            if name in program.rules:
                yield Decision(name, "site", True, _rule_text(program, name))
            else:
                included, asked = changes[name][0], self.config.granularity
                reason = _reason(program, candidates[name], included, defaults, asked)
                yield Decision(name, "site", False, reason)


@fact("sites")
def sites(program: Program) -> str | None:
    """Every site is a parameter of the model."""
    for name in program.sites:
        if program.parameter(name) is None:
            return f"site {name} is no parameter of the model"
    return None


def graph_sites(program: Program, region: str, graph: fx.Graph) -> Iterator[Site]:
    """The sites one graph shows, by the name under which its first matmul reads them."""
    shape_of = program.weight_shapes(region)
    known = parameter_names(program.model)
    for use in find_matmuls(graph, shape_of):
        name = full_name(region, use.weight.target)
        aliases = tuple(alias for alias in known[name] if alias != name)
        shape = shape_of(str(use.weight.target))
        assert shape is not None
        yield Site(name, shape, use.out_dim, aliases, use.parts)


def _tied_to(candidates: dict[str, Site], site: Site) -> Site | None:
    names = {site.name, *site.aliases}
    return next((s for s in candidates.values() if names & {s.name, *s.aliases}), None)


def _defaults(program: Program, candidates: dict[str, Site]) -> list[str]:
    """In a transformers model the sites inside the base model's blocks, without the routers of
    mixtures of experts; else all of them. Adapters are never among them.
    """
    model = program.model
    own = [n for n, site in candidates.items() if not is_adapter(model, site.module_name)]
    if not is_pretrained(model):
        return own
    base = base_model_name(model)
    blocks = [b for b in block_names(model) if not base or b.startswith(f"{base}.")]
    inside = [
        name
        for name in own
        if any(name.startswith(f"{block}.") for block in blocks)
        and not is_router(model.get_submodule(candidates[name].module_name))
    ]
    return inside or own


def _without_sites(kind: str, config: PruningConfig, candidates: list[str]) -> str:
    """Why nothing is left to prune, and what to do."""
    if config.granularity in LACKING:
        return (
            f"{kind} has no {LACKING[config.granularity]}, so granularity "
            f'"{config.granularity}" leaves no site. Use another granularity, such as "row".'
        )
    return (
        f"overrides leave no site in {kind}: {len(candidates)} weights feed a matmul. "
        "Remove an override of None, or add a site with a dict, such as "
        f'overrides={{"{candidates[0]}": {{}}}}.'
    )


def _reason(
    program: Program,
    site: Site,
    included: bool | None,
    defaults: list[str],
    granularity: object,
) -> str:
    """Why a candidate is no site; `included` is what overrides say of it."""
    if included is False:
        return "an override leaves it alone"
    if included or site.name in defaults:
        if granularity == "channel":
            return "no other weight makes or reads the same hidden channels"
        if site.head is None:
            return "it has no attention heads"
        return "its heads are scored where their outputs are read, and go as a whole"
    if is_adapter(program.model, site.module_name):
        return "it belongs to an adapter, which adds to what the masked weight computes"
    if is_router(program.model.get_submodule(site.module_name)):
        return "it routes to experts"
    return "outside the repeated blocks of the base model"


def _keep_all(program: Program, candidates: dict[str, Site]) -> None:
    """Every candidate and every masked weight is a site, masked ones by their own rules."""
    for mask in program.model.modules():
        if isinstance(mask, Mask):
            candidates.setdefault(mask.site.name, mask.site)
            program.rules[mask.site.name] = mask.rule
    program.sites = candidates


def _check_computed(program: Program, config: PruningConfig, candidates: dict[str, Site]) -> None:
    """Make sure that no override is for computed weights only."""
    for pattern in config.overrides:
        if any(specificity(pattern, site) is not None for site in candidates.values()):
            continue
        for name in computed_weights(program.model):
            if specificity(pattern, Site(name, ())) is not None:
                raise ValueError(
                    f'overrides name {name} ("{pattern}"), which is no site: {COMPUTED}. '
                    "Take it out of overrides."
                )


def _rule_text(program: Program, name: str) -> str:
    rule, site = program.rules[name], program.sites[name]
    tied = f", tied to {', '.join(site.aliases)}" if site.aliases else ""
    return f"{rule.criterion}, {rule.granularity}, density {rule.density:g}{tied}"
