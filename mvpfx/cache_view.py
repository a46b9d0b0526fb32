"""Caches inside a recorded call: what is read of them is a condition, what they compute a node."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from mvpfx.recording import CONSTANTS, CaptureError
from mvpfx.transformers_types import grows, held_length, layer_type

if TYPE_CHECKING:
    from mvpfx.writer import GraphWriter

_READERS = (
    "get_seq_length",
    "get_max_length",
    "has_previous_state",
    "is_recording_past",
    "get_conv_state",
    "get_recurrent_state",
)
"""Methods of caches that change nothing."""


class CacheView:
    """A cache, or a part of one, inside a recorded call.

    It passes for what it stands for in `isinstance`. What recorded control flow reads of it is what
    it was when the call began, and becomes a condition of the variant; tensors it holds are inputs
    of the graph; methods that write are nodes, so the running graph writes the real cache.
    """

    __slots__ = ("view_book", "view_node", "view_owners", "view_real", "view_text")

    def __init__(
        self, book: CacheBook, node: fx.Node, text: str, real: Any, owners: tuple[Any, ...] = ()
    ) -> None:
        self.view_book = book
        self.view_node = node
        self.view_text = text
        self.view_real = real
        self.view_owners = owners

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self.view_real)

    def __getattr__(self, name: str) -> Any:
        real, book = self.view_real, self.view_book
        if isinstance(real, dict):
            if name == "get":
                return partial(book.entry, self, ".get")
            raise CaptureError(f"a dictionary of a cache is used by .{name} inside the region")
        if name in _WRITERS:
            return partial(_WRITERS[name], book, self)
        if name in _READERS and hasattr(real, name):
            return partial(book.read, self, name)
        value = getattr(real, name)
        if callable(value) and not isinstance(value, type):
            raise CaptureError(f"{type(real).__name__}.{name} is called inside the region")
        node = book.writer.add("call_function", getattr, (self.view_node, name))
        return book.known(self, name, node, f"{self.view_text}.{name}", value)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(self.view_real, dict):
            return self.view_book.entry(self, "", key)
        if not isinstance(key, int) or not isinstance(self.view_real, (list, tuple)):
            raise CaptureError(f"{type(self.view_real).__name__} is indexed inside the region")
        node = self.view_book.writer.add("call_function", operator.getitem, (self.view_node, key))
        text, value = f"{self.view_text}[{key}]", self.view_real[key]
        return self.view_book.known(self, f"[{key}]", node, text, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.view_book.write_entry(self, key, value)

    def __contains__(self, key: Any) -> bool:
        raise CaptureError(f"{type(self.view_real).__name__} is searched inside the region")

    def __iter__(self) -> Any:
        raise CaptureError(f"{type(self.view_real).__name__} is walked inside the region")

    def __len__(self) -> int:
        length = len(self.view_real)
        self.view_book.check_current(self, "len")
        self.view_book.require(f"len({self.view_text})", length)
        return length

    def __bool__(self) -> bool:
        return len(self) > 0 if hasattr(type(self.view_real), "__len__") else True


class CacheBook:
    """What one recording has read of caches, and written to them.

    Attributes:
        writer: where nodes go.
        conditions: source over the flat arguments `L` -> the value it must have for the graph to be
            right.
    """

    def __init__(self, writer: GraphWriter, quietly: Callable[..., Any]) -> None:
        self.writer = writer
        self.conditions: dict[str, Any] = {}
        self._quietly = quietly
        self._values: dict[str, Any] = {}
        self._written: set[int] = set()
        self._roots: set[int] = set()
        self._entries: dict[tuple[int, Any], Any] = {}
        self._lengths: dict[tuple[int, int], Any] = {}

    def require(self, text: str, value: Any) -> None:
        """Make `text == value` a condition of the variant."""
        self.conditions[text] = value

    def check_current(self, view: CacheView, name: str) -> None:
        """Refuse to read what the recorded call may have changed."""
        if any(id(part) in self._written for part in (view.view_real, *view.view_owners)):
            kind = type(view.view_real).__name__
            raise CaptureError(f"{kind}.{name} is read after the region wrote the cache")

    def known(self, view: CacheView, name: str, node: fx.Node, text: str, value: Any) -> Any:
        """A value a cache had when the call began, as the recorded forward sees it."""
        if isinstance(value, (Tensor, *CONSTANTS, type)):
            self.check_current(view, name)
        if isinstance(value, Tensor):
            return self._tensor(node, text, value)
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            return self._number(node, text, value)
        if isinstance(value, (*CONSTANTS, type)):
            self.require(text, value)
            return value
        return CacheView(self, node, text, value, (view.view_real, *view.view_owners))

    def read(self, view: CacheView, name: str, *args: Any, **kwargs: Any) -> Any:
        """Record a call of a method that only reads."""
        if not all(isinstance(arg, CONSTANTS) for arg in (*args, *kwargs.values())):
            raise CaptureError(f"{type(view.view_real).__name__}.{name} is given what is computed")
        node = self.writer.call("call_method", name, (view, *args), kwargs)
        root = id((view.view_real, *view.view_owners)[-1])
        if root in self._roots:
            if name != "get_seq_length":
                kind = type(view.view_real).__name__
                raise CaptureError(f"{kind}.{name} is read after the region wrote the cache")
            number = self.writer.shapes.number()
            self.writer.sizes.add_number(number, node, None)
            return number
        given = [repr(arg) for arg in args] + [f"{k}={v!r}" for k, v in kwargs.items()]
        text = f"{view.view_text}.{name}({', '.join(given)})"
        value = getattr(view.view_real, name)(*args, **kwargs)
        return self.known(view, name, node, text, value)

    def entry(self, view: CacheView, method: str, key: Any, default: Any = None) -> Any:
        """An entry of a dictionary that a cache holds; what the call wrote is what it reads."""
        real = view.view_real
        if (id(real), key) in self._entries:
            return self._entries[id(real), key]
        value = real[key] if not method else real.get(key, default)
        if not isinstance(key, (int, str)) or not isinstance(value, (bool, type(None))):
            raise CaptureError("a dictionary of a cache holds what is no flag")
        self.check_current(view, f"[{key!r}]")
        self.require(f"{view.view_text}.get({key!r})", value)
        return value

    def write_entry(self, view: CacheView, key: Any, value: Any) -> None:
        """Record `dictionary[key] = flag`."""
        if not isinstance(view.view_real, dict) or not isinstance(value, bool):
            raise CaptureError("the region writes more than flags into a cache")
        self.writer.add("call_function", operator.setitem, (view.view_node, key, value))
        self._entries[id(view.view_real), key] = value

    def _wrote(self, view: CacheView) -> None:
        self._written.add(id(view.view_real))
        self._roots.add(id((view.view_real, *view.view_owners)[-1]))

    def _tensor(self, node: fx.Node, text: str, value: Tensor) -> Tensor:
        if text not in self._values:
            self._values[text] = fake = self._quietly(self.writer.shapes.fake, value)
            self.writer.track(fake, node)
            self.writer.sizes.add_tensor(fake, node, text)
            self.require(f"{text}.dtype", value.dtype)
            self.require(f"{text}.device", value.device)
            self.require(f"{text}.requires_grad", value.requires_grad)
            self.require(f"{text}.dim()", value.dim())
            for dim, size in enumerate(value.shape):
                if size < 2:
                    self.require(f"{text}.size({dim})", size)
        return self._values[text]

    def _number(self, node: fx.Node, text: str, value: int) -> Any:
        if text not in self._values:
            self._values[text] = number = self.writer.shapes.number(value)
            self.writer.sizes.add_number(number, node, text)
        return self._values[text]

    def _held(self, view: CacheView, layer: int) -> Any:
        """How much a layer that grows holds before an update; None where its kind is unknown.

        Only updates of the same layer change it, and their outcome is kept.
        """
        real, text = view.view_real, f"{view.view_text}, {layer}"
        kind = layer_type(real, layer)
        self.require(f"layer_type({text})", kind)
        if not grows(kind):
            return None
        held = held_length(real, layer)
        if held < 2:
            self.require(f"held_length({text})", held)
            return held
        node = self.writer.add("call_function", held_length, (view.view_node, layer))
        return self._number(node, f"held_length({text})", held)

    def update(self, view: CacheView, *args: Any, **kwargs: Any) -> Any:
        """Record `Cache.update(keys, values, layer, ...)` -> all keys and values of the layer."""
        layer = args[2] if len(args) > 2 else kwargs.get("layer_idx")
        if not isinstance(layer, int) or len(args) < 2:
            raise CaptureError(f"{type(view.view_real).__name__}.update is given no layer")
        key = (id(view.view_real), layer)
        held = self._lengths[key] if key in self._lengths else self._held(view, layer)
        node = self.writer.call("call_method", "update", (view, *args), kwargs)
        self._wrote(view)
        length = self.writer.shapes.number() if held is None else held + args[0].shape[2]
        self._lengths[key] = None if held is None else length

        def grown(states: Tensor) -> Tensor:
            batch, heads, _, width = states.shape
            out = states.new_empty((batch, heads, length, width))
            return out + 0 * states.sum() if states.requires_grad else out

        keys, values = self._quietly(lambda: (grown(args[0]), grown(args[1])))
        self.writer.track((keys, values), node)
        if held is None:
            self.writer.sizes.add_length(length, self.writer.node_of(keys), 2)
        return keys, values

    def update_conv_state(
        self, view: CacheView, states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Record `Cache.update_conv_state`: the kept columns, then the new ones, which without kept
        ones are padded to the kernel.
        """
        kernel = kwargs.get("conv_kernel_size")
        kept = self.read(view, "get_conv_state", layer_idx, state_idx)
        recording = self.read(view, "is_recording_past", layer_idx)
        if recording or not isinstance(kernel, int):
            raise CaptureError("the kernel of a convolution's state is unknown")
        node = self.writer.call(
            "call_method", "update_conv_state", (view, states, layer_idx, state_idx), kwargs
        )
        self._wrote(view)

        def full() -> Tensor:
            length = states.shape[-1]
            if kept is not None:
                length = kept.shape[-1] + length
            elif length < kernel:
                length = kernel
            out = states.new_empty((*states.shape[:-1], length))
            return out + 0 * states.sum() if states.requires_grad else out

        return self.writer.track(self._quietly(full), node)

    def update_recurrent_state(
        self, view: CacheView, states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Record `Cache.update_recurrent_state(states, layer)` -> the states."""
        node = self.writer.call(
            "call_method", "update_recurrent_state", (view, states, *args), kwargs
        )
        self._wrote(view)
        return self.writer.track(self._quietly(lambda: states * 1), node)


_WRITERS: dict[str, Callable[..., Any]] = {
    "update": CacheBook.update,
    "update_conv_state": CacheBook.update_conv_state,
    "update_recurrent_state": CacheBook.update_recurrent_state,
}
