import copy
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvpfx import sparse_matmul
from mvpfx.sparse_matmul import TILE
from mvpfx.storage import Layout, SparseLinear, find_block, stored_fraction


def sparse_weight(rows: int = 16, columns: int = 8, block: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    grid = torch.rand(rows // block, columns // block, generator=generator) < 0.5
    mask = grid.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return torch.randn(rows, columns, generator=generator) * mask


def layer(block: int = 1, layout: Layout = "token_major") -> SparseLinear:
    bias = torch.linspace(-1, 1, 16)
    return SparseLinear.from_dense(sparse_weight(), bias, block, layout)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_linear_with_gradients(block: int, dtype: torch.dtype) -> None:
    weight = sparse_weight().to(dtype).requires_grad_()
    bias = torch.linspace(-1, 1, 16).to(dtype).requires_grad_()
    x = torch.randn(2, 3, 8).to(dtype).requires_grad_()
    sparse = SparseLinear.from_dense(weight, bias, block)
    ours, expected = sparse(x), F.linear(x, weight, bias)
    grad = torch.randn_like(expected)
    assert sparse.bias is not None
    gx, gv, gb = torch.autograd.grad(ours, (x, sparse.values, sparse.bias), grad)
    rx, rw, rb = torch.autograd.grad(expected, (x, weight, bias), grad)
    tolerance = 1e-5 if dtype is not torch.bfloat16 else 0.1

    def close(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

    close(ours, expected)
    close(gx, rx)
    close(gb, rb)
    stored = SparseLinear.from_dense(torch.where(weight != 0, rw, 0), None, block)
    close(gv, stored.values.detach())
    assert torch.equal(sparse.dense(), weight)


def test_gradcheck() -> None:
    sparse = layer().double()
    x = torch.randn(3, 8, dtype=torch.double, requires_grad=True)
    sparse.values.requires_grad_()

    def call(x: Tensor, values: Tensor) -> Tensor:
        return torch.func.functional_call(sparse, {"values": values}, (x,))

    assert torch.autograd.gradcheck(call, (x, sparse.values))


def test_feature_major_hands_on_its_layout() -> None:
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        y = layer(layout="feature_major")(x)
        assert y.shape == (2, 3, 16)
        assert y.stride() == (3, 1, 6)
        assert F.gelu(y).stride() == y.stride()
        assert layer()(x).is_contiguous()
        assert torch.equal(y, layer()(x))


def test_long_inputs_are_tiled() -> None:
    x = torch.randn(1, 2 * TILE + 5, 8)
    with torch.no_grad():
        ours = layer()(x)
    torch.testing.assert_close(ours, F.linear(x, layer().dense(), layer().bias))


def test_an_input_changed_in_place_is_seen() -> None:
    sparse, x = layer(), torch.randn(3, 8)
    with torch.no_grad():
        first = sparse(x)
        assert torch.equal(sparse(x), first)
        x.mul_(2)
        torch.testing.assert_close(sparse(x), F.linear(x, sparse.dense(), sparse.bias))
        with torch.inference_mode():
            torch.testing.assert_close(sparse(x), F.linear(x, sparse.dense(), sparse.bias))


@pytest.mark.parametrize("shape", [(8,), (0, 8), (1, 8), (2, 0, 8)])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with torch.no_grad():
        assert torch.allclose(layer()(x), F.linear(x, layer().dense(), layer().bias))


def test_all_zeros_give_the_bias() -> None:
    sparse = SparseLinear.from_dense(torch.zeros(4, 8), torch.ones(4))
    with torch.no_grad():
        assert torch.equal(sparse(torch.randn(2, 8)), torch.ones(2, 4))


def test_copies_and_state_dict() -> None:
    sparse, x = layer(4), torch.randn(3, 8)
    assert list(sparse.state_dict()) == ["values", "bias", "crow_indices", "col_indices"]
    again = pickle.loads(pickle.dumps(copy.deepcopy(sparse)))
    other = layer(4)
    with torch.no_grad():
        other.values.zero_()
        other.load_state_dict(sparse.state_dict())
        assert torch.equal(again(x), sparse(x))
        assert torch.equal(other(x), sparse(x))
        sparse.to(torch.float64)
        assert sparse(x.double()).dtype is torch.float64


def test_autocast_gives_its_dtype() -> None:
    x = torch.randn(3, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = layer()(x)
        expected = F.linear(x, layer().dense(), layer().bias)
    assert ours.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.05)


def test_blocks_without_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_matmul, "BLOCKS_SERVE", False)
    monkeypatch.setattr(torch, "sparse_bsr_tensor", None)  # which nothing could multiply
    sparse, x = layer(block=4), torch.randn(3, 8)
    torch.testing.assert_close(sparse(x), F.linear(x, sparse_weight(), sparse.bias))


def test_operator_passes_torchs_own_check() -> None:
    sparse = layer()
    x_t = torch.randn(8, 3, requires_grad=True)
    arguments = (sparse.crow_indices, sparse.col_indices, sparse.values, sparse.bias, x_t, 16)
    torch.library.opcheck(torch.ops.mvpfx.sparse_linear.default, arguments)


def test_export_with_a_free_batch() -> None:
    model = nn.Sequential(layer(), nn.ReLU()).eval()
    dims = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    exported = torch.export.export(model, (torch.randn(2, 3, 8),), dynamic_shapes=dims)
    with torch.no_grad():
        x = torch.randn(4, 5, 8)
        torch.testing.assert_close(exported.module()(x), model(x))
    torch.export.save(exported, io.BytesIO())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [1, 4])
def test_on_every_device(block: int, dtype: torch.dtype, device: str) -> None:
    """Blocks too: a layer in blocks for native kernels may be moved to where there are none."""
    weight, bias = sparse_weight(32, 16, block), torch.randn(32)
    sparse = SparseLinear.from_dense(weight, bias, block, "tiled").to(device, dtype)
    x = torch.randn(2, 3, 16).to(device, dtype)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), F.linear(x, sparse.dense(), sparse.bias))


