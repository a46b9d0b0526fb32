"""What `prepare` and `convert` remember of a model, kept beside it and copied with it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from mvpfx.adapters import adapted_model, adds_to_inputs
from mvpfx.net import RefusedError
from mvpfx.patterns import specificity
from mvpfx.site_names import refresh_names

if TYPE_CHECKING:
    from mvpfx.config import PruningConfig
    from mvpfx.pipeline import Decision, Record
    from mvpfx.report import Report
    from mvpfx.rule import Rule
    from mvpfx.site import Site

_KEY = "_mvpfx_state"


@dataclass
class State:
    """The record of one prepared or converted model; holds no module, so copies stay cheap.

    Attributes:
        config: the configuration `prepare` was called with; None for a converted model.
        sites: the masked weights by canonical name, in model order.
        seen: every weight that was considered, masked or not.
        regions: names of the modules that are captured as one graph each.
        default_everywhere: whether a site found later, in a graph, is masked unless told otherwise.
        optimizer_built: set by `parameter_groups` and the scheduler; then no site may appear.
        records: one entry a pass, in the order they ran.
        late: decisions made after `prepare`, when a region was first called.
        report: what `convert` did; None for a prepared model.
        graphs: by region, the lowered graphs of a converted model, or those captured by `prepare`.
    """

    config: PruningConfig | None = None
    sites: dict[str, Site] = field(default_factory=dict["str", "Site"])
    seen: set[str] = field(default_factory=set[str])
    regions: list[str] = field(default_factory=list[str])
    default_everywhere: bool = True
    optimizer_built: bool = False
    records: list[Record] = field(default_factory=list["Record"])
    late: list[Decision] = field(default_factory=list["Decision"])
    report: Report | None = None
    graphs: dict[str, fx.Graph] = field(default_factory=dict["str", "fx.Graph"])

    def __getstate__(self) -> dict[str, Any]:
        """Graphs hold fake tensors and do not go into files."""
        return {**self.__dict__, "graphs": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        """A copy of its own lists; graphs and records are shared, since nobody changes them."""
        copied = copy.copy(self)
        copied.__dict__.update(
            sites=dict(self.sites),
            seen=set(self.seen),
            regions=list(self.regions),
            records=list(self.records),
            late=list(self.late),
            graphs=dict(self.graphs),
        )
        memo[id(self)] = copied
        return copied


def attach_state(model: nn.Module, state: State) -> None:
    """Keep `state` beside `model`, out of its state dict."""
    model.__dict__[_KEY] = state


def detach_state(model: nn.Module) -> None:
    """Forget the state of `model`, if it has one."""
    model.__dict__.pop(_KEY, None)


def find_state(model: nn.Module) -> State | None:
    """The state of `model`, or of the first module inside it that has one (a wrapper's content)."""
    return inner_model(model).__dict__.get(_KEY)


def inner_model(model: nn.Module) -> nn.Module:
    """The prepared or converted module inside a wrapper such as DDP; `model` itself if none is.

    Sites and regions of a prepared one get the names they have in it now.
    """
    inner = next((part for part in model.modules() if _KEY in part.__dict__), model)
    state: State | None = inner.__dict__.get(_KEY)
    if state is not None and state.report is None:
        refresh_names(inner, state)
    return inner


def unwrapped(model: nn.Module) -> nn.Module:
    """`model` without what wraps it for training: DDP, an average of models, a compiler, PEFT.

    Raises:
        ValueError: a wrapper of another kind, which may compute something else.
    """
    inner = inner_model(model)
    wrapped = [model.__dict__.get("_modules", {}).get(name) for name in ("module", "_orig_mod")]
    if inner in (model, *wrapped):
        return inner
    if inner is adapted_model(model) and not adds_to_inputs(model):
        return inner
    raise ValueError(
        f"{type(model).__name__} holds a prepared {type(inner).__name__} and may compute more than "
        "it. Convert the prepared model itself."
    )


def state_of(model: nn.Module) -> State:
    """The state of a prepared or converted model.

    Raises:
        ValueError: if `model` is neither.
    """
    state = find_state(model)
    if state is None:
        raise ValueError(
            f"{type(model).__name__} is neither prepared nor converted. "
            "Call mvpfx.prepare(model) before fine-tuning, or mvpfx.convert(model) for deployment."
        )
    return state


def mark_optimizer_built(model: nn.Module) -> None:
    """Record that training was set up, so that a site that appears later is an error."""
    state = find_state(model)
    if state is not None:
        state.optimizer_built = True


def report_of(model: nn.Module) -> Report:
    """The report of a converted model: rows, decisions, output difference and latency as data.

    Raises:
        ValueError: `model` was not made by `convert`.
    """
    state = find_state(model)
    if state is None or state.report is None:
        raise ValueError(
            f"{type(model).__name__} was not made by mvpfx.convert, so there is no report of it."
        )
    return state.report


def late_rule(state: State, site: Site) -> Rule | None:
    """The rule of a site that no layer type told of, or None where it is to be left alone."""
    assert state.config is not None
    fitting = {p: c for p, c in state.config.overrides.items() if specificity(p, site) is not None}
    rule = replace(state.config, overrides=fitting).rules([site], [site.name]).get(site.name)
    if rule is not None and state.optimizer_built:
        raise RefusedError(
            f"{site.name} feeds a matmul, but had no scores when the optimizer or scheduler was "
            "built. Pass example_inputs= to mvpfx.prepare, call the prepared model once before "
            f'building them, or leave it alone: overrides={{"{site.name}": None}}.'
        )
    return rule
