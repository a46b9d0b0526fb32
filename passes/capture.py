"""Capture: run the model once on example inputs and keep one inference graph a region."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from mvpfx.call import kept
from mvpfx.example import inference, run_example
from mvpfx.facts import fact
from mvpfx.interception import is_capturing
from mvpfx.matmul import find_matmuls, token_count
from mvpfx.pipeline import Decision, Pass
from mvpfx.program import Program, full_name
from mvpfx.recording import CaptureError
from mvpfx.region import NOT_CALLED, capture_graph, region_modules
from mvpfx.weights import parameter_names, weight_owners


@dataclass(frozen=True)
class Capture(Pass):
    """Record each region's call while the model runs on `example_inputs`.

    The run is in eval mode without gradients, so nothing of the model changes. Without example
    inputs, the graphs the program already holds are used.

    Attributes:
        example_inputs: one batch: a tensor, a tuple of positional arguments, or a mapping of
            keyword arguments; None to use what is there.
    """

    example_inputs: Any = None
    name: ClassVar[str] = "capture"
    ensures: ClassVar[tuple[str, ...]] = ("captured",)

    def apply(self, program: Program) -> Iterator[Decision]:
        """Fill `program.graphs`; a region that cannot be captured is declined."""
        owners = set(weight_owners(program.model))
        regions = dict(region_modules(program.model, owners))
        program.regions = list(regions)
        if self.example_inputs is None:
            yield from _reuse(program, regions)
            return
        reasons: dict[str, str] = {}
        with _recording(program, regions, reasons), inference(program.model):
            run_example(program.model, self.example_inputs)
        program.tokens = _tokens(program)
        for name in regions:
            if name in program.graphs:
                size = len(program.graphs[name].nodes)
                yield Decision(name, "capture", True, f"{size} nodes")
            else:
                reason = reasons.get(name, "the example inputs do not reach it")
                yield Decision(name, "capture", False, f"no graph: {reason}")


@fact("captured")
def captured(program: Program) -> str | None:
    """Every region has been looked at."""
    return None if program.regions is not None else "no region has been looked for"


def _reuse(program: Program, regions: dict[str, nn.Module]) -> Iterator[Decision]:
    for name in regions:
        known = name in program.graphs
        reason = "the graph of an earlier call" if known else NOT_CALLED
        yield Decision(name, "capture", known, reason)


def _tokens(program: Program) -> dict[str, int]:
    """Rows of activations that reached each weight, the most where it is used more than once."""
    known = parameter_names(program.model)
    tokens: dict[str, int] = {}
    for region, graph in program.graphs.items():
        for use in find_matmuls(graph, program.weight_shapes(region)):
            count = token_count(use)
            for name in known[full_name(region, use.weight.target)] if count else ():
                tokens[name] = max(tokens.get(name, 0), count or 0)
    return tokens


@contextmanager
def _recording(
    program: Program, regions: dict[str, nn.Module], reasons: dict[str, str]
) -> Generator[None]:
    def record(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if name in program.graphs or name in reasons or is_capturing():
            return
        try:
            call = kept(args, kwargs)
            program.graphs[name] = capture_graph(module, (args, kwargs))
            program.calls[name] = call
        except CaptureError as reason:
            reasons[name] = str(reason)

    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: record(name, module, args, kwargs),
            with_kwargs=True,
        )
        for name, module in regions.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
