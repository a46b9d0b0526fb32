"""The thing passes work on: a model, its graphs, and a copy-on-write overlay of what will change.

Reading order: `Program` (the data), `copy` (what a pass is given), `parameter` and `module`
(how values are read), `build` (how the overlay is written into a model).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from mvpfx.call import Arguments
from mvpfx.recurrent import refresh_flat_weights
from mvpfx.site import Site
from mvpfx.weights import parameter_names

if TYPE_CHECKING:
    from mvpfx.rule import Rule


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one matmul at `tokens` rows, by storage; "dense" is always among them."""

    tokens: int
    ms: Mapping[str, float]

    @property
    def before_ms(self) -> float:
        """As a dense matmul."""
        return self.ms["dense"]

    def after_ms(self, storage: str) -> float:
        """In `storage`; one that was not measured by itself is a dense one."""
        return self.ms.get(storage, self.before_ms)


@dataclass
class Program:
    """A model seen as graphs, and everything the passes decided so far.

    A pass changes this object only: `model`, its parameters and its modules are never written
    to. Names are full (`encoder.layer.0.output.dense.weight`); targets inside a graph are
    relative to the region's module.
    """

    model: nn.Module
    graphs: dict[str, fx.Graph] = field(default_factory=dict[str, fx.Graph])
    """Region name -> its graph."""
    calls: dict[str, Arguments] = field(default_factory=dict[str, Arguments])
    """Region name -> the arguments of the call its graph was recorded from."""
    regions: list[str] | None = None
    """Names of the regions that capture looked at, with and without a graph; None before it."""
    parameters: dict[str, Tensor | None] = field(default_factory=dict[str, "Tensor | None"])
    """Full parameter name -> its new value; two names of one tensor stay tied."""
    modules: dict[str, nn.Module | None] = field(default_factory=dict[str, "nn.Module | None"])
    """Full module name -> the module to put there; None removes it."""
    attributes: dict[tuple[str, str], Any] = field(default_factory=dict[tuple[str, str], Any])
    """(module name, attribute) -> new value, such as `out_features`."""
    sites: dict[str, Site] = field(default_factory=dict[str, Site])
    rules: dict[str, Rule] = field(default_factory=dict[str, "Rule"])
    """Site -> the rule it was prepared with."""
    storages: dict[str, str] = field(default_factory=dict[str, str])
    """Site -> dense, reduced, csr, bsr, native or native_dense."""
    layouts: dict[str, str] = field(default_factory=dict[str, str])
    """Sparse site -> the layout of its output: feature_major or token_major."""
    tokens: dict[str, int] = field(default_factory=dict[str, int])
    """Site -> rows of activations that reach it, as seen on the example inputs."""
    timings: dict[str, Timing] = field(default_factory=dict[str, Timing])
    """Site -> measured milliseconds."""
    unfolded: set[str] = field(default_factory=set[str])
    """Sites whose mask could not be folded into the weight, and stays."""

    def copy(self) -> Program:
        """Return a program that can be changed while this one stays: graphs are copied (with
        their metadata), dictionaries are shallow copies, tensors and modules are shared.
        """
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        copied: dict[str, Any] = {
            name: value.copy() if isinstance(value, (dict, set)) else value
            for name, value in values.items()
        }
        copied["graphs"] = {name: copy_graph(graph) for name, graph in self.graphs.items()}
        return Program(**copied)

    def parameter(self, name: str) -> Tensor | None:
        """Return the value of parameter or buffer `name` as the passes left it, or None.

        The raw tensor is read from `_parameters`: on a prepared model, attribute access would
        apply the mask.
        """
        if name in self.parameters:
            return self.parameters[name]
        owner = self.module(parent_name(name))
        if owner is None:
            return None
        leaf = name.rpartition(".")[2]
        value = owner._parameters.get(leaf)
        return owner._buffers.get(leaf) if value is None else value

    def module(self, name: str) -> nn.Module | None:
        """Return the module called `name` as the passes left it, or None where there is none."""
        if name in self.modules:
            return self.modules[name]
        found: nn.Module | None = self.model
        for part in name.split(".") if name else ():
            found = found._modules.get(part) if found is not None else None
        return found

    def attribute(self, module_name: str, attribute: str) -> Any:
        """Return a module's attribute as the passes left it; None where it has none."""
        if (module_name, attribute) in self.attributes:
            return self.attributes[module_name, attribute]
        return getattr(self.module(module_name), attribute, None)

    def nodes(self) -> Iterator[tuple[str, fx.Node]]:
        """Yield every node of every graph with the name of its region."""
        for region, graph in self.graphs.items():
            for node in graph.nodes:
                yield region, node

    def weight_shapes(self, region: str) -> Callable[[str], tuple[int, ...] | None]:
        """Return a function: target of a get_attr node in `region` -> shape of that parameter.

        None for what is no parameter of the model: a buffer, a constant, a module.
        """
        known = parameter_names(self.model)

        def shape(target: str) -> tuple[int, ...] | None:
            name = full_name(region, target)
            value = self.parameter(name) if name in known else None
            return None if value is None else tuple(value.shape)

        return shape

    def site_of(self, parameter_name: str) -> Site | None:
        """Return the site that `parameter_name` (or a tied name of it) belongs to."""
        if parameter_name in self.sites:
            return self.sites[parameter_name]
        return next((s for s in self.sites.values() if parameter_name in s.aliases), None)

    def density(self, name: str) -> float:
        """Return the measured fraction of nonzero values of a parameter."""
        value = self.parameter(name)
        if value is None or value.numel() == 0:
            return 0.0
        return int(torch.count_nonzero(value)) / value.numel()

    def build(self, model: nn.Module) -> nn.Module:
        """Write the overlay into `model`, a copy of `self.model` without masks; return it.

        Order: parameters, attributes, modules, so that a replaced module wins. New values keep
        the `requires_grad` of the parameter they replace; a created bias takes its weight's.
        """
        made: dict[int, nn.Parameter] = {}
        for name, value in self.parameters.items():
            if parent_name(name) in self.modules:
                continue
            owner, leaf = model.get_submodule(parent_name(name)), name.rpartition(".")[2]
            if value is None:
                owner._parameters[leaf] = None
                continue
            if leaf in owner._buffers or not (value.is_floating_point() or value.is_complex()):
                owner._buffers[leaf] = value.detach().clone()
                continue
            if id(value) not in made:
                old = owner._parameters.get(leaf)
                old = next(iter(owner._parameters.values()), None) if old is None else old
                trains = old is None or old.requires_grad
                made[id(value)] = nn.Parameter(value.detach().clone(), requires_grad=trains)
            owner._parameters[leaf] = made[id(value)]
        for (module_name, attribute), value in self.attributes.items():
            setattr(model.get_submodule(module_name), attribute, value)
        for name, module in self.modules.items():
            owner, leaf = model.get_submodule(parent_name(name)), name.rpartition(".")[2]
            if module is None:
                owner._modules.pop(leaf, None)
            else:
                owner._modules[leaf] = module
        refresh_flat_weights(model)
        return model


