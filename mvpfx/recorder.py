"""The recorder: a real run of a module's forward on fake tensors, written down as an fx graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from mvpfx.cache_view import CacheBook, CacheView
from mvpfx.interception import Interception, SideEffects, one_at_a_time
from mvpfx.leaves import FAKE_RULES, Leaf, fake_module
from mvpfx.outside import Outside
from mvpfx.recording import CONSTANTS, CaptureError, Recording
from mvpfx.torch_private import AutocastCacheOff, float_expression, pytree
from mvpfx.transformers_types import is_cache
from mvpfx.writer import GraphWriter, drop_unused

_KEPT_NAMES = ("__setitem__",)
_NOT_RECORDED = ("grad", "grad_fn", "_base")
"""Properties that hold tensors of autograd's own."""


class Recorder(TorchFunctionMode):
    """Records one call of one region, once: `Recorder(module, forward).record(args, kwargs)`."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.forward = forward
        self.paused = False
        self.writer = GraphWriter(module)
        self.caches = CacheBook(self.writer, self.quietly)

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
        """Run the forward on fakes of the arguments.

        Raises:
            CaptureError: where the call reads data, changes state, or leaves the known.
        """
        writer, entry_grad = self.writer, torch.is_grad_enabled()
        flat, spec = pytree.tree_flatten((args, kwargs), is_leaf=is_cache)
        values, leaves, fakes = self._placeholders(flat)
        fake_args, fake_kwargs = pytree.tree_unflatten(values, spec)
        writer.watch_autocast({v.device.type for v in flat if isinstance(v, Tensor)})
        with one_at_a_time:
            out, outside = self._run(fake_args, fake_kwargs)
        out_leaves, out_spec = pytree.tree_flatten(out, is_leaf=lambda x: isinstance(x, CacheView))
        writer.sync_grad_mode(entry_grad)
        writer.graph.output(tuple(writer.node_of(leaf) for leaf in out_leaves))
        drop_unused(writer.graph)
        return Recording(
            writer.graph,
            leaves,
            out_spec,
            writer.shapes,
            writer.sizes,
            fakes,
            self.caches.conditions,
            outside,
        )

    def _run(self, args: Any, kwargs: Any) -> tuple[Any, Outside]:
        """What the forward returns for fakes, and what else it may read; its traces are undone."""
        entry_grad = torch.is_grad_enabled()
        outside = Outside(self.module)
        effects = SideEffects(self.module, outside)
        try:
            with ExitStack() as stack:
                stack.enter_context(AutocastCacheOff())
                stack.enter_context(_identity_hooks())
                stack.enter_context(self.writer.shapes)
                stack.enter_context(Interception(self))
                stack.enter_context(self)
                out = self.forward(self.module, *args, **kwargs)
        finally:
            changed = effects.restore()
            torch.set_grad_enabled(entry_grad)
        if changed:
            raise CaptureError(f"its forward changes state: {', '.join(changed[:3])}")
        return out, outside

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        name = str(getattr(func, "__name__", ""))
        if name in _DATA:  # what a fake would give is not its data
            raise CaptureError(f"its forward reads the data of a tensor, with .{name}()")
        if name == "__set__":
            return self._set_property(func, *args)
        rule = FAKE_RULES.get(func)
        out = func(*args, **kwargs) if rule is None else rule(*args, **kwargs)
        if name == "__get__":
            return self._property(func, args[0], out)
        return self._call(func, name, args, kwargs, out)

    def leaf(self, leaf: Leaf, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call of a leaf; its fake rule says what comes out."""
        out = self.quietly(leaf.fake, *args, **kwargs)
        return self.writer.track(out, self.writer.call("call_function", leaf, args, kwargs))

    def leaf_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call of a torch.nn layer as one call_module node."""
        out = self.quietly(fake_module, module, args, kwargs)
        target = self.writer.module_names[id(module)]
        return self.writer.track(out, self.writer.call("call_module", target, args, kwargs))

    def quietly(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a call without recording what happens inside."""
        paused, self.paused = self.paused, True
        try:
            return call(*args, **kwargs)
        finally:
            self.paused = paused

    def _placeholders(self, flat: list[Any]) -> tuple[list[Any], list[int], list[Tensor | None]]:
        values: list[Any] = []
        leaves: list[int] = []
        fakes: list[Tensor | None] = []
        for position, value in enumerate(flat):
            if isinstance(value, CONSTANTS):
                values.append(value)
                continue
            if not isinstance(value, Tensor) and not is_cache(value):
                raise CaptureError(f"an argument of type {type(value).__name__} is not known")
            tensor = value if isinstance(value, Tensor) else None
            node, fake = self.writer.add_input(position, tensor)
            cache = CacheView(self.caches, node, f"L[{position}]", value)
            values.append(cache if fake is None else fake)
            leaves.append(position)
            fakes.append(fake)
        return values, leaves, fakes

    def _property(self, func: Any, tensor: Tensor, out: Any) -> Any:
        name = _property_name(func)
        if not isinstance(out, Tensor) or name in _NOT_RECORDED:
            return out
        return self.writer.track(
            out, self.writer.call("call_function", getattr, (tensor, name), {})
        )

    def _set_property(self, func: Any, tensor: Tensor, value: Any) -> None:
        name = _property_name(func)
        if name != "requires_grad":
            raise CaptureError(f"its forward assigns the .{name} of a tensor")
        func(tensor, value)
        self.writer.call("call_method", "requires_grad_", (tensor, value), {})

    def _call(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        flat = pytree.tree_leaves(out)
        in_place = name in _KEPT_NAMES or (name.endswith("_") and not name.endswith("__"))
        if not any(isinstance(x, Tensor) for x in flat) and not in_place:
            for size in flat:
                if isinstance(size, (torch.SymInt, torch.SymFloat)):
                    self.writer.sizes.check_known(float_expression(size), name)
            return out
        if is_tensor_method_or_property(func) and hasattr(Tensor, name):
            return self.writer.track(out, self.writer.call("call_method", name, args, kwargs))
        return self.writer.track(out, self.writer.call("call_function", func, args, kwargs))


_DATA = frozenset(("numpy", "__array__", "data_ptr", "const_data_ptr", "__dlpack__", "tolist"))
"""What looks at the memory of a tensor."""


def _property_name(func: Any) -> str:
    """The name of the tensor property whose getter or setter `func` is."""
    descriptor = getattr(func, "__self__", None)
    return str(getattr(descriptor, "__name__", "?"))


def _identity_hooks() -> Any:
    """Hides the tensors saved while recording from a surrounding non-reentrant checkpoint."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
