"""Converted models in other people's runtimes: torch.export, torch.compile, ONNX."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from mvpfx.storage import SparseLinear
from tests.citizens import MODELS, STORAGES, citizen
from tests.models import Batch, output

pytestmark = pytest.mark.every_model
models = pytest.mark.parametrize("name", MODELS)
every_storage = pytest.mark.parametrize("lowering", STORAGES)
ONNX = [
    ("bert", "csr"),
    *(
        pytest.param(name, lowering, marks=pytest.mark.slow)
        for name in MODELS
        for lowering in STORAGES
        if (name, lowering) != ("bert", "csr")
    ),
]


def without_cache(name: str, batch: Batch) -> Batch:
    """A call that hands no cache back, which is no tensor."""
    return batch if name == "bert" else {**batch, "use_cache": False}


@torch.no_grad()
def logits(model: Any, batch: Batch) -> Tensor:
    return output(model(**batch))


@models
@every_storage
def test_torch_export(name: str, lowering: str) -> None:
    _, small, batch = citizen(name, lowering)
    batch = without_cache(name, batch)
    with torch.no_grad():
        program = torch.export.export(small, (), batch)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    found = logits(torch.export.load(file).module(), batch)
    torch.testing.assert_close(found, logits(small, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_exported_sparse_model_runs_where_mvpfx_is_imported(tmp_path: Path) -> None:
    _, small, batch = citizen("bert", "csr")
    with torch.no_grad():
        torch.export.save(torch.export.export(small, (), batch), tmp_path / "model.pt2")
    torch.save((batch, logits(small, batch)), tmp_path / "expected.pt")
    code = (
        "import sys, torch, mvpfx, transformers.modeling_outputs; folder = sys.argv[1]\n"
        "batch, expected = torch.load(folder + '/expected.pt')\n"
        "model = torch.export.load(folder + '/model.pt2').module()\n"
        "with torch.no_grad(): torch.testing.assert_close(model(**batch).logits, expected)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


class Graphs:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: fx.GraphModule, _: list[Tensor]) -> Any:
        self.count += 1
        return graph


def compiled(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """The outputs of a compiled model, and of how many graphs it consists: one more a break."""
    torch.compiler.reset()
    graphs = Graphs()
    found = logits(torch.compile(model, backend=graphs), batch)
    return found, graphs.count


@pytest.mark.slow
@models
@every_storage
def test_torch_compile_breaks_no_graph_more(name: str, lowering: str) -> None:
    model, small, batch = citizen(name, lowering)
    wanted, before = compiled(model, batch)
    found, after = compiled(small, batch)
    assert 1 <= after <= before
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


# The exporter's own call of pytree.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize(("name", "lowering"), ONNX)
def test_onnx_in_two_runtimes(name: str, lowering: str, tmp_path: Path) -> None:
    onnxruntime, openvino = (pytest.importorskip(m) for m in ("onnxruntime", "openvino"))
    _, small, batch = citizen(name, lowering)
    wanted, path = logits(small, batch), tmp_path / "model.onnx"
    call = without_cache(name, batch)
    with torch.no_grad():
        torch.onnx.export(small, (), path, kwargs=call, dynamo=True, verbose=False)
    arrays = {name: value.numpy() for name, value in batch.items()}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {i.name: arrays[i.name] for i in session.get_inputs()})[0]
    assert (torch.from_numpy(found) - wanted).abs().max() <= 1e-4
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    other = openvino.compile_model(path, "CPU", exact)
    names = [i.get_any_name() for i in other.inputs]
    found = other({name: arrays[name] for name in names})[0]
    assert (torch.from_numpy(found) - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize("block", [1, 4])
def test_the_dense_weight_of_onnx(block: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 8) * (torch.rand(12, 8) < 0.3)
    weight[4:8] = 0
    weight[:, :4] = 0
    layer = SparseLinear.from_dense(weight, block=block)
    assert torch.equal(layer.dense(), weight)
    none = SparseLinear.from_dense(torch.zeros(4, 8), block=block)
    assert torch.equal(none.dense(), torch.zeros(4, 8))