def parent_name(name: str) -> str:
    """Return the dotted name without its last part: the module that holds it.

    >>> parent_name("encoder.dense.weight"), parent_name("weight")
    ('encoder.dense', '')
    """
    return name.rpartition(".")[0]


def full_name(region: str, target: object) -> str:
    """Return the model-wide name of a target that is relative to a region.

    >>> full_name("encoder.layer.0", "dense.weight"), full_name("", "dense.weight")
    ('encoder.layer.0.dense.weight', 'dense.weight')
    """
    return f"{region}.{target}" if region else str(target)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Return a copy of `graph`: same node names, metadata dictionaries copied shallowly."""
    copied = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        nodes[node] = copied.node_copy(node, lambda n: nodes[n])
        nodes[node].meta = dict(node.meta)
    return copied


def graph_text(graph: fx.Graph) -> str:
    """Return a graph as one line a node, short enough to read and to compare.

    Function targets show their bare name: `%y = linear(%x, %weight, %bias)`.
    """
    return "\n".join(_node_text(node) for node in graph.nodes)


def _node_text(node: fx.Node) -> str:
    arguments = [_argument_text(a) for a in node.args]
    arguments += [f"{k}={_argument_text(v)}" for k, v in node.kwargs.items()]
    listed = ", ".join(arguments)
    match node.op:
        case "placeholder":
            return f"%{node.name} = placeholder"
        case "get_attr":
            return f"%{node.name} = get_attr[{node.target}]"
        case "output":
            return f"return {listed}"
        case "call_module":
            return f"%{node.name} = {node.op}[{node.target}]({listed})"
        case "call_method":
            return f"%{node.name} = .{node.target}({listed})"
        case _:
            target = getattr(node.target, "name", None) or getattr(node.target, "__name__", None)
            return f"%{node.name} = {target or node.target}({listed})"


def _argument_text(argument: object) -> str:
    if isinstance(argument, fx.Node):
        return f"%{argument.name}"
    if isinstance(argument, (tuple, list)):
        items: tuple[object, ...] = tuple(argument)
        return "(" + ", ".join(_argument_text(a) for a in items) + ")"
    return str(argument)
