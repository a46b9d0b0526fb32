"""Proof that a region's own forward does what its rewritten graph says: it is recorded again."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, fx, nn

from mvpfx.call import filled
from mvpfx.example import inference
from mvpfx.program import Program
from mvpfx.recording import CaptureError
from mvpfx.region import capture_graph
from mvpfx.state import detach_state
from mvpfx.swap import restore

NO_CALL = "no call is known to prove it with: give convert example_inputs"
_FAILURES = (
    CaptureError, RuntimeError, ValueError, TypeError, IndexError, AssertionError, KeyError,
    AttributeError,
)  # fmt: skip
"""What a forward raises that finds other sizes than it expects."""


def find_difference(program: Program, region: str) -> tuple[str, fx.Node | None] | None:
    """Record a region as the program would build it, compare with its graph, and run it.

    What a leaf reads from its module while it runs, as a number of groups, is in no graph.

    Returns:
        None where both are the same. Else what is not, and at which node; None for that where
        recording failed.
    """
    call = program.calls.get(region)
    if call is None:
        return NO_CALL, None
    module = region_copy(program, region)
    try:
        with inference(module):
            recorded = capture_graph(module, filled(call))
            args, kwargs = filled(call)
            module(*args, **kwargs)
    except _FAILURES as error:
        return f"the module's forward fails with what would stay: {error}", None
    node = first_difference(program.graphs[region], recorded)
    if node is None:
        return None
    name = getattr(node.target, "__name__", node.target)
    return f"the module's forward does not follow at {name}", node


def region_copy(program: Program, region: str) -> nn.Module:
    """A copy of the region's module with what the passes changed in it, without masks."""
    source = program.module(region)
    assert source is not None
    module = copy.deepcopy(source)
    restore(module)
    detach_state(module)
    prefix = f"{region}." if region else ""
    part = Program(
        source,
        parameters={
            name.removeprefix(prefix): value
            for name, value in program.parameters.items()
            if name.startswith(prefix)
        },
        attributes={
            (name.removeprefix(region).removeprefix("."), attribute): value
            for (name, attribute), value in program.attributes.items()
            if name == region or name.startswith(prefix)
        },
    )
    return part.build(module)


def first_difference(expected: fx.Graph, found: fx.Graph) -> fx.Node | None:
    """The first node of `expected` that `found` does not have in its place; None if there is none.

    Reads of parameters may stand anywhere.
    """
    ours = [node for node in expected.nodes if node.op != "get_attr"]
    theirs = [node for node in found.nodes if node.op != "get_attr"]
    places = {node: i for i, node in enumerate(ours)} | {node: i for i, node in enumerate(theirs)}
    for one, other in zip(ours, theirs, strict=False):
        same = one.op == other.op and one.target == other.target
        same = same and _plain(one.args, places) == _plain(other.args, places)
        if not same or _plain(dict(one.kwargs), places) != _plain(dict(other.kwargs), places):
            return one
    return None if len(ours) == len(theirs) else ours[-1]


def _plain(argument: Any, places: dict[fx.Node, int]) -> Any:
    """An argument list with nodes as their places, and reads as their targets."""
    if isinstance(argument, fx.Node):
        return (
            ("read", argument.target) if argument.op == "get_attr" else ("node", places[argument])
        )
    if isinstance(argument, (tuple, list)):
        return [_plain(item, places) for item in argument]
    if isinstance(argument, dict):
        return {key: _plain(value, places) for key, value in argument.items()}
    if isinstance(argument, slice):
        return [_plain(item, places) for item in (argument.start, argument.stop, argument.step)]
    return None if isinstance(argument, Tensor) else argument
