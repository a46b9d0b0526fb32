"""Do all ranks prune alike, and what do they send for it? Two processes on this machine, over gloo.

python -m benchmarks.distributed              # writes results/distributed.json
python -m benchmarks.distributed --steps 5 --output /tmp/distributed.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode

import mvpfx
from benchmarks import results_file
from tests.distributed_worker import ENGINES, Run, launch, make, rows
from tests.models import loss

RANKS = 2
CASES: dict[str, dict[str, Any]] = {
    "element, local": {},
    "element, global": {"scope": "global"},
    "4 x 8 blocks, local": {"granularity": (4, 8)},
    "4 x 8 blocks, global": {"granularity": (4, 8), "scope": "global"},
    "magnitude, local": {"criterion": "magnitude"},
    "soft movement": {"criterion": "soft_movement", "threshold": 0.7, "penalty_lambda": 3.0},
}


class Traffic(TorchDispatchMode):
    """While entered, counts the bytes of the tensors that collective calls are about."""

    def __init__(self) -> None:
        super().__init__()
        self.by_call: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, _, name = str(func.name()).partition("::")
        if namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait", "_wrap")):
            largest = max((_bytes(value) for value in [*args, out]), default=0)
            if largest:
                name = name.strip("_").removesuffix("_base").removesuffix("_")
                self.by_call[name] = self.by_call.get(name, 0) + largest
        return out


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(_bytes(item) for item in value)
    return 0


def measured(rank: int, mesh: DeviceMesh, steps: int) -> list[dict[str, Any]]:
    """For each case and engine: the masks of every step, and the traffic of one."""
    found: list[dict[str, Any]] = []
    for case, fields in CASES.items():
        for engine in ("ddp", "fsdp"):
            model, batch = make("bert", **fields)
            share = [rows(batch, rank, rank + 1)]
            run = Run(model, engine, mesh, steps).advance(share, steps)
            found.append({"case": case, "engine": engine, "prints": run.prints})
            found[-1]["bytes"] = traffic(engine, fields, mesh, rank)
    return found


def traffic(engine: str, fields: dict[str, Any], mesh: DeviceMesh, rank: int) -> dict[str, int]:
    """Bytes of one optimizer step, after a first one that sets things up."""
    model, batch = make("bert", **fields)
    if engine == "ddp":
        averaged = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        return {"allreduce of gradients": averaged}
    wrapped = ENGINES[engine](model, mesh)
    optimizer = torch.optim.AdamW(mvpfx.parameter_groups(wrapped, lr=0.01))
    scheduler = mvpfx.SparsityScheduler(wrapped, 3)
    counted = Traffic()
    for step in range(2):
        if step:
            counted.__enter__()
        loss(wrapped(**rows(batch, rank, rank + 1))).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    counted.__exit__(None, None, None)
    return counted.by_call


def dense_traffic(rank: int, mesh: DeviceMesh) -> dict[str, int]:
    """Bytes of one step of FSDP2 with the same model, not prepared."""
    from tests.models import build

    model, batch = build("bert")
    wrapped = ENGINES["fsdp"](model, mesh)
    counted = Traffic()
    for step in range(2):
        if step:
            counted.__enter__()
        loss(wrapped(**rows(batch, rank, rank + 1))).backward()
        wrapped.zero_grad()
    counted.__exit__(None, None, None)
    return counted.by_call


def alone(fields: dict[str, Any], steps: int) -> list[str]:
    """Masks of a single process that accumulates the same two halves of the batch."""
    model, batch = make("bert", **fields)
    halves = [rows(batch, i, i + 1) for i in range(RANKS)]
    return Run(model, "plain", None, steps).advance(halves, steps).prints


def summary(ranks: list[list[dict[str, Any]]], steps: int) -> list[dict[str, Any]]:
    """How many steps agree, for each case and engine."""
    lines: list[dict[str, Any]] = []
    references = {case: alone(fields, steps) for case, fields in CASES.items()}
    for results in zip(*ranks, strict=True):
        prints = [result["prints"] for result in results]
        single = references[results[0]["case"]]
        lines.append(
            {
                "case": results[0]["case"],
                "engine": results[0]["engine"],
                "steps": steps,
                "steps_ranks_agree": sum(len(set(now)) == 1 for now in zip(*prints, strict=True)),
                "steps_equal_to_one_process": sum(
                    a == b for a, b in zip(prints[0], single, strict=True)
                ),
                "bytes_per_step": results[0]["bytes"],
            }
        )
    return lines


def main() -> None:
    """Run all cases and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--output", type=Path, default=results_file.FOLDER / "distributed.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ranks = launch(RANKS, measured, options.steps)
    model, _ = make("bert")
    scores = sum(p.numel() for n, p in model.named_parameters() if n.endswith("scores"))
    weights = sum(p.numel() for p in model.parameters()) - scores
    result: dict[str, Any] = {
        "benchmark": "distributed",
        "model": {"name": "BERT, 2 layers", "weights": weights, "scores_element": scores},
        "ranks": RANKS,
        "backend": "gloo",
        "fsdp_dense_bytes_per_step": launch(RANKS, dense_traffic)[0],
        "cases": summary(ranks, options.steps),
        "environment": results_file.environment(torch.device("cpu")),
    }
    results_file.write(options.output, result)
    for line in result["cases"]:
        print(line)


if __name__ == "__main__":
    main()