def test_bad_shapes() -> None:
    message = (
        "a weight of 6 x 8 cannot be stored in 4 x 4 blocks. "
        "Use a block size that divides both, or 1."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SparseLinear.from_dense(torch.ones(6, 8), block=4)
    message = "the input has 7 features, and this layer takes 8."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        layer()(torch.ones(2, 7))
    message = "crow_indices has 3 entries, and 4 output features in blocks of 1 need 5."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SparseLinear(2, 4, torch.zeros(3), torch.zeros(0), torch.zeros(0))
    message = (
        "values has 2 entries and col_indices 1; they need one column index a value (or a block)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SparseLinear(2, 1, torch.zeros(2), torch.zeros(1), torch.zeros(2))


@pytest.mark.parametrize(
    ("block", "layout", "storage", "indices"),
    [
        (1, "token_major", "csr", 64 + 33),
        (4, "token_major", "bsr", 4 + 9),
        (1, "tiled", "native", 64 + 33),
        (4, "tiled", "native", 4 + 9),
    ],
)
def test_bytes(block: int, layout: Layout, storage: str, indices: int) -> None:
    weight = torch.zeros(32, 16)
    weight[:16, :4] = 1
    sparse = SparseLinear.from_dense(weight, None, block, layout)
    assert sparse.storage == storage
    assert sparse.storage_bytes == 4 * (64 + indices)


def test_find_block() -> None:
    blocky = sparse_weight(64, 32, 16)
    assert find_block(blocky) == 16
    assert find_block(torch.eye(32)) is None
    assert find_block(torch.eye(32), waste=float("inf")) == 4
    assert find_block(torch.ones(6, 6), waste=float("inf")) is None
    assert stored_fraction(torch.eye(8), 4) == 0.5
