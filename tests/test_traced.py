"""Models traced by others: plain operations of torch in the trace, right for other inputs."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import mvpfx
from mvpfx.kernels.library import LIBRARY
from tests.citizens import native_dense
from tests.models import build

STORAGES = ["dense", "csr", "bsr", *(["native", "native_dense"] if LIBRARY else []), "prepared"]
every_storage = pytest.mark.parametrize("storage", STORAGES)
first = pytest.mark.parametrize("first", [True, False], ids=["first call", "later"])
pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(48, 64), nn.LayerNorm(64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(torch.relu(self.up(x))))


def model_in(storage: str, first: bool) -> tuple[nn.Module, nn.Module]:
    """A model in a storage, called before or not, and the one that it computes the same as."""
    torch.manual_seed(0)
    model = nn.Sequential(Mlp(), nn.Identity()).eval()
    x = torch.randn(4, 48)
    if storage == "prepared":
        made = mvpfx.prepare(
            model, mvpfx.PruningConfig(density=0.4, schedule=mvpfx.ConstantSchedule())
        ).eval()
        model = mvpfx.convert(made, lowering="dense")
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(torch.rand_like(parameter) < 0.2)
            if storage == "native_dense":
                model[0].up.weight[:24] = 0  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue, reportArgumentType]
        made = (
            native_dense(model, (x,))
            if storage == "native_dense"
            else mvpfx.convert(model, example_inputs=(x,), lowering=storage)
        )
    if not first:
        with torch.no_grad():
            made(x)
            made(x)
    return made, model


def agree(found: Any, model: nn.Module, *others: Tensor) -> None:
    with torch.no_grad():
        for x in others:
            assert (found(x) - model(x)).abs().max() <= 1e-5


@every_storage
@first
@pytest.mark.parametrize("gradients", [False, True])
def test_jit_trace(storage: str, first: bool, gradients: bool) -> None:
    made, model = model_in(storage, first)
    x, y = torch.randn(4, 48), torch.randn(7, 48)
    with torch.set_grad_enabled(gradients):
        traced: Any = torch.jit.trace(made, (x,))
    agree(traced, model, x, y)
    names = {node.kind() for node in traced.inlined_graph.nodes()}
    assert all(name.startswith(("aten::", "prim::")) for name in names)
    assert not names & {"prim::PythonOp", "aten::empty"}
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    agree(torch.jit.load(file), model, y)
    agree(made, model, x, y)  # and the trace has left nothing behind


@every_storage
@first
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(storage: str, first: bool, mode: Any) -> None:
    made, model = model_in(storage, first)
    x, y = torch.randn(4, 48), torch.randn(4, 48)
    with torch.no_grad():
        traced = make_fx(made, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    agree(traced, model, x, y)
    agree(made, model, x, y)


@every_storage
@first
def test_onnx_by_torchscript(storage: str, first: bool) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    made, model = model_in(storage, first)
    x, y = torch.randn(4, 48), torch.randn(9, 48)
    file: Any = io.BytesIO()
    names: dict[str, Any] = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(made, (x,), file, dynamo=False, **names)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    agree(run, model, x, y)
    agree(made, model, x)


@pytest.mark.slow
@every_storage
def test_openvino(storage: str) -> None:
    openvino = pytest.importorskip("openvino")
    made, model = model_in(storage, True)
    x, y = torch.randn(4, 48), torch.randn(9, 48)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(openvino.convert_model(made, example_input=x), "CPU", exact)

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(compiled(x.numpy())[0])

    agree(run, model, x, y)


@pytest.mark.parametrize("storage", ["native", "csr", "prepared"])
def test_bert_by_torchscript(storage: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, batch = build("bert")
    model.eval()
    config = mvpfx.PruningConfig(density=0.5, schedule=mvpfx.ConstantSchedule())
    made = mvpfx.prepare(model, config).eval()
    if storage != "prepared":
        made = mvpfx.convert(made, example_inputs=batch, lowering=storage)
    ids = batch["input_ids"]
    with torch.no_grad():
        wanted = made(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vars(made)["config"].return_dict = False
        torch.onnx.export(made, (ids,), tmp_path / "m.onnx", input_names=["ids"], dynamo=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"ids": ids.numpy()})[0]
    assert (torch.from_numpy(found) - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize("storage", ["csr", "bsr", "native", "prepared"])
@pytest.mark.parametrize("kind", ["csr", "coo", "nested", "vmap", "parameter"])
def test_inputs_that_are_not_ordinary(storage: str, kind: str) -> None:
    """Sparse and nested tensors, and those of torch.func, as the plain layers take them."""
    if storage not in STORAGES:
        pytest.skip("without native kernels")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    x = torch.randn(4, 16)
    if storage == "prepared":
        config = mvpfx.PruningConfig(density=0.5, schedule=mvpfx.ConstantSchedule())
        made = mvpfx.prepare(model, config).eval()
        model = mvpfx.convert(made, lowering="dense")
    else:
        with torch.no_grad():
            model[0].weight.mul_(torch.rand(32, 16) < 0.3)  # pyright: ignore[reportCallIssue, reportArgumentType]
        made = mvpfx.convert(model, example_inputs=x, lowering=storage)
    for _ in range(2):
        with torch.no_grad():
            if kind == "nested":
                parts = [torch.randn(2, 16), torch.randn(3, 16)]
                found = made(torch.nested.as_nested_tensor(parts, layout=torch.jagged))
                for part, own in zip(parts, found.unbind(), strict=True):
                    assert (own - model(part)).abs().max() <= 1e-5
                continue
            if kind == "vmap":
                found = torch.func.vmap(made)(x)
            elif kind == "parameter":
                found = made(nn.Parameter(x))
            else:
                found = made(x.to_sparse_csr() if kind == "csr" else x.to_sparse())
            assert (found - model(x)).abs().max() <= 1e-5
        assert (made(x) - model(x)).abs().max() <= 1e-5
