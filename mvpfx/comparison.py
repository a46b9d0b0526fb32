"""Comparing a converted model with the masked one it came from, on example inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mvpfx.cost import Quartiles, compare
from mvpfx.example import inference, run_example
from mvpfx.torch_private import pytree

TOLERANCE = 1e-4
"""Largest difference of outputs in float32, absolute up to outputs of 1 and relative above."""
ROUNDS = 15
"""Timed calls of each version, where they fit into the budget."""
BUDGET_SECONDS = 4.0
"""How long all timed calls of one comparison may take together, about."""


@dataclass(frozen=True)
class Comparison:
    """Outputs and latencies of several versions of one model on one batch.

    Attributes:
        difference: largest absolute difference of outputs, masked against converted.
        latency: milliseconds of a whole call by version, timed in turn.
    """

    difference: float
    latency: Mapping[str, Quartiles]

    def fastest(self, *versions: str) -> str:
        """The version among `versions` with the lowest median."""
        return min(versions, key=lambda name: self.latency[name].median_ms)

    def is_clearly_faster(self, version: str, other: str) -> bool:
        """Whether one version takes less time than another, by more than both scatter."""
        return self.latency[version].is_clearly_below(self.latency[other])


def compare_models(
    masked: nn.Module, versions: Mapping[str, nn.Module], example_inputs: Any
) -> Comparison:
    """Run all on the example inputs: outputs must agree, calls are timed in turn.

    Args:
        masked: the model whose function all versions compute.
        versions: name -> model, at least one.
        example_inputs: one batch.

    Raises:
        ValueError: the inputs do not fit, or the model returns no floating tensor.
        RuntimeError: outputs differ by more than `TOLERANCE` (scaled to the dtype).
    """
    with inference(masked):
        wanted = run_example(masked, example_inputs)
    largest_difference = 0.0
    calls: dict[str, Callable[[], object]] = {}
    for name, model in versions.items():
        with inference(model):
            found = run_example(model, example_inputs)
        difference, scale = output_difference(wanted, found)
        allowed = tolerance(masked) * max(1.0, scale)
        if not difference <= allowed:
            raise RuntimeError(
                f"the {name} version differs from the masked model by {difference:.2e} on the "
                f"example inputs; at most {allowed:.1e} was to be expected. Nothing was returned. "
                "Is the model's forward random or stateful in eval mode?"
            )
        largest_difference = max(largest_difference, difference)
        calls[name] = _call(model, example_inputs)
    device = next((p.device for p in masked.parameters()), torch.device("cpu"))
    with torch.no_grad():
        latency = compare(calls, device, ROUNDS, warmup=1, budget_seconds=BUDGET_SECONDS)
    return Comparison(largest_difference, latency)


def agree(first: nn.Module, second: nn.Module, example_inputs: Any) -> bool:
    """Whether both can be called, and all outputs of the same shape agree."""
    try:
        with inference(first), inference(second):
            wanted, found = run_example(first, example_inputs), run_example(second, example_inputs)
        difference, scale = output_difference(wanted, found)
    except (ValueError, RuntimeError):
        return False
    return difference <= tolerance(first) * max(1.0, scale)


def _call(model: nn.Module, example_inputs: Any) -> Callable[[], object]:
    return lambda: run_example(model, example_inputs)


def tolerance(model: nn.Module) -> float:
    """`TOLERANCE`, or 32 units in the last place of the model's coarsest floating dtype."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    coarsest = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    return max(TOLERANCE, 32 * coarsest)


def output_difference(first: Any, second: Any) -> tuple[float, float]:
    """The largest absolute difference between two results, and the largest absolute value.

    Floating tensors of the same place and shape are compared; where removed heads changed the
    shape of returned attention weights there is nothing to compare.

    Raises:
        ValueError: the results have no floating tensor of the same shape in common.
    """
    difference, largest, compared = 0.0, 0.0, 0
    leaves = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=False)
    for a, b in leaves:
        if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point()):
            continue
        if a.shape != b.shape or a.numel() == 0:
            continue
        compared += 1
        a, b = a.detach().double(), b.detach().double()
        same = (a == b) | (a.isnan() & b.isnan())
        gaps = torch.where(same, 0.0, (a - b).abs().nan_to_num(nan=float("inf")))
        difference = max(difference, float(gaps.max()))
        largest = max(largest, float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 0.0)
    if not compared:
        raise ValueError(
            "the model returns no floating tensor, so converted and masked outputs cannot be "
            "compared. Needed: example_inputs for which the forward returns a tensor."
        )
    return difference, largest
