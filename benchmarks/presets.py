"""What to prune: single weights, or heads and FFN channels that leave a smaller dense model."""

from __future__ import annotations

from typing import Any

from torch import nn

import mvpfx

GRANULARITIES = ("element", "structured", "hybrid")
WHAT = {
    "element": "single weights",
    "structured": "heads and FFN channels",
    "hybrid": "FFN channels and attention blocks",
}
"""What is pruned, for tables."""
ATTENTION_OUTPUTS = ("attention.output.dense", "attention.o_proj", "attention.out_lin")
FFN_OUTPUTS = ("output.dense", "mlp.fc2", "ffn.lin2")


def pruning_config(
    model: nn.Module,
    *,
    density: float,
    granularity: str,
    criterion: str = "movement",
    constant: bool = False,
) -> mvpfx.PruningConfig:
    """The configuration of a benchmark run.

    Args:
        model: A Hugging Face encoder; "structured" looks up the names of its modules.
        density: Final fraction kept.
        granularity: "element", "structured", or "hybrid" as in `PruningConfig`.
        criterion: As in `PruningConfig`.
        constant: Stay at `density` from the first step, instead of the default schedule.
    """
    options: dict[str, Any] = {"schedule": mvpfx.ConstantSchedule()} if constant else {}
    if granularity == "structured":
        options["overrides"] = heads_and_channels(model)
    else:
        options["granularity"] = granularity
    return mvpfx.PruningConfig(criterion=criterion, density=density, **options)


def heads_and_channels(model: nn.Module) -> dict[str, dict[str, Any] | None]:
    """Overrides that score the inputs of each block's two output projections and nothing else.

    A unit is what one head, or one FFN channel, feeds into its output projection. Where it goes,
    `convert` removes what it was computed from as well: rows of query, key and value, or a row of
    the FFN's first matmul. So the density of the linear layers after convert is the density of the
    units.
    """
    overrides: dict[str, dict[str, Any] | None] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name.endswith(ATTENTION_OUTPUTS):
            overrides[name] = {"granularity": "head"}
        elif name.endswith(FFN_OUTPUTS):
            overrides[name] = {"granularity": "column"}
        else:
            overrides[name] = None
    if not any(overrides.values()):
        raise ValueError(
            f"{type(model).__name__} has no module whose name ends in "
            f"{', '.join((*ATTENTION_OUTPUTS, *FFN_OUTPUTS))}, which is where heads and FFN "
            "channels are scored. Use --granularity element"
        )
    return overrides
