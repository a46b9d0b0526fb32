"""Weights full of zeros in few bytes, and exactly so."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mvpfx
from mvpfx.packing import pack, pack_indices, unpack, unpack_indices
from mvpfx.storage import INDEX_DTYPE, SparseLinear
from mvpfx.store import TENSORS
from tests.test_store import FFN, converted


@pytest.mark.parametrize("density", [0.0, 0.001, 0.03, 0.5, 1.0])
def test_packing_is_exact(density: float) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(37, 211) * (torch.rand(37, 211) < density)
    values, gaps = pack(tensor)
    assert torch.equal(unpack(values, gaps, (37, 211)), tensor)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("density", [0.0, 0.0005, 0.03, 0.5, 1.0])
def test_packed_indices_are_exact(density: float, block: int) -> None:
    torch.manual_seed(0)
    layer = SparseLinear.from_dense(
        torch.ones(64, 4096) * (torch.rand(64, 4096) < density), None, block
    )
    crow, col = layer.crow_indices, layer.col_indices
    found = pack_indices(crow, col)
    if found is None:
        assert density == 0.0005 and block == 1  # two indices a row are fewer bytes than gaps
        return
    assert found[0].nbytes < crow.nbytes + col.nbytes
    again = unpack_indices(found[0], len(crow) - 1, found[1])
    assert torch.equal(again[0], crow) and torch.equal(again[1], col)
    assert again[0].dtype is again[1].dtype is INDEX_DTYPE


@pytest.mark.parametrize("gap", [254, 255, 256, 509, 510, 511, 765])
def test_gaps_of_any_width(gap: int) -> None:
    crow, col = torch.tensor([0, 40, 80], dtype=INDEX_DTYPE), torch.arange(40, dtype=INDEX_DTYPE)
    col = torch.cat([gap * col, gap * col + gap - 1])
    found = pack_indices(crow, col)
    assert found is not None
    again = unpack_indices(found[0], 2, found[1])
    assert torch.equal(again[0], crow) and torch.equal(again[1], col)


def test_a_weight_takes_a_byte_a_nonzero_whatever_its_storage(tmp_path: Path) -> None:
    sizes: dict[str, int] = {}
    for lowering in ("dense", "csr", "native"):
        small, _ = converted("bert", lowering)
        folder = mvpfx.save(small, tmp_path / lowering)
        tensors = load_file(folder / TENSORS)
        held = [t for n, t in tensors.items() if n.startswith(FFN) and not n.endswith("bias")]
        sizes[lowering] = sum(t.nbytes for t in held)
    values = load_file(tmp_path / "csr" / TENSORS)[f"{FFN}.values.packed"].numel()
    assert sizes["csr"] == 5 * values
    assert sizes["native"] <= sizes["csr"] <= sizes["dense"]
