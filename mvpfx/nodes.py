"""What fx nodes call, and what they change."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping

from torch import fx, nn

_IN_PLACE = (operator.iadd, operator.imul, operator.isub, operator.itruediv, operator.setitem)


def name_of(node: fx.Node) -> str:
    """What a node computes, for people and for tables."""
    if node.target is getattr:
        return str(node.args[1])
    if isinstance(node.target, str):
        return node.target
    return str(getattr(node.target, "__name__", node.target))


def is_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node changes its first argument; `module` is what a call_module node calls."""
    name = name_of(node)
    bare = node.op != "call_module" and name.endswith("_") and not name.endswith("__")
    asked = bool(getattr(module, "inplace", False) or node.kwargs.get("inplace"))
    return asked or bare or name == "__setitem__" or node.target in _IN_PLACE


def writes_shared(
    node: fx.Node,
    module: nn.Module | None,
    order: Mapping[fx.Node, int],
    views: Collection[str],
) -> bool:
    """Whether a node changes its input in place, and something later reads it (or a view).

    Args:
        node: in question.
        module: what a call_module node calls.
        order: of all nodes of the graph.
        views: names of what may hand on memory of its first input.
    """
    if not is_in_place(node, module):
        return False
    chain = node.args[0] if node.args else None
    own, now = {node}, order[node]
    while isinstance(chain, fx.Node):
        if any(order[user] > now and user not in own for user in chain.users):
            return True
        if name_of(chain) not in views or not chain.all_input_nodes:
            break
        own.add(chain)
        chain = chain.all_input_nodes[0]
    return isinstance(chain, fx.Node) and chain.op in ("placeholder", "get_attr")
