"""The recorder: a real run of a module's forward on fake tensors, written down as an fx graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from mvpfx.interception import Interception, SideEffects
from mvpfx.leaves import FAKE_RULES, Leaf, fake_module
from mvpfx.recording import CONSTANTS, SELF, CaptureError, Opaque, Recording
from mvpfx.sizes import SizeNodes
from mvpfx.torch_private import (
    AutocastCacheOff,
    SymbolicShapes,
    autocast_state,
    float_expression,
    is_fake,
    pytree,
    set_grad_enabled,
)
from mvpfx.transformers_types import is_cache

_KEPT_NAMES = ("__setitem__",)


class Recorder(TorchFunctionMode):
    """Records one call of one region, once: `Recorder(module, forward).record(args, kwargs)`."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.forward = forward
        self.graph = fx.Graph()
        self.shapes = SymbolicShapes()
        self.sizes = SizeNodes(self.graph)
        self.paused = False
        self._constants = 0
        self.module_names = {id(m): name for name, m in module.named_modules()}
        self.path: list[str] = []
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Any] = []
        self._attributes: dict[str, fx.Node] = {}
        self._names = _tensor_names(module)
        self._grad_enabled = torch.is_grad_enabled()
        self._devices: tuple[str, ...] = ("cpu",)
        self._autocast = autocast_state(self._devices)

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
        """Run the forward on fakes of the arguments.

        Raises:
            CaptureError: where the call reads data, changes state, or leaves the known.
        """
        flat, spec = pytree.tree_flatten((args, kwargs), is_leaf=is_cache)
        values, leaves, fakes = self._placeholders(flat)
        fake_args, fake_kwargs = pytree.tree_unflatten(values, spec)
        entry_grad = self._grad_enabled
        devices = {v.device.type for v in flat if isinstance(v, Tensor)}
        self._devices = tuple(sorted({"cpu", *devices}))
        self._autocast = autocast_state(self._devices)
        effects = SideEffects(self.module)
        try:
            with ExitStack() as stack:
                stack.enter_context(AutocastCacheOff())
                stack.enter_context(_identity_hooks())
                stack.enter_context(self.shapes.mode)
                stack.enter_context(Interception(self))
                stack.enter_context(self)
                out = self.forward(self.module, *fake_args, **fake_kwargs)
        finally:
            changed = effects.restore()
            torch.set_grad_enabled(entry_grad)
        if changed:
            raise CaptureError(f"its forward changes state: {', '.join(changed[:3])}")
        out_leaves, out_spec = pytree.tree_flatten(out, is_leaf=lambda x: isinstance(x, Opaque))
        self._sync_grad_mode(entry_grad)
        self.graph.output(tuple(self.node_of(leaf) for leaf in out_leaves))
        _drop_unused(self.graph)
        return Recording(self.graph, leaves, out_spec, self.shapes, self.sizes, fakes)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        name = str(getattr(func, "__name__", ""))
        rule = FAKE_RULES.get(func)
        out = func(*args, **kwargs) if rule is None else rule(*args, **kwargs)
        if name == "__get__":
            return self._property(func, args[0], out)
        return self._call(func, name, args, kwargs, out)

    def leaf(self, leaf: Leaf, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call of a leaf; its fake rule says what comes out."""
        out = self.quietly(leaf.fake, *args, **kwargs)
        node = self._node("call_function", leaf, self.node_of(tuple(args)), self.node_of(kwargs))
        return self.track(out, node)

    def leaf_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call of a torch.nn layer as one call_module node."""
        out = self.quietly(fake_module, module, args, kwargs)
        target = self.module_names[id(module)]
        node = self._node("call_module", target, self.node_of(tuple(args)), self.node_of(kwargs))
        return self.track(out, node)

    def _cache_update(self, opaque: Opaque, *args: Any, **kwargs: Any) -> Any:
        """Record `Cache.update(k, v, layer, ...)`: its length afterwards is a fresh symbol."""
        node = self._node(
            "call_method", "update", (opaque.node, *self.node_of(tuple(args))), self.node_of(kwargs)
        )
        length = self.shapes.fresh_length()

        def grown(states: Tensor) -> Tensor:
            batch, heads, _, width = states.shape
            out = states.new_empty((batch, heads, length, width))
            return out + 0 * states.sum() if states.requires_grad else out

        key, value = self.quietly(lambda: (grown(args[0]), grown(args[1])))
        self.track((key, value), node)
        self.sizes.add_opaque(key.shape[2], self._nodes[id(key)], 2)
        return key, value

    def quietly(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a call without recording what happens inside."""
        paused, self.paused = self.paused, True
        try:
            return call(*args, **kwargs)
        finally:
            self.paused = paused

    def node_of(self, value: Any) -> Any:
        """The graph's word for a value met in an argument list."""
        if isinstance(value, Opaque):
            return value.node
        if isinstance(value, Tensor):
            return self._tensor_node(value)
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
            return value
        raise CaptureError(f"an argument of type {type(value).__name__} is not known")

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

    def _placeholders(self, flat: list[Any]) -> tuple[list[Any], list[int], list[Tensor | None]]:
        values: list[Any] = []
        leaves: list[int] = []
        fakes: list[Tensor | None] = []
        for position, value in enumerate(flat):
            if isinstance(value, Tensor):
                node = self.graph.placeholder(f"a{position}")
                fake = value if isinstance(value, nn.Parameter) else self.shapes.fake(value)
                node.meta["module"] = ""
                values.append(self.track(fake, node))
                self.sizes.add_input(fake, node)
            elif is_cache(value):
                node, fake = self.graph.placeholder(f"a{position}"), None
                values.append(Opaque(node, self._cache_update, value))
                self.sizes.last_input = node
            elif isinstance(value, CONSTANTS):
                values.append(value)
                continue
            else:
                raise CaptureError(f"an argument of type {type(value).__name__} is not known")
            leaves.append(position)
            fakes.append(fake)
        return values, leaves, fakes

    def _property(self, func: Any, tensor: Tensor, out: Any) -> Any:
        name = _property_name(func)
        if not isinstance(out, Tensor) or name in ("grad", "grad_fn", "_base"):
            return out
        node = self._node("call_function", getattr, (self.node_of(tensor), name), {})
        return self.track(out, node)

    def _call(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        flat = pytree.tree_leaves(out)
        if not any(isinstance(x, Tensor) for x in flat) and name not in _KEPT_NAMES:
            for size in flat:
                if isinstance(size, (torch.SymInt, torch.SymFloat)):
                    self.sizes.check_known(float_expression(size), name)
            return out
        node_args, node_kwargs = self.node_of(tuple(args)), self.node_of(dict(kwargs))
        if is_tensor_method_or_property(func) and hasattr(Tensor, name):
            node = self._node("call_method", name, node_args, node_kwargs)
        else:
            node = self._node("call_function", func, node_args, node_kwargs)
        return self.track(out, node)

    def _node(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        if autocast_state(self._devices) != self._autocast:
            raise CaptureError("its forward switches autocast inside")
        if op != "get_attr":
            self._sync_grad_mode(torch.is_grad_enabled())
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta["module"] = self.path[-1] if self.path else ""
        return node

    def _sync_grad_mode(self, enabled: bool) -> None:
        if enabled != self._grad_enabled:
            self._grad_enabled = enabled
            node = self.graph.call_function(set_grad_enabled, (enabled,))
            node.meta["module"] = self.path[-1] if self.path else ""

    def _attribute(self, target: str) -> fx.Node:
        if target not in self._attributes:
            self._attributes[target] = self._node("get_attr", target, (), {})
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
        node = self._node("get_attr", f"_constant{self._constants}", (), {})
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


def _property_name(func: Any) -> str:
    """The name of the tensor property whose getter `func` is."""
    descriptor = getattr(func, "__self__", None)
    return str(getattr(descriptor, "__name__", "?"))


def _identity_hooks() -> Any:
    """Hides the tensors saved while recording from a surrounding non-reentrant checkpoint."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def _drop_unused(graph: fx.Graph) -> None:
    """Erase reads nobody uses; anything that computes, draws or changes something stays."""
    for node in reversed(list(graph.nodes)):
        reads = node.op == "get_attr" or node.target is operator.getitem
        reads |= node.op == "call_method" and node.target == "size"
        if reads and not node.users:
            graph.erase_node(node)
