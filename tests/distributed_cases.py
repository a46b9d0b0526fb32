"""Special cases of distributed training, run by every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import mvpfx
from mvpfx.region import region_of
from mvpfx.scheduler import masks_of
from mvpfx.state import state_of
from tests.distributed_worker import STEPS, Run, blocks, fingerprint, fsdp, make, rows
from tests.models import loss, output

HALF = STEPS // 2


def special_cases(rank: int, mesh: DeviceMesh) -> dict[str, Any]:
    """All of the special cases; see the tests of the same words."""
    found: dict[str, Any] = {"stale": stale_masks(mesh)}
    found |= mixed_precision(rank, mesh)
    found |= graphs_and_table(rank, mesh)
    found |= refused(mesh)
    found["converted difference"] = gathered_and_converted(rank, mesh)
    return found


def stale_masks(mesh: DeviceMesh) -> list[str]:
    """Ways of changing scores after which a forward still used the old mask."""
    return [
        f"{criterion}: {what}"
        for criterion in ("movement", "soft_movement")
        for what in stale_after(criterion, mesh)
    ]


def stale_after(criterion: str, mesh: DeviceMesh) -> list[str]:
    fields: dict[str, Any] = {"schedule": mvpfx.ConstantSchedule(), "scope": "global"}
    model, batch = make("odd", criterion=criterion, **fields)
    twin, _ = make("odd", criterion=criterion, **fields)
    model: Any = fsdp(model, mesh)
    optimizers = [torch.optim.SGD(m.parameters(), lr=3.0) for m in (model, twin)]
    stale: list[str] = []

    def check(what: str) -> None:
        found, wanted = output(model(**batch)), output(twin(**batch))
        model.reshard()  # the outermost group stays gathered until a backward
        if not torch.allclose(found, wanted, rtol=1e-5, atol=1e-5):
            stale.append(what)

    check("prepared")
    whole = StateDictOptions(full_state_dict=True)
    state: dict[str, Any] = get_model_state_dict(model, options=whole)
    changed = {k: -v if k.endswith("scores") else v for k, v in state.items()}
    twin.load_state_dict(changed)
    set_model_state_dict(model, changed, options=whole)
    check("loaded")
    with torch.no_grad():
        for mask in (*masks_of(model), *masks_of(twin)):
            mask.require_scores().mul_(-0.5)
            mask.forget()
    check("written in place and forgotten")
    for one, optimizer in zip((model, twin), optimizers, strict=True):
        loss(one(**batch)).backward()
        optimizer.step()
    check("optimizer step without scheduler step")
    return stale


def mixed_precision(rank: int, mesh: DeviceMesh) -> dict[str, Any]:
    """Weights in bfloat16 with scores in float32, and without shard_scores."""
    model, batch = make("bert", scope="global")
    run = Run(model, "fsdp_bf16", mesh).advance([rows(batch, rank, rank + 1)], STEPS)
    dtypes = {str(mask.require_scores().dtype) for mask in masks_of(run.model)}
    model, batch = make("bert")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    try:
        model(**rows(batch, rank, rank + 1))
        message = ""
    except ValueError as error:
        message = str(error)
    return {"bf16 prints": run.prints, "bf16 dtypes": dtypes, "bf16 error": message}


def graphs_and_table(rank: int, mesh: DeviceMesh) -> dict[str, Any]:
    """What regions could not capture, and the table of a sharded model beside that of a whole."""
    model, batch = make("bert", schedule=mvpfx.ConstantSchedule(), criterion="magnitude")
    whole = mvpfx.sparsity_table(model)
    model = fsdp(model, mesh)
    mvpfx.SparsityScheduler(model, 2)
    loss(model(**rows(batch, rank, rank + 1))).backward()
    regions = {name: region_of(model.get_submodule(name)) for name in state_of(model).regions}
    assert all(region is not None and region.calls for region in regions.values())
    declined = {n: r.declined for n, r in regions.items() if r is not None and r.declined}
    return {"declined": declined, "table": mvpfx.sparsity_table(model), "whole table": whole}


def refused(mesh: DeviceMesh) -> dict[str, str]:
    """Messages of what cannot be done with a sharded model."""
    raw = nn.Sequential()
    raw.layers = nn.Sequential(nn.Linear(4, 4))
    fully_shard(raw, mesh=mesh)
    model, _ = make("odd")
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy()}
    calls: dict[str, Any] = {
        "prepare error": lambda: mvpfx.prepare(raw),
        "policy error": lambda: mvpfx.distributed.shard_scores(model, **options),
        "no scores error": lambda: mvpfx.distributed.shard_scores(nn.Linear(2, 2), mesh=mesh),
        "convert error": lambda: mvpfx.convert(fsdp(model, mesh)),
    }
    messages: dict[str, str] = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def gathered_and_converted(rank: int, mesh: DeviceMesh) -> float:
    """The recipe for deployment: gather, load into an unsharded model, convert."""
    model, batch = make("bert")
    run = Run(model, "fsdp", mesh).advance([rows(batch, rank, rank + 1)])
    run.model.eval()
    with torch.no_grad():
        wanted = output(run.model(**batch))
    state = get_model_state_dict(run.model, options=StateDictOptions(full_state_dict=True))
    whole, _ = make("bert")
    whole.load_state_dict(state)
    scheduler = mvpfx.SparsityScheduler(whole, STEPS)
    scheduler.load_state_dict(run.scheduler.state_dict())
    small = mvpfx.convert(whole, example_inputs=batch)
    with torch.no_grad():
        return float((output(small(**batch)) - wanted).abs().max())


def save_halfway(rank: int, mesh: DeviceMesh, folder: str) -> dict[str, Any]:
    """Train half of a run on the whole batch, save it, and go on to the end."""
    model, batch = make("odd", scope="global", dtype=torch.float64)
    run = Run(model, "fsdp", mesh).advance([batch], HALF)
    parameters, moments = get_state_dict(run.model, run.optimizer)
    state = {"model": parameters, "optimizer": moments, "scheduler": run.scheduler.state_dict()}
    save(state, checkpoint_id=folder)
    saved = fingerprint(run.model)
    run.advance([batch], STEPS - HALF)
    return {"print when saved": saved, "prints": run.prints[HALF:]}


def resume_halfway(rank: int, mesh: DeviceMesh, folder: str) -> dict[str, Any]:
    """Load what `save_halfway` left, on however many ranks, and train to the end."""
    model, batch = make("odd", scope="global", dtype=torch.float64)
    run = Run(model, "fsdp", mesh)
    parameters, moments = get_state_dict(run.model, run.optimizer)
    state: dict[str, Any] = {
        "model": parameters,
        "optimizer": moments,
        "scheduler": run.scheduler.state_dict(),
    }
    load(state, checkpoint_id=folder)
    set_state_dict(
        run.model,
        run.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    run.scheduler.load_state_dict(state["scheduler"])
    start = fingerprint(run.model)
    run.advance([batch], STEPS - HALF)
    return {"print at start": start, "prints": run.prints}
