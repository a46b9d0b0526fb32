"""Budget: the density at which a model keeps to a fraction of its parameters or FLOPs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mvpfx.config import PruningConfig
from mvpfx.flops import Flops
from mvpfx.patterns import specificity
from mvpfx.program import Program
from mvpfx.rule import scored_attention
from mvpfx.weights import layer_sites


@dataclass(frozen=True)
class Costs:
    """What a model costs as it is.

    Attributes:
        what: "params" or "flops".
        total: of the whole model.
        by_site: site name -> what falls with the density of that site, heads that follow included.
    """

    what: str
    total: int
    by_site: Mapping[str, int]


def parameter_costs(program: Program) -> Costs:
    """Parameters, each counted once, and those of each site that has a rule."""
    model = program.model
    total = sum(parameter.numel() for parameter in model.parameters())
    sizes = {name: math.prod(program.sites[name].shape) for name in program.rules}
    followers: dict[str, int] = defaultdict(int)
    for site in layer_sites(model):
        if site.head is not None and site.name not in program.rules:
            followers[site.head.attention] += math.prod(site.shape)
    for name, rule in program.rules.items():
        attention = scored_attention(rule, program.sites[name].head)
        if attention is not None:
            sizes[name] += followers[attention]
    return Costs("params", total, sizes)


def flop_costs(program: Program, flops: Flops) -> Costs:
    """FLOPs of a call, and those of each site that has a rule.

    Raises:
        ValueError: those of a site are not known.
    """
    known: dict[str, int] = {}
    for name, rule in program.rules.items():
        site = program.sites[name]
        names = (name, *site.aliases)
        known[name] = max(flops.by_parameter.get(other, 0) for other in names)
        attention = scored_attention(rule, site.head)
        if attention is not None:
            known[name] = flops.by_module.get(attention, known[name])
        if not known[name]:
            raise ValueError(
                f"{name} has no FLOPs that could be counted: the example inputs do not reach it, "
                "or an operator hides its matmul. Use params= in the place of flops=, or leave the "
                f'site out: overrides={{"{site.module_name or name}": None}}'
            )
    return Costs("flops", flops.total, known)


def within_budget(config: PruningConfig, program: Program, costs: Costs) -> PruningConfig:
    """The configuration with the density that keeps to its budget, in the place of the budget.

    `budget * total = rest + sum over sites of density * cost`: sites whose override names a density
    keep that, all others get the same one.

    Args:
        config: with `params` or `flops`.
        program: with sites and rules.
        costs: of the model before it is pruned.

    Raises:
        ValueError: the budget cannot be met, or which units of global scope stay decides on it.
    """
    budget = config.params if costs.what == "params" else config.flops
    assert budget is not None, "the configuration has a budget"
    _check_scope(program, costs)
    own = [p for p, change in config.overrides.items() if change and "density" in change]
    free = [
        name
        for name, rule in program.rules.items()
        if rule.granularity.group is None
        and all(specificity(pattern, program.sites[name]) is None for pattern in own)
    ]
    fixed = {name: rule.density for name, rule in program.rules.items() if name not in free}
    falling = sum(costs.by_site[name] for name in free)
    rest = costs.total - sum(costs.by_site.values())
    rest += sum(density * costs.by_site[name] for name, density in fixed.items())
    left = budget * costs.total - rest
    if left <= 0 or not falling:
        raise ValueError(
            f"{costs.what}={budget:g} cannot be kept: what is not pruned, or has a density of its "
            f"own, takes {rest / costs.total:.3g} of the dense model's {costs.what}. Needed: more "
            "than that. Ask for more, or prune more sites with overrides."
        )
    return replace(config, density=min(left / falling, 1.0), params=None, flops=None)


def _check_scope(program: Program, costs: Costs) -> None:
    """Make sure that it does not matter which units of a pool stay."""
    pools: dict[str, tuple[str, float]] = {}
    for name, rule in program.rules.items():
        if rule.scope != "global" or rule.granularity.group is not None:
            continue
        site = program.sites[name]
        rows, cols = rule.granularity.units_shape(site)
        each = costs.by_site[name] / (rows * cols)
        other, wanted = pools.setdefault(rule.criterion, (name, each))
        if each != wanted:
            raise ValueError(
                f'{costs.what} cannot be kept with scope="global": a unit of {name} takes '
                f"{each:g} {costs.what}, one of {other} {wanted:g}, and which of them stay is not "
                'known beforehand. Use scope="local", or density=.'
            )
