"""Sizes in a recorded graph: where each symbol is read, and the nodes that compute from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mvpfx.torch_private import Symbol, expression_operator, int_expression, sympy


class UnknownSizeError(Exception):
    """A size that depends on data, or an expression this package cannot write down."""


@dataclass
class SizeNodes:
    """Turns size expressions into graph nodes.

    Attributes:
        graph: where the nodes go.
        sources: the placeholder (or cache update) and dimension each symbol is read from.
        opaque: symbols that no guard may mention, such as the length of a cache.
        last_input: the last placeholder; sizes of inputs are read right after it.
    """

    graph: fx.Graph
    sources: dict[Any, tuple[fx.Node, int]] = field(default_factory=dict[Any, tuple[fx.Node, int]])
    opaque: set[Any] = field(default_factory=set[Any])
    last_input: fx.Node | None = None
    _nodes: dict[Any, Any] = field(default_factory=dict[Any, Any])

    def add_input(self, fake: Tensor, node: fx.Node) -> None:
        """Register the symbols of an input's sizes."""
        self.last_input = node
        for dim, size in enumerate(fake.shape):
            if isinstance(size, torch.SymInt):
                expression = int_expression(size)
                if isinstance(expression, Symbol):
                    self.sources.setdefault(expression, (node, dim))

    def add_opaque(self, size: int | torch.SymInt, node: fx.Node, dim: int) -> None:
        """Register a symbol that only the running graph knows."""
        expression = int_expression(size)
        self.sources[expression] = (node, dim)
        self.opaque.add(expression)

    def check_known(self, expression: Any, name: str) -> None:
        """Raise `UnknownSizeError` where a number a call returned depends on data."""
        if not set(expression.free_symbols) <= set(self.sources):
            raise UnknownSizeError(f"{name} returns a number that depends on data")

    def node(self, expression: Any) -> Any:
        """The int, float or node that has the value of `expression` when the graph runs."""
        if isinstance(expression, sympy.Integer):
            return int(expression)
        if isinstance(expression, (sympy.Float, sympy.Rational)):
            return float(expression)
        if expression not in self._nodes:
            self._nodes[expression] = (
                self._read(expression)
                if isinstance(expression, Symbol)
                else self._compute(expression)
            )
        return self._nodes[expression]

    def _read(self, symbol: Any) -> fx.Node:
        if symbol not in self.sources:
            raise UnknownSizeError(f"size {symbol} depends on data")
        source, dim = self.sources[symbol]
        is_input = source.op == "placeholder"
        after = self.last_input if is_input else source
        assert after is not None
        with self.graph.inserting_after(after):
            node = self.graph.call_method("size", (source, dim))
        node.meta["module"] = ""
        if is_input:
            self.last_input = node
        return node

    def _compute(self, expression: Any) -> fx.Node:
        function = expression_operator(expression)
        if function is None:
            raise UnknownSizeError(f"size {expression} is not a known expression")
        operands = [self.node(operand) for operand in expression.args]
        node = operands[0]
        if len(operands) == 1:
            return self.graph.call_function(function, (node,))
        for operand in operands[1:]:
            node = self.graph.call_function(function, (node, operand))
        return node
