from typing import Any

import pytest
import torch
from torch import nn

from mvpfx.kernels.library import LIBRARY, MISSING
from mvpfx.passes.choose_storage import ChooseStorage
from mvpfx.passes.lower_matmuls import LowerMatmuls
from mvpfx.passes.propagate_layout import PropagateLayout
from mvpfx.passes.shrink_dims import ShrinkDims
from mvpfx.pipeline import run
from mvpfx.program import Program, graph_text
from mvpfx.storage import SparseLinear
from tests.graphs import applied, assert_same, mlp, outputs, program_of, zero_
from tests.models import build

X = torch.linspace(-2, 2, 20).view(5, 4)


def lowered(program: Program, lowering: str = "csr") -> tuple[Program, list[str]]:
    passes = (ShrinkDims(), ChooseStorage(lowering), PropagateLayout(), LowerMatmuls())
    result, records = run(passes, program)
    return result, applied(records[-1].decisions)


def test_linear_becomes_a_call_of_the_sparse_module() -> None:
    model = mlp(nn.GELU())
    zero_(model.get_parameter("0.weight")[:, 1:])
    program, decisions = lowered(program_of(model, X))
    assert graph_text(program.graphs[""]) == (
        "%a0 = placeholder\n"
        "%_0 = call_module[0](%a0)\n"
        "%_1 = call_module[1](%_0)\n"
        "%_2 = call_module[2](%_1)\n"
        "return (%_2)"
    )
    assert decisions == [
        "0.weight: 8 of 32 values, 100 bytes, feature_major output",
        "2.weight: 24 of 24 values, 208 bytes, token_major output",
    ]
    small = assert_same(program, X)
    assert isinstance(small.get_submodule("0"), SparseLinear)
    assert isinstance(model.get_submodule("0"), nn.Linear)


def test_dense_sites_stay_what_they_are() -> None:
    program, decisions = lowered(program_of(mlp(nn.GELU()), X), "dense")
    assert decisions == []
    assert program.modules == {}


def test_a_layer_called_twice_becomes_one_module() -> None:
    model, batch = build("twice")
    program, decisions = lowered(program_of(model, batch["x"]))
    assert len(decisions) == len(program.modules)
    assert_same(program, batch["x"])


@pytest.mark.skipif(LIBRARY is None, reason=MISSING)
def test_full_blocks_on_native_kernels_have_one_index_each() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))), torch.rand(2, 64)
    full, single, hole = (model.get_parameter(f"{n}.weight") for n in range(3))
    kept = (torch.rand(16, 16) < 0.2).repeat_interleave(4, 0).repeat_interleave(4, 1)
    with torch.no_grad():
        full *= kept
        hole *= kept
        hole[hole.nonzero()[0].unbind()] = 0
        single *= torch.rand(64, 64) < 0.2
    program, _ = lowered(program_of(model, x), "native")
    layers: Any = assert_same(program, x)
    assert [layer.block for layer in layers] == [4, 1, 1]  # a zero in a block would train
    assert [layer.storage for layer in layers] == ["native"] * 3
    count = int(kept.sum())
    assert layers[0].storage_bytes == 4 * (count + count // 16 + 17)
    layers(x).sum().backward()
    assert layers[0].values.grad.shape == (count // 16, 4, 4)


@pytest.mark.parametrize("lowering", ["csr", "bsr"])
@pytest.mark.parametrize(
    "name", ["bert", "roberta", "distilbert", "vit", "gpt2", "llama", "llama_cached"]
)
def test_lowered_models_compute_the_same(name: str, lowering: str) -> None:
    model, batch = build(name)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(torch.rand_like(parameter) < 0.3)
    program, decisions = lowered(program_of(model, batch), lowering)
    assert len(decisions) >= 8
    assert_same(program, batch)


def test_new_shapes_and_gradients_of_the_input() -> None:
    program, _ = lowered(program_of(mlp(nn.GELU()), X))
    small = assert_same(program, X)
    for shape in ((4,), (1, 4), (2, 3, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(outputs(small, x), outputs(program.model, x))
    x = torch.randn(3, 4, requires_grad=True)
    (ours,) = torch.autograd.grad(small(x).sum(), x)
    (expected,) = torch.autograd.grad(program.model(x).sum(), x)
    torch.testing.assert_close(ours, expected)


def test_frozen_parameters_stay_frozen() -> None:
    model = mlp(nn.GELU())
    model.get_parameter("0.weight").requires_grad_(False)
    program, _ = lowered(program_of(model, X))
    sparse = program.modules["0"]
    assert isinstance(sparse, SparseLinear)
    assert not sparse.values.requires_grad
    assert sparse.bias is not None
