"""One captured variant of a region: the graph, the calls it is right for, and how it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx, nn

from mvpfx.recording import SELF, CaptureError, Recording
from mvpfx.torch_private import (
    Symbol,
    int_expression,
    print_expression,
    pytree,
    set_grad_enabled,
)

Check = Callable[[list[Any]], bool]
Slot = tuple[dict[str, Any], str]


class Variant:
    """A recorded graph made ready to run with the region's own tensors and modules.

    The generated function takes everything it reads as an argument: parameters are fetched from
    `module._parameters` at each call, so a masked attribute is never read twice and a replaced
    parameter is seen at once.

    Attributes:
        graph: the graph, targets relative to the region.
        check: whether a call's flat arguments meet the guards on sizes.
    """

    def __init__(self, module: nn.Module, recording: Recording, graph: fx.Graph) -> None:
        self.graph = graph
        self.check: Check = size_check(recording)
        self._leaves = recording.leaves
        self._out_spec = recording.out_spec
        self._function, self._slots = _generate(module, graph)
        self._changes_grad_mode = any(n.target is set_grad_enabled for n in graph.nodes)

    def run(self, flat: list[Any]) -> Any:
        """The region's result for the flattened arguments of a call that `check` accepts."""
        inputs = [flat[position] for position in self._leaves]
        inputs += [holder[key] for holder, key in self._slots]
        if self._changes_grad_mode:
            with torch.set_grad_enabled(torch.is_grad_enabled()):
                out = self._function(*inputs)
        else:
            out = self._function(*inputs)
        return pytree.tree_unflatten(list(out), self._out_spec)


def size_check(recording: Recording) -> Check:
    """Compile the guards of a recording into one function of the flat arguments.

    Raises:
        CaptureError: a guard mentions a size only the running graph knows.
    """
    sizes, shapes = recording.sizes, recording.shapes
    position = dict(
        zip(
            (n for n in recording.graph.nodes if n.op == "placeholder"),
            recording.leaves,
            strict=True,
        )
    )
    guards = shapes.guards()
    for guard in guards:
        if set(guard.free_symbols) & sizes.opaque:
            raise CaptureError(f"its control flow depends on the length of a cache: {guard}")
    lines = [
        f"{symbol} = L[{position[node]}].shape[{dim}]"
        for symbol, (node, dim) in sizes.sources.items()
        if symbol not in sizes.opaque
    ]
    conditions = [print_expression(guard) for guard in guards]
    for node, fake in zip(position, recording.fakes, strict=True):
        for dim, size in enumerate(fake.shape if fake is not None else ()):
            expression = shapes.replaced(int_expression(size))
            if not isinstance(expression, Symbol) or sizes.sources.get(expression) != (node, dim):
                found = print_expression(expression)
                conditions.append(f"L[{position[node]}].shape[{dim}] == {found}")
    lines.append("return " + (" and ".join(f"({c})" for c in conditions) or "True"))
    namespace: dict[str, Any] = {"math": math}
    exec("def check(L):\n" + "\n".join(f"    {line}" for line in lines), namespace)
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


def _generate(module: nn.Module, graph: fx.Graph) -> tuple[Callable[..., Any], list[Slot]]:
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
