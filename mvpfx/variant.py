"""One captured variant of a region: the graph, the calls it is right for, and how it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx, nn

from mvpfx.call import Arguments
from mvpfx.program import copy_graph
from mvpfx.recording import SELF, CaptureError, Recording
from mvpfx.swap import original_class
from mvpfx.torch_private import (
    int_expression,
    print_expression,
    pytree,
    set_grad_enabled,
)
from mvpfx.transformers_types import held_length, layer_type

Check = Callable[[list[Any]], bool]
Slot = tuple[dict[str, Any], str]


class Variant:
    """A recorded graph made ready to run with the region's own tensors and modules.

    The generated function takes everything it reads as an argument: parameters are fetched from
    `module._parameters` at each call, so a masked attribute is never read twice and a replaced
    parameter is seen at once.

    Attributes:
        graph: the graph, targets relative to the region.
        function: the graph as one function of what `inputs` gathers.
        call: the arguments it was recorded from, without their numbers.
    """

    def __init__(
        self, module: nn.Module, recording: Recording, graph: fx.Graph, call: Arguments
    ) -> None:
        self.graph = graph
        self.call = call
        self._fits, self._outside = size_check(recording), recording.outside
        self._leaves = recording.leaves
        self._modules = tuple(module.modules())  # signatures name modules by id: none may be reused
        self._out_spec = recording.out_spec
        self.function, self._slots = generate(module, graph)
        self._changes_grad_mode = any(n.target is set_grad_enabled for n in graph.nodes)

    def check(self, flat: list[Any]) -> bool:
        """Whether the graph is right for a call with these flat arguments, now."""
        return self._fits(flat) and self._outside.holds()

    def inputs(self, flat: list[Any]) -> list[Any]:
        """What the graph reads: its leaves of a call's flat arguments, then what modules hold."""
        inputs = [flat[position] for position in self._leaves]
        inputs += [holder[key] for holder, key in self._slots]
        return inputs

    def run(self, flat: list[Any]) -> Any:
        """The region's result for the flattened arguments of a call that `check` accepts."""
        inputs = self.inputs(flat)
        if self._changes_grad_mode:
            with torch.set_grad_enabled(torch.is_grad_enabled()):
                out = self.function(*inputs)
        else:
            out = self.function(*inputs)
        return pytree.tree_unflatten(list(out), self._out_spec)


def size_check(recording: Recording) -> Check:
    """Compile the guards of a recording into one function of the flat arguments.

    Raises:
        CaptureError: a guard mentions a size only the running graph knows.
    """
    sizes, shapes = recording.sizes, recording.shapes
    guards = shapes.guards()
    for guard in guards:
        if any(sizes.sources[s].text is None for s in guard.free_symbols if s in sizes.sources):
            raise CaptureError(f"its control flow depends on the length of a cache: {guard}")
        unknown = guard.free_symbols - set(sizes.sources)
        if unknown:
            raise CaptureError(f"its control flow depends on data: {guard}")
    known = {symbol: s for symbol, s in sizes.sources.items() if s.text is not None}
    lines = [f"{symbol} = {source.text}" for symbol, source in known.items()]
    conditions = [print_expression(guard) for guard in guards]
    conditions += [f"{symbol} >= 2" for symbol, s in known.items() if s.node.op != "placeholder"]
    placeholders = (n for n in recording.graph.nodes if n.op == "placeholder")
    for node, fake, at in zip(placeholders, recording.fakes, recording.leaves, strict=True):
        for dim, size in enumerate(fake.shape if fake is not None else ()):
            expression = shapes.replaced(int_expression(size))
            source = sizes.sources.get(expression)
            if source is None or (source.node, source.method, source.dim) != (node, "size", dim):
                conditions.append(f"L[{at}].shape[{dim}] == {print_expression(expression)}")
    return _compile_check(lines, conditions, recording)


def _compile_check(lines: list[str], conditions: list[str], recording: Recording) -> Check:
    """One function: the conditions on caches, then the sizes, then the conditions on sizes.

    A cache that lacks what is asked for is another one than was recorded.
    """
    wanted = list(recording.conditions.values())
    caches = [f"{text} == wanted[{i}]" for i, text in enumerate(recording.conditions)]
    body = [f"if not ({condition}): return False" for condition in caches]
    body += [*lines, "return " + (" and ".join(f"({c})" for c in conditions) or "True")]
    if (
        any(source.node.op != "placeholder" for source in recording.sizes.sources.values())
        or caches
    ):
        errors = "(AttributeError, IndexError, KeyError, TypeError)"
        body = ["try:", *(f"    {line}" for line in body), f"except {errors}:", "    return False"]
    namespace: dict[str, Any] = {
        "math": math,
        "wanted": wanted,
        "layer_type": layer_type,
        "held_length": held_length,
    }
    exec("def check(L):\n" + "\n".join(f"    {line}" for line in body), namespace)
    return cast("Check", namespace["check"])


def resolve(module: nn.Module, node: fx.Node) -> Slot:
    """Where what a get_attr or call_module node reads lives: a dictionary and a key in it."""
    if "constant" in node.meta:
        return node.meta, "constant"
    target = str(node.target)
    if target == SELF:
        return {"": module}, ""
    path, _, name = target.rpartition(".")
    owner = module
    for part in path.split(".") if path else ():
        inner = owner._modules[part]
        assert inner is not None
        owner = inner
    for holder in (owner._parameters, owner._buffers, owner._modules, owner.__dict__):
        if name in holder:
            return cast("dict[str, Any]", holder), name
    raise CaptureError(f"{target} is not held by the region")


def generate(module: nn.Module, graph: fx.Graph) -> tuple[Callable[..., Any], list[Slot]]:
    """Compile a graph to a function of its placeholders followed by all it reads."""
    lifted = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    slots: list[Slot] = []
    held: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            nodes[node] = lifted.placeholder(node.name)
    for node in graph.nodes:
        if node.op not in ("get_attr", "call_module") or node.target in held:
            continue
        target = str(node.target)
        slots.append(resolve(module, node))
        held[target] = lifted.placeholder(f"held_{len(held)}")
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "get_attr":
            nodes[node] = held[str(node.target)]
        elif node.op == "call_module":
            args = fx.map_arg(node.args, lambda n: nodes[n])
            kwargs = fx.map_arg(node.kwargs, lambda n: nodes[n])
            called = (held[str(node.target)], *cast("tuple[Any, ...]", args))
            nodes[node] = lifted.call_method("__call__", called, cast("dict[str, Any]", kwargs))
        else:
            nodes[node] = lifted.node_copy(node, lambda n: nodes[n])
    lifted.lint()
    code = lifted.python_code("self")
    namespace: dict[str, Any] = dict(code.globals)
    exec(code.src, namespace)
    forward = namespace["forward"]
    return (lambda *inputs: forward(None, *inputs)), slots


def graph_module(module: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A region's graph with what it reads, to look at.

    What it reads is raw: attribute access on a prepared module would mask weights twice.
    """
    held: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            holder, key = resolve(module, node)
            held[str(node.target)] = holder[key]
    return fx.GraphModule(held, copy_graph(graph), original_class(module).__name__)
