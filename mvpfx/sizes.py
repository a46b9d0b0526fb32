"""Sizes in a recorded graph: where each symbol is read, and the nodes that compute from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mvpfx.torch_private import Symbol, expression_operator, int_expression, sympy


class UnknownSizeError(Exception):
    """A size that depends on data, or an expression this package cannot write down."""


@dataclass(frozen=True)
class Source:
    """Where a symbol is read.

    Attributes:
        node: what is read in the graph: a tensor, or where `method` is None the number itself.
        method: "size" or "stride", at dimension `dim`.
        text: the same before the graph runs, as Python source over the flat arguments `L`; None
            for a number that only the running graph knows.
    """

    node: fx.Node
    method: str | None = None
    dim: int = 0
    text: str | None = None


@dataclass
class SizeNodes:
    """Turns size expressions into graph nodes.

    Attributes:
        graph: where the nodes go.
        sources: where each symbol is read.
        last_input: the last placeholder; sizes of inputs are read right after it.
    """

    graph: fx.Graph
    sources: dict[Any, Source] = field(default_factory=dict[Any, Source])
    last_input: fx.Node | None = None
    _nodes: dict[Any, Any] = field(default_factory=dict[Any, Any])

    def add_tensor(self, fake: Tensor, node: fx.Node, text: str) -> None:
        """Register the symbols of the sizes and strides of a tensor that is there before the graph
        runs, as what `text` evaluates to.
        """
        if node.op == "placeholder":
            self.last_input = node
        sizes = [(size, "size", dim) for dim, size in enumerate(fake.shape)]
        strides = [(stride, "stride", dim) for dim, stride in enumerate(fake.stride())]
        for number, method, dim in (*sizes, *strides):
            expression = int_expression(number)
            if isinstance(expression, Symbol):
                source = Source(node, method, dim, f"{text}.{method}({dim})")
                self.sources.setdefault(expression, source)

    def add_number(self, number: int | torch.SymInt, node: fx.Node, text: str | None) -> None:
        """Register the symbol of a number that is the value of `node`."""
        self.sources.setdefault(int_expression(number), Source(node, text=text))

    def add_length(self, size: int | torch.SymInt, node: fx.Node, dim: int) -> None:
        """Register the symbol of a size that only the running graph knows."""
        self.sources.setdefault(int_expression(size), Source(node, "size", dim))

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
        source = self.sources[symbol]
        if source.method is None:
            return source.node
        is_input = source.node.op == "placeholder"
        after = self.last_input if is_input else source.node
        assert after is not None
        with self.graph.inserting_after(after):
            node = self.graph.call_method(source.method, (source.node, source.dim))
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
