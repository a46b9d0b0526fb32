"""Models whose blocks run as chains on native kernels compute what they computed before."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvpfx
from mvpfx.comparison import output_difference
from mvpfx.kernels import prepared_chain
from mvpfx.kernels.chain import Chain
from mvpfx.kernels.fused_region import FusedRegion
from mvpfx.kernels.library import LIBRARY, MISSING
from mvpfx.region import region_of
from mvpfx.storage import SparseLinear
from tests.models import ZOO, Batch, build

pytestmark = pytest.mark.skipif(LIBRARY is None, reason=MISSING)


def sparse(name: str, density: float = 0.4) -> tuple[nn.Module, Batch]:
    model, batch = build(name)
    return zeroed(model, density), batch


def zeroed(model: nn.Module, density: float = 0.4) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= torch.rand(parameter.shape, generator=generator) < density
    return model.eval()


def native(name: str) -> tuple[nn.Module, nn.Module, Batch]:
    model, batch = sparse(name)
    return model, mvpfx.convert(model, example_inputs=batch, lowering="native"), batch


def call(model: nn.Module, batch: Any) -> Any:
    with torch.no_grad():
        return model(**batch) if isinstance(batch, dict) else model(*batch)


def regions(model: nn.Module) -> dict[str, FusedRegion]:
    found = {name: region_of(module) for name, module in model.named_modules()}
    return {name: region for name, region in found.items() if isinstance(region, FusedRegion)}


def layers(model: nn.Module) -> list[SparseLinear]:
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


@pytest.mark.parametrize("name", ZOO)
def test_every_model_of_the_zoo_computes_the_same(name: str) -> None:
    model, small, batch = native(name)
    difference, largest = output_difference(call(model, batch), call(small, batch))
    assert difference <= 1e-5 * max(1.0, largest)
    if layers(small):
        assert any(region.calls for region in regions(small).values())
    assert not any(region.declined for region in regions(small).values() if not region.once)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_other_sizes_and_masks(name: str) -> None:
    model, small, _ = native(name)
    for batch, length in ((1, 1), (1, 64), (3, 17), (5, 40)):
        ids = torch.randint(3, 99, (batch, length))
        mask = torch.ones_like(ids)
        for cut in (0, length // 3):
            mask[0, length - cut :] = 0
            inputs = {"input_ids": ids, "attention_mask": mask}
            difference, _ = output_difference(call(model, inputs), call(small, inputs))
            assert difference <= 1e-5


def test_bfloat16() -> None:
    model, batch = sparse("bert")
    model = model.bfloat16()
    small = mvpfx.convert(model, example_inputs=batch, lowering="native")
    exact = call(copy.deepcopy(model).float(), batch).logits
    found = call(small, batch).logits
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() <= 2e-2 * exact.abs().max()
    assert any(region.calls for region in regions(small).values())


def chains_of_a_call(small: nn.Module, batch: Any) -> tuple[str, list[Chain]]:
    """The one region that a call runs as a graph, and the chains of that."""
    before = {name: region.calls for name, region in regions(small).items()}
    call(small, batch)
    (grown,) = [name for name, region in regions(small).items() if region.calls > before[name]]
    (variant,) = regions(small)[grown].captured()
    targets: list[Any] = [node.target for node in variant.graph.nodes]
    return grown, [target for target in targets if isinstance(target, Chain)]


def test_a_stack_of_blocks_is_one_chain() -> None:
    _, small, batch = native("bert")
    name, chains = chains_of_a_call(small, batch)
    assert name == ""
    kinds = [step.kind for chain in chains for step in chain.steps]
    assert kinds.count("attend") == 2
    # Query, key and value are one product, and what follows a product is part of it.
    assert kinds.count("multiply") == 2 * 4 + 1
    assert "combine" not in kinds


def test_a_decoder_is_one_chain_too() -> None:
    """With the norms and rotary embeddings that it writes out; but for its first norm."""
    model, small, batch = native("llama")
    name, (chain,) = chains_of_a_call(small, batch)
    assert name == "model"
    kinds = [step.kind for step in chain.steps]
    config: Any = model.config
    blocks = config.num_hidden_layers
    assert [kinds.count(kind) for kind in ("attend", "rotate")] == [blocks, 2 * blocks]
    assert kinds.count("normalize") == 2 * blocks


class Changing(nn.Module):
    """Changes what its layer returns, and reads it again."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.how == "sum":
            z = y.add_(x)
        elif self.how == "view":
            z = y.view(-1, 4, 32)
            z[:, 0] *= 2
            z = z.view(y.shape)
        else:
            z = nn.functional.relu_(y)
        return self.second(y) + z


