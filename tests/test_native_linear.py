"""Dense weights on native kernels: what is chosen, computed, saved and said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvpfx
from mvpfx.blueprint import describe, fill
from mvpfx.comparison import output_difference
from mvpfx.facts import NATIVE_DENSE
from mvpfx.kernels.library import LIBRARY, MISSING
from mvpfx.native_linear import NativeLinear
from mvpfx.state import find_state
from mvpfx.storage import SparseLinear
from tests.citizens import citizen, native_dense
from tests.test_fuse_tiles import call, regions

pytestmark = pytest.mark.skipif(LIBRARY is None, reason=MISSING)


class Ffn(nn.Module):
    """A sparse layer, then one whose first units are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(48, 64), nn.Linear(64, 48), nn.Linear(48, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.down(torch.relu(self.up(x))))


def ffn(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    inner, x = Ffn().to(dtype), torch.randn(2, 9, 48, dtype=dtype)
    with torch.no_grad():
        inner.up.weight[:24] = 0
        inner.out.weight *= torch.rand(40, 48) < 0.2
    return nn.Sequential(inner, nn.Tanh()).eval(), (x,)


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(m).__name__ for name, m in model.named_modules() if hasattr(m, "bias")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_and_sparse_layers_share_a_chain(dtype: torch.dtype) -> None:
    model, batch = ffn(dtype)
    small = native_dense(model, batch)
    dense = dict.fromkeys(("0.up", "0.down"), "NativeLinear")
    assert kinds(small) == {**dense, "0.out": "SparseLinear"}
    text = mvpfx.explain(small)
    assert f"+ store as {NATIVE_DENSE}: alike for all sites, which is fastest end to end" in text
    bytes_left = 40 * 48 * torch.finfo(dtype).bits // 8
    assert f"+ lower to {NATIVE_DENSE}: 1920 values, {bytes_left} bytes, tiled output" in text
    assert text.count("Native kernels: ") == 1
    wanted = model.float()(batch[0].float())
    difference, _ = output_difference(wanted, call(small, batch))
    assert difference < (1e-6 if dtype is torch.float32 else 1e-2)
    (region,) = [region for region in regions(small).values() if region.calls]
    (chain,) = [n.target for n in region.captured()[0].graph.nodes if n.op == "call_function"][:1]
    assert repr(chain) == "Chain of 5 steps"


def test_the_table_counts_its_bytes_and_shape() -> None:
    model, batch = ffn()
    state = find_state(native_dense(model, batch))
    assert state is not None and state.report is not None
    rows = {row.site: row for row in state.report.rows}
    assert rows["0.up.weight"].storage == NATIVE_DENSE
    assert rows["0.up.weight"].shape_after == (40, 48)
    assert rows["0.up.weight"].bytes_after == 40 * 48 * 4
    assert rows["0.up.weight"].kept == 40 * 48


def test_a_changed_weight_counts_at_once() -> None:
    model, batch = ffn()
    small: Any = native_dense(model, batch)
    before = call(small, batch)
    with torch.no_grad():
        small[0].up.weight.mul_(2)
        small[0].up.bias.zero_()
    after = call(small, batch)
    wanted = small(*batch)  # with gradients, on torch's own kernels
    assert not torch.allclose(before, after)
    assert torch.allclose(after, wanted.detach(), atol=1e-6)


def test_gradients_reach_its_weight() -> None:
    model, batch = ffn()
    small: Any = native_dense(model, batch).requires_grad_()
    small(*batch).sum().backward()
    assert small[0].up.weight.grad.shape == (40, 48)


def test_a_model_without_zeros_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    small = native_dense(model, (torch.randn(4, 48),))
    assert not any(isinstance(module, (NativeLinear, SparseLinear)) for module in small.modules())


def test_conv1d_is_saved_and_loaded(tmp_path: Any) -> None:
    model, small, batch = citizen("gpt2", NATIVE_DENSE)
    found = [module for module in small.modules() if isinstance(module, NativeLinear)]
    assert len(found) >= 8
    mvpfx.save(small, tmp_path)
    loaded = mvpfx.load(tmp_path)
    assert torch.equal(call(loaded, batch).logits, call(small, batch).logits)
    assert any(region.calls for region in regions(loaded).values())
    assert output_difference(call(model, batch).logits, call(loaded, batch).logits)[0] < 1e-5


def test_a_blueprint_without_its_sizes_is_refused() -> None:
    model, batch = ffn()
    blueprint, tensors = describe(native_dense(model, batch))
    del blueprint.sizes["0.up"]["in_features"]
    with pytest.raises(ValueError, match=r"^the layer 0.up lacks 'in_features'$"):
        fill(ffn()[0], blueprint, tensors, {})


def test_a_blueprint_of_another_shape_is_refused() -> None:
    model, batch = ffn()
    blueprint, tensors = describe(native_dense(model, batch))
    blueprint.sizes["0.up"]["in_features"] = 47
    with pytest.raises(ValueError, match=r"^weight of 0.up is \[40, 48\]"):
        fill(ffn()[0], blueprint, tensors, {})
