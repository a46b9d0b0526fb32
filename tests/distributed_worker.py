"""What each of several processes does in the tests of distributed training (gloo, CPU)."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.multiprocessing.spawn import spawn as start_processes
from torch.nn.parallel import DistributedDataParallel

import mvpfx
from mvpfx.scheduler import masks_of
from tests.models import Batch, build, loss

STEPS = 6
Engine = Callable[[nn.Module, DeviceMesh], nn.Module]


class Odd(nn.Module):
    """Sizes that two ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def make(
    name: str, dtype: torch.dtype = torch.float32, batch: int = 2, **fields: Any
) -> tuple[nn.Module, Batch]:
    """A prepared model without dropout, whose density falls at every step, and a global batch."""
    if name == "odd":
        torch.manual_seed(0)
        model, inputs = Odd(), {"x": torch.randn(batch, 7)}
    else:
        model, inputs = build(name)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    schedule = mvpfx.LinearSchedule(warmup=0, cooldown=1)
    settings: dict[str, Any] = {"density": 0.3, "schedule": schedule, **fields}
    config = mvpfx.PruningConfig(**settings)
    return mvpfx.prepare(model.to(dtype), config), inputs


def plain(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """No engine: one process."""
    return model


def ddp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=False)


def fsdp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Each block of a transformers model as a group, then the rest."""
    for block in blocks(model) or [model]:
        if next(block.parameters()).dtype != torch.float32:  # a group has one dtype
            mvpfx.distributed.shard_scores(block, mesh=mesh)
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp_kept(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Parameters stay gathered between forward and backward."""
    for block in blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def fsdp_bf16(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Weights gathered in bfloat16, scores in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in blocks(model):
        mvpfx.distributed.shard_scores(block, mesh=mesh)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ in ("BertLayer", "LlamaDecoderLayer")]


ENGINES: dict[str, Engine] = {
    "plain": plain,
    "ddp": ddp,
    "fsdp": fsdp,
    "fsdp_kept": fsdp_kept,
    "fsdp_bf16": fsdp_bf16,
}


def fingerprint(model: nn.Module) -> str:
    """A digest of every mask; a collective call where scores are sharded."""
    digest = hashlib.sha256()
    for mask in masks_of(model):
        digest.update(mask.site.name.encode() + mask.mask().numpy().tobytes())
    return digest.hexdigest()


class Run:
    """One training run: `advance` takes optimizer steps and notes losses and masks."""

    def __init__(self, model: nn.Module, engine: str, mesh: Any, steps: int = STEPS) -> None:
        self.model = ENGINES[engine](model, mesh)
        groups = mvpfx.parameter_groups(self.model, lr=0.01, score_lr=0.1)
        self.optimizer = torch.optim.AdamW(groups)
        self.scheduler = mvpfx.SparsityScheduler(self.model, steps)
        self.losses: list[float] = []
        self.prints: list[str] = []

    def advance(self, parts: list[Batch], steps: int = STEPS) -> Run:
        """Take `steps` optimizer steps, each on all of `parts`, whose gradients accumulate."""
        for _ in range(steps):
            values = [loss(self.model(**part)) / len(parts) for part in parts]
            for value in values:
                value.backward()
            penalty = mvpfx.penalty(self.model)
            if penalty.requires_grad:
                penalty.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.losses.append(float(sum(value.detach() for value in values)))
            self.prints.append(fingerprint(self.model))
        return self


def rows(batch: Batch, start: int, stop: int) -> Batch:
    return {key: value[start:stop] for key, value in batch.items()}


def launch(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(rank, mesh, *arguments)` returns in each of `world` processes."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_process, (world, folder, work, arguments), nprocs=world)
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)
        ]


def _process(rank: int, world: int, folder: str, work: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    try:
        result = work(rank, init_device_mesh("cpu", (world,)), *arguments)
        torch.save(result, Path(folder) / f"{rank}.pt")
        dist.barrier()  # a rank that leaves early takes the connections of the others with it
    finally:
        dist.destroy_process_group()
    # The result is written. What is left at exit are threads of groups that meshes and FSDP still
    # hold, whose destructors now and then abort the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def train_cases(rank: int, mesh: DeviceMesh, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run each case on this rank's share of the global batch."""
    results: list[dict[str, Any]] = []
    for case in cases:
        model, batch = make(**case["model"])
        run = Run(model, case["engine"], mesh)
        share = len(next(iter(batch.values()))) // mesh.size()
        run.advance([rows(batch, rank * share, (rank + 1) * share)])
        results.append(
            {"losses": run.losses, "prints": run.prints, "explained": mvpfx.explain(run.model)}
        )
    return results