@pytest.mark.parametrize("how", ["sum", "relu", "view"])
def test_tensors_that_are_changed(how: str) -> None:
    """A part of them: nothing is in tiles. All of them: who reads them reads what changed them."""
    model = nn.Sequential(Changing(how)).eval()
    x = torch.randn(2, 4, 32)
    small = mvpfx.convert(model, example_inputs=(x,), lowering="native")
    assert len(layers(small)) == 2
    with torch.no_grad():
        assert (small(x) - model(x)).abs().max() <= 1e-5
    reasons = {reason for region in regions(small).values() for reason in region.declined}
    changed = "mul_ changes a tensor that is read elsewhere"
    assert reasons == ({changed} if how == "view" else set())


def test_gradients_run_the_modules() -> None:
    model, small, batch = native("bert")
    small.requires_grad_()
    calls = {name: region.calls for name, region in regions(small).items()}
    found, wanted = small(**batch).logits, model(**batch).logits
    assert (found - wanted).abs().max() <= 1e-5
    found.sum().backward()
    assert all(layer.values.grad is not None for layer in layers(small))
    assert {name: region.calls for name, region in regions(small).items()} == calls


def test_changed_weights_are_seen() -> None:
    _, small, batch = native("bert")
    before = call(small, batch).logits
    with torch.no_grad():
        for layer in layers(small):
            layer.values.mul_(1.5)
    plain = copy.deepcopy(small)
    for layer in layers(plain):
        layer.output_layout = "token_major"
    for module in plain.modules():
        module.__dict__.pop("_mvpfx_region", None)
    after = call(small, batch).logits
    assert (after - before).abs().max() > 1e-3
    assert (after - call(plain, batch).logits).abs().max() <= 1e-5
    layer = layers(small)[0]
    layer.values = nn.Parameter(torch.zeros_like(layer.values))
    assert not torch.equal(call(small, batch).logits, after)


def test_copies_and_pickles() -> None:
    _, small, batch = native("bert")
    wanted = call(small, batch).logits
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(call(other, batch).logits, wanted)


def test_a_loaded_model_is_fused_again(tmp_path: Any) -> None:
    _, small, batch = native("bert")
    mvpfx.save(small, tmp_path / "model")
    loaded = mvpfx.load(tmp_path / "model")
    assert torch.equal(call(loaded, batch).logits, call(small, batch).logits)
    assert any(region.calls for region in regions(loaded).values())
    assert all(layer.storage == "native" for layer in layers(loaded))


def test_threads_of_python_share_a_model() -> None:
    import threading

    _, small, batch = native("bert")
    wanted = call(small, batch).logits
    found: list[bool] = []

    def work() -> None:
        found.extend(torch.equal(call(small, batch).logits, wanted) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 60


def test_one_forward_is_one_call_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    _, small, batch = native("bert")
    counted = 0

    class Counting:
        def mvpfx_run(self, *arguments: Any) -> int:
            nonlocal counted
            counted += 1
            assert LIBRARY is not None
            return LIBRARY.mvpfx_run(*arguments)

    call(small, batch)
    monkeypatch.setattr(prepared_chain, "LIBRARY", Counting())
    call(small, batch)
    assert counted == 2  # the encoder, and the pooler on the first token


def test_explain_tells_what_ran_as_chains() -> None:
    _, small, batch = native("bert")
    assert "ran as" not in mvpfx.explain(small)
    call(small, batch)
    small.requires_grad_()
    small(**batch)  # with gradients: it runs as it is, and that is no refusal
    assert mvpfx.explain(small).startswith("(model)\n  + capture: 1 call ran as 1 graph\n")
    _, cached, batch = native("llama_cached")
    call(cached, batch)
    assert "model.layers.0\n  + capture: 1 call ran as 1 graph\n" in mvpfx.explain(cached)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = sparse("bert")
    monkeypatch.setattr("mvpfx.kernels.library.LIBRARY", None)
    monkeypatch.setattr("mvpfx.kernels.operators.LIBRARY", None)
    monkeypatch.setattr("mvpfx.conversion.LIBRARY", None)
    small = mvpfx.convert(model, example_inputs=batch, lowering="csr")
    text = mvpfx.explain(small)
    assert text.count(f"Sparse weights are multiplied by torch.sparse: {MISSING}.") == 1
    message = f"sparse weights are multiplied by torch.sparse or stay dense: {MISSING}. Install one"
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}") as warned:
        asked = mvpfx.convert(model, example_inputs=batch, lowering="native")
    assert len(warned) == 1 and warned[0].filename == __file__
    assert f"- store as native: {MISSING}; stays dense" in mvpfx.explain(asked)
    native_layer = SparseLinear.from_dense(torch.eye(8), output_layout="tiled")
    x = torch.randn(3, 8)
    with torch.no_grad():
        assert torch.equal(native_layer(x), x)
