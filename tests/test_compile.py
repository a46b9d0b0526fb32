"""`torch.compile` and `torch.export` of prepared models: one graph, scores learn, masks move."""

from __future__ import annotations

import copy
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import mvpfx
from mvpfx.mask import Mask
from tests.models import Batch, build, loss, output

# torch.compile makes an instance of each autograd.Function it meets, and warns of it itself.
pytestmark = [
    pytest.mark.every_model,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
STEPS = 6
CONFIGS: dict[str, dict[str, Any]] = {
    "element": {},
    "block": {"granularity": (4, 8)},
    "row, global": {"granularity": "row", "scope": "global"},
    "soft_movement": {"criterion": "soft_movement", "threshold": 0.75, "penalty_lambda": 100.0},
    "magnitude": {"criterion": "magnitude"},
}


class Graphs:
    """A backend that runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.seen: list[fx.GraphModule] = []

    def __call__(self, graph: fx.GraphModule, _: list[Tensor]) -> Any:
        self.seen.append(graph)
        return graph


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def prepared(name: str, **fields: Any) -> tuple[nn.Module, Batch]:
    """A prepared model whose density falls at every step, without dropout."""
    model, batch = build(name)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    schedule = mvpfx.LinearSchedule(warmup=0, cooldown=1)
    return mvpfx.prepare(
        model, mvpfx.PruningConfig(density=0.3, schedule=schedule, **fields)
    ), batch


def train(model: nn.Module, batch: Batch, call: Any) -> list[Tensor]:
    """Losses of a run, one an optimizer step."""
    scheduler = mvpfx.SparsityScheduler(model, total_steps=STEPS)
    optimizer = torch.optim.SGD(mvpfx.parameter_groups(model, lr=0.05, score_lr=5.0))
    losses: list[Tensor] = []
    for _ in range(STEPS):
        value = loss(call(**batch))
        (value + mvpfx.penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(value.detach())
    return losses


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {m.site.name: m.mask() for m in model.modules() if isinstance(m, Mask)}


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("name", ["mlp", "bert", "llama"])
def test_training_in_one_graph_equals_training_without(name: str, fields: dict[str, Any]) -> None:
    if name != "bert" and fields:
        pytest.skip("one model shows the configurations")
    model, batch = prepared(name, **fields)
    twin = copy.deepcopy(model)
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    found = train(model, batch, compiled)
    wanted = train(twin, batch, twin)
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-5, atol=1e-6)
    kept = masks(model)
    for site, mask in masks(twin).items():
        assert torch.equal(kept[site], mask), site
        assert not mask.all(), f"nothing was pruned of {site}"
    assert len(graphs.seen) == graphs_without_masks(name), "compiled anew as the schedule moved"
    for graph in graphs.seen:
        nodes = [node for node in graph.graph.nodes if node.target is torch.ops.mvpfx.mask]
        assert len(nodes) == len(kept)


def graphs_without_masks(name: str) -> int:
    """Graphs that the unprepared model compiles to: some models write to their config at first."""
    torch.compiler.reset()
    model, batch = build(name)
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for _ in range(STEPS):
        loss(compiled(**batch)).backward()
    return len(graphs.seen)


def test_ahead_of_time_autograd_gives_the_gradients_of_eager() -> None:
    model, batch = prepared("bert")
    twin = copy.deepcopy(model)
    for one in (model, twin):
        mvpfx.SparsityScheduler(one, total_steps=STEPS).load_state_dict(
            {"step_count": 4, "total_steps": STEPS}
        )
    loss(torch.compile(model, backend="aot_eager", fullgraph=True)(**batch)).backward()
    loss(twin(**batch)).backward()
    found = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        if parameter.grad is None:
            assert found[name].grad is None, name
            continue
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_trains_and_evaluates_like_eager() -> None:
    model, batch = prepared("bert")
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    found, wanted = train(model, batch, compiled), train(twin, batch, twin)
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-4, atol=1e-5)
    model.eval()
    twin.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            output(compiled(**batch)), output(twin(**batch)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_blocks_compiled_one_by_one_share_their_graph() -> None:
    model, batch = prepared("bert")
    twin = copy.deepcopy(model)
    graphs = Graphs()
    for block in model.get_submodule("bert.encoder.layer").children():
        block.compile(backend=graphs, fullgraph=True)
    found, wanted = train(model, batch, model), train(twin, batch, twin)
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-5, atol=1e-6)
    assert len(graphs.seen) == 1, "a graph for each block"


@pytest.mark.parametrize("name", ["mlp", "bert", "gpt2"])
def test_an_exported_model_holds_its_masks(name: str) -> None:
    model, batch = prepared(name)
    train(model, batch, model)
    model.eval()
    batch = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        wanted = output(model(**batch))
        program = torch.export.export(model, (), batch, strict=False)
    assert not any(n.target is torch.ops.mvpfx.mask.default for n in program.graph.nodes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    with torch.no_grad():
        found = output(torch.export.load(file).module()(**batch))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_export_sees_scores_that_no_call_has_seen() -> None:
    model, batch = prepared("mlp")
    model.eval()
    model(**batch)
    scheduler = mvpfx.SparsityScheduler(model, total_steps=STEPS)
    scheduler.load_state_dict({"step_count": STEPS, "total_steps": STEPS})
    with torch.no_grad():
        for mask in model.modules():
            if isinstance(mask, Mask):
                mask.require_scores().neg_()
        program = torch.export.export(model, (), batch, strict=False)
        torch.testing.assert_close(program.module()(**batch), model(**batch))


def test_a_copy_has_masks_of_its_own() -> None:
    model, batch = prepared("mlp")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(**batch)
    twin = copy.deepcopy(model)
    train(twin, batch, twin)
    copied = torch.compile(twin, backend="eager", fullgraph=True)
    torch.testing.assert_close(copied(**batch), twin(**batch))
    assert all(mask.all() for mask in masks(model).values())


def test_a_graph_without_its_mask_says_so() -> None:
    handle = torch.tensor(2**40)
    message = (
        f"a compiled graph asks for mask {2**40}, which this process does not have. "
        "Compile the prepared model anew. For a file, convert it with mvpfx.convert first, or "
        "export it with torch.export.export(..., strict=False), which keeps the masks as data."
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        torch.ops.mvpfx.mask(torch.zeros(2, 2), None, handle)


def test_a_pickled_model_compiles_in_another_process(tmp_path: Path) -> None:
    model, batch = prepared("mlp")
    train(model, batch, model)
    model.eval()
    with torch.no_grad():
        torch.save((model, batch, model(**batch)), tmp_path / "model.pt")
    code = (
        "import torch\n"
        f"model, batch, wanted = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "with torch.no_grad():\n"
        "    found = torch.compile(model, backend='aot_eager', fullgraph=True)(**batch)\n"
        "torch.testing.assert_close(found, wanted)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
