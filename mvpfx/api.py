"""The public verbs: the only module that knows both the nouns and the passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

from torch import fx, nn

from mvpfx._supported_torch import warn_if_untested
from mvpfx.adapters import adapted_model, is_adapter, without_adapters
from mvpfx.budget import flop_costs, parameter_costs, within_budget
from mvpfx.config import PruningConfig, config_of
from mvpfx.coupled import COUPLED
from mvpfx.dead_heads import head_sites, refusal, unremoved, without_heads
from mvpfx.example import inputs_if_any, own_inputs
from mvpfx.flops import count_flops
from mvpfx.mask import Mask
from mvpfx.passes.capture import Capture
from mvpfx.passes.find_sites import FindSites, graph_sites
from mvpfx.passes.insert_masks import InsertMasks, mask_name
from mvpfx.passes.schedule_density import ScheduleDensity
from mvpfx.passes.shrink_dims import ShrinkDims
from mvpfx.pipeline import run
from mvpfx.program import Program, full_name, parent_name
from mvpfx.region import Region, make_region, region_modules, region_of
from mvpfx.saved_schedule import check_readable
from mvpfx.scheduler import masks_of
from mvpfx.site import Site
from mvpfx.state import (
    State,
    attach_state,
    find_state,
    inner_model,
    late_rule,
    state_of,
)
from mvpfx.swap import original_class, swap_ancestors, swap_class
from mvpfx.transformers_types import is_pretrained
from mvpfx.unconverted import is_converted, make_plain
from mvpfx.variant import graph_module
from mvpfx.weights import weight_owners

M = TypeVar("M", bound=nn.Module)


def prepare(
    model: M, config: PruningConfig | None = None, *, example_inputs: Any = None, **fields: Any
) -> M:
    """Make `model` prunable, in place: scores and a mask for each site, graphs for its regions.

    Nothing else of the model changes: parameters, their names and order, its class for
    `isinstance`, its forward. Graphs are captured when a region is first called.

    Args:
        model: any module. In a transformers model the matmuls inside the base model's repeated
            blocks become sites, in any other every weight that feeds a matmul. Of a `PeftModel`
            it is the model inside; adapters are left alone. A converted model becomes plain again
            and can be pruned further: what was removed stays removed, zeros are weights that are
            zero, all parameters train, and densities are fractions of what is left.
        config: what to prune and how; `PruningConfig()` where it is None.
        example_inputs: one batch (a tensor, a tuple, or a dict of keyword arguments). Needed to
            find functional matmuls on parameters before the optimizer is built, and for what
            graphs have to show: granularity "channel" and "hybrid". Language models of
            transformers have inputs of their own for that.
        fields: those of `PruningConfig`, instead of `config`.

    Example:
        >>> model = prepare(nn.Sequential(nn.Linear(4, 4)), density=0.25, criterion="magnitude")

    Returns:
        `model` itself.

    Raises:
        ValueError: the model has no site, was prepared before, an override matches nothing or
            collides, a block does not tile a weight, a weight is no floating tensor with data,
            or the example inputs do not fit.
        TypeError: a field is unknown, or `config` is not a `PruningConfig`.
    """
    warn_if_untested()
    config = config_of(config, fields)
    check_readable(config.schedule)
    _prepare(adapted_model(model), config, example_inputs)
    return model


def _prepare(model: nn.Module, config: PruningConfig, example_inputs: Any) -> None:
    kind = original_class(model).__name__
    state = find_state(model)
    if state is not None and state.report is None:
        raise ValueError(
            f"{kind} is prepared already. Prepare a model once; to start again with another "
            "configuration, load the model again, or convert it first to prune what is left."
        )
    if state is None and masks_of(model):
        raise ValueError(
            f"{kind} is part of a model that is prepared already. Leave it to that model's masks, "
            "or prepare the part before it is put into the model."
        )
    if state is not None or is_converted(model):
        make_plain(model)
    if example_inputs is None and config.couples:
        example_inputs = own_inputs(model, COUPLED)
    seen, capturing = run((Capture(example_inputs),), Program(model))
    config = _with_density(seen, config, example_inputs)
    _check_heads(seen, config, example_inputs)
    masking = (FindSites(config), InsertMasks(), ScheduleDensity(config.schedule))
    program, records = run(masking, seen)
    state = State(
        config=config,
        sites=dict(program.sites),
        seen={d.site for r in records if r.name == FindSites.name for d in r.decisions},
        default_everywhere=not is_pretrained(model),
        records=[*capturing, *records],
    )
    attach_state(model, state)
    _install(model, program, state, lazy=example_inputs is None)
    state.graphs = {n: graph for n, graph in program.graphs.items() if n in state.regions}


def _with_density(seen: Program, config: PruningConfig, example_inputs: Any) -> PruningConfig:
    """The configuration with a density in the place of a budget.

    Raises:
        ValueError: the budget cannot be kept, or there are no inputs to count FLOPs with.
    """
    if config.params is None and config.flops is None:
        return config
    model, (program, _) = seen.model, run((FindSites(config),), seen)
    if config.params is not None:
        return within_budget(config, program, parameter_costs(program))
    if example_inputs is None:
        example_inputs = own_inputs(model, "flops= is a fraction of the FLOPs of one call")
    return within_budget(config, program, flop_costs(program, count_flops(model, example_inputs)))


def _check_heads(seen: Program, config: PruningConfig, example_inputs: Any) -> None:
    """Make sure that heads can be removed where heads are pruned, as far as graphs show.

    Raises:
        ValueError: the heads of some sites cannot.
    """
    if config.allow_unremovable or not config.prunes_heads:
        return
    found, _ = run((FindSites(config),), seen)
    sites = head_sites(found)
    if example_inputs is None and sites:
        example_inputs = inputs_if_any(seen.model)
        if example_inputs is not None:
            known = found
            found, _ = run((Capture(example_inputs),), Program(seen.model))
            found = replace(found, sites=known.sites, rules=known.rules)
    if not sites or not found.graphs:
        return
    shrunk, records = run((ShrinkDims(returned=True),), without_heads(found, sites))
    reasons = unremoved(shrunk, sites, (d for r in records for d in r.decisions))
    if reasons:
        raise ValueError(refusal(reasons))


def graphs(model: nn.Module) -> dict[str, fx.GraphModule]:
    """The captured graphs of a prepared or converted model, to look at.

    Returns:
        Region name -> `fx.GraphModule`. A prepared model shows what it has captured so far: a
        region appears after its first call, or at once where `prepare` had example inputs.

    Raises:
        ValueError: the model is neither prepared nor converted.
    """
    state, model = state_of(model), inner_model(model)
    found = dict(state.graphs)
    if state.report is None:
        for name in state.regions:
            region = region_of(model.get_submodule(name))
            variants = region.captured() if region is not None else []
            if variants:
                found[name] = variants[-1].graph
    return {name: graph_module(model.get_submodule(name), graph) for name, graph in found.items()}


def _install(model: nn.Module, program: Program, state: State, lazy: bool) -> None:
    """Write masks, masked classes and regions into the model."""
    owners: set[str] = set()
    for name, site in program.sites.items():
        owners |= set(_attach(model, site, program.modules[mask_name(name)]))
    if lazy and state.default_everywhere:
        owners |= set(weight_owners(model))
    for name, module in region_modules(model, owners):
        make_region(module, Region(name, rewrite_region, state))
        state.regions.append(name)


def _attach(model: nn.Module, site: Site, mask: nn.Module | None) -> Iterator[str]:
    """Register a mask beside its weight and let tied layers read it too; yields their names.

    An embedding tied to a matmul's weight keeps reading the raw one.
    """
    assert mask is not None
    for name in (site.name, *site.aliases):
        owner = model.get_submodule(parent_name(name))
        leaf = name.rpartition(".")[2]
        if name == site.name:
            owner.add_module(mask_name(leaf), mask)
        else:
            owner.__dict__[mask_name(leaf)] = mask
        if name == site.name or not isinstance(owner, nn.Embedding):
            swap_class(owner, masked=(leaf,))
            swap_ancestors(model, parent_name(name))
            yield parent_name(name)


def rewrite_region(module: nn.Module, region: Region, graph: fx.Graph) -> fx.Graph:
    """Put masks into a graph that was recorded at a region's first call of its kind.

    Raises:
        RefusedError: the graph shows a site that had no scores when the optimizer was built.
    """
    program = Program(module, graphs={"": graph}, regions=[""])
    state: State = region.state
    assert state.config is not None
    seen = {without_adapters(name) for name in state.seen}
    considered, late_sites = set[str](), dict[str, Site]()
    for site in graph_sites(program, "", graph):
        names = {full_name(region.name, name) for name in (site.name, *site.aliases)}
        if seen & set(map(without_adapters, names)) or not state.default_everywhere:
            continue
        if is_adapter(module, site.module_name):
            continue
        named = replace(site, name=full_name(region.name, site.name), aliases=())
        rule = late_rule(state, named)
        considered |= names
        if rule is not None:
            program.sites[site.name], program.rules[site.name] = site, rule
            late_sites[named.name] = named
    late = (ScheduleDensity(state.config.schedule),) if program.sites else ()
    result, records = run((InsertMasks(), *late), program)
    # Only now: where the passes fail, the next call has to find these sites again.
    state.seen |= considered
    state.sites |= late_sites
    for site in program.sites.values():
        mask = result.modules[mask_name(site.name)]
        assert isinstance(mask, Mask)
        mask.site = late_sites[full_name(region.name, site.name)]
        tuple(_attach(module, site, mask))
    decisions = (decision for record in records for decision in record.decisions)
    state.late += [replace(d, site=full_name(region.name, d.site)) for d in decisions]
    return result.graphs[""]
