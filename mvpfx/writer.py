"""The writer: what a recorded call computes, as nodes of an fx graph."""

from __future__ import annotations

import operator
from typing import Any, cast

import numpy
import torch
from torch import Tensor, fx, nn

from mvpfx.cache_view import CacheView
from mvpfx.recording import CONSTANTS, SELF, CaptureError
from mvpfx.sizes import SizeNodes
from mvpfx.torch_private import (
    SymbolicShapes,
    autocast_state,
    float_expression,
    is_fake,
    set_grad_enabled,
)


class GraphWriter:
    """Adds nodes to one graph, and knows which node made each tensor.

    Attributes:
        graph: the graph.
        shapes, sizes: the symbols, and the nodes that read and compute them.
        path: names of the modules whose forward runs, innermost last.
        module_names: id of each module of the region -> its name in it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.graph = fx.Graph()
        self.shapes = SymbolicShapes()
        self.sizes = SizeNodes(self.graph)
        self.path: list[str] = []
        self.module_names = {id(m): name for name, m in module.named_modules()}
        self._devices: tuple[str, ...] = ("cpu",)
        self._autocast = autocast_state(self._devices)
        self._grad_enabled = torch.is_grad_enabled()
        self._names = _tensor_names(module)
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Any] = []
        self._attributes: dict[str, fx.Node] = {}
        self._constants = 0

    def watch_autocast(self, devices: set[str]) -> None:
        """Refuse nodes from now on where autocast differs from now on one of these device types."""
        self._devices = tuple(sorted({"cpu", *devices}))
        self._autocast = autocast_state(self._devices)

    def call(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """Add a call of values met while recording."""
        return self.add(op, target, self.node_of(tuple(args)), self.node_of(dict(kwargs)))

    def add(self, op: str, target: Any, args: Any = (), kwargs: Any = None) -> fx.Node:
        """Add a node, after one that switches gradients where the recorded forward did."""
        if autocast_state(self._devices) != self._autocast:
            raise CaptureError("its forward switches autocast inside")
        if op != "get_attr":
            self.sync_grad_mode(torch.is_grad_enabled())
        return self._in_module(self.graph.create_node(op, target, args, kwargs or {}))

    def add_input(self, position: int, value: Tensor | None) -> tuple[fx.Node, Tensor | None]:
        """Add the placeholder of one flat argument; its fake, where it is a tensor."""
        node = self.graph.placeholder(f"a{position}")
        node.meta["module"] = ""
        self.sizes.last_input = node
        if value is None:
            return node, None
        fake = value if isinstance(value, nn.Parameter) else self.shapes.fake(value)
        self.track(fake, node)
        self.sizes.add_tensor(fake, node, f"L[{position}]")
        return node, fake

    def sync_grad_mode(self, enabled: bool) -> None:
        """Add a node that switches gradients on or off, unless they are."""
        if enabled != self._grad_enabled:
            self._grad_enabled = enabled
            self._in_module(self.graph.call_function(set_grad_enabled, (enabled,)))

    def track(self, out: Any, node: fx.Node) -> Any:
        """Remember which node made each tensor of `out`; returns `out`."""
        if isinstance(out, Tensor):
            self._nodes[id(out)] = node
            self._alive.append(out)
            node.meta["val"] = out
        elif isinstance(out, (tuple, list)):
            for i, item in enumerate(cast("tuple[Any, ...]", out)):
                if isinstance(item, (Tensor, tuple, list)):
                    item_node = self.graph.call_function(operator.getitem, (node, i))
                    item_node.meta["module"] = node.meta["module"]
                    self.track(item, item_node)
        return out

    def node_of(self, value: Any) -> Any:
        """The graph's word for a value met in an argument list."""
        if isinstance(value, CacheView):
            return value.view_node
        if isinstance(value, Tensor):
            return self._tensor_node(value)
        if isinstance(value, numpy.generic):
            return self.node_of(value.item())
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self.sizes.node(float_expression(value))
        if isinstance(value, nn.Module):
            if id(value) not in self.module_names:
                raise CaptureError(f"{type(value).__name__} is not part of the region")
            return self._attribute(self.module_names[id(value)] or SELF)
        if isinstance(value, (tuple, list)):
            return self._sequence(cast("tuple[Any, ...] | list[Any]", value))
        if isinstance(value, dict):
            return {k: self.node_of(v) for k, v in cast("dict[Any, Any]", value).items()}
        if isinstance(value, slice):
            return slice(*(self.node_of(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, CONSTANTS) or callable(value):
            return _plain(value)
        raise CaptureError(f"an argument of type {type(value).__name__} is not known")

    def _in_module(self, node: fx.Node) -> fx.Node:
        node.meta["module"] = self.path[-1] if self.path else ""
        return node

    def _attribute(self, target: str) -> fx.Node:
        if target not in self._attributes:
            self._attributes[target] = self.add("get_attr", target)
        return self._attributes[target]

    def _tensor_node(self, tensor: Tensor) -> fx.Node:
        node = self._nodes.get(id(tensor))
        if node is not None:
            return node
        name = self._names.get(id(tensor))
        if name is None:
            if is_fake(tensor):
                raise CaptureError("a tensor reached a call from outside the recorded forward")
            return self._constant(tensor)
        return self._attribute(name)

    def _constant(self, tensor: Tensor) -> fx.Node:
        """A tensor from outside the region: kept with the node, since no module holds it."""
        node = self.add("get_attr", f"_constant{self._constants}")
        self._constants += 1
        node.meta["constant"] = tensor
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)
        return node

    def _sequence(self, value: tuple[Any, ...] | list[Any]) -> Any:
        items = [self.node_of(item) for item in value]
        if isinstance(value, torch.Size):
            return tuple(items)
        kind: Any = type(value)
        return kind(*items) if hasattr(value, "_fields") else kind(items)


def _plain(value: Any) -> Any:
    """A number or text of a class of its own, such as an enum, as what can be written into code."""
    if type(value) in CONSTANTS:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    return float(value) if isinstance(value, float) else value


_READS = frozenset(("size", "stride", "get_seq_length"))
_READ_FUNCTIONS = (operator.getitem, getattr)


def drop_unused(graph: fx.Graph) -> None:
    """Erase reads nobody uses; anything that computes, draws or changes something stays."""
    for node in reversed(list(graph.nodes)):
        reads = node.op == "get_attr" or any(node.target is read for read in _READ_FUNCTIONS)
        reads |= node.op == "call_method" and node.target in _READS
        if reads and not node.users:
            graph.erase_node(node)


def _tensor_names(module: nn.Module) -> dict[int, str]:
    """Relative names of all tensors a region holds, parameters first."""
    names: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        names.setdefault(id(buffer), name)
    for prefix, part in module.named_modules():
        for key, value in part.__dict__.items():
            if isinstance(value, Tensor):
                names.setdefault(id(value), f"{prefix}.{key}" if prefix else key)
    return names
