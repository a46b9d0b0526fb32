"""The net under optimisations: what fails inside is told, and the call gives the same result."""

from __future__ import annotations

import copy
import functools
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvpfx
from mvpfx import net, writer
from mvpfx.comparison import output_difference
from mvpfx.interception import is_capturing
from mvpfx.kernels.library import LIBRARY, MISSING
from mvpfx.net import SWITCH, RefusedError
from mvpfx.storage import SparseLinear
from tests.models import Batch, build
from tests.test_fuse_tiles import call, regions, zeroed
from tests.test_fuse_tiles import native as convert_natively

kernels = pytest.mark.skipif(LIBRARY is None, reason=MISSING)


made = functools.cache(convert_natively)


def native(name: str) -> tuple[nn.Module, nn.Module, Batch]:
    """A model, what it was converted to, which has captured nothing yet, and a batch."""
    model, small, batch = made(name)
    return model, copy.deepcopy(small), batch


@pytest.fixture
def with_net(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The net as users have it; what was said before is said again."""
    monkeypatch.delenv(SWITCH)
    monkeypatch.setattr(net, "_said", set())
    yield
    assert not is_capturing()


class Once:
    """Stands in for a function and fails: at one call of it, or at all."""

    def __init__(self, original: Any, at: int | None) -> None:
        self.original, self.at, self.calls = original, at, 0
        # As if it was raised in the package: what the user's own code raises is no fault.
        code = compile("def fail(): raise IndexError('injected')", writer.__file__, "exec")
        self.names: dict[str, Any] = {}
        exec(code, self.names)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.at is None or self.calls == self.at:
            self.names["fail"]()
        return self.original(*args, **kwargs)


def inject(monkeypatch: pytest.MonkeyPatch, owner: str, name: str, at: int | None = None) -> Once:
    """Let a function of this package fail."""
    module_name, _, kind = owner.partition(":")
    module: Any = __import__(module_name, fromlist=["_"])
    holder = getattr(module, kind) if kind else module
    original = getattr(holder, name)
    broken = Once(original, at)

    def method(*args: Any, **kwargs: Any) -> Any:  # which is bound
        return broken(*args, **kwargs)

    monkeypatch.setattr(holder, name, method if kind else broken)
    return broken


STAGES = {
    "flattening": ("mvpfx.region", "flatten"),
    "signature": ("mvpfx.region", "signature"),
    "writing the graph": ("mvpfx.writer:GraphWriter", "call"),
    "recognition": ("mvpfx.kernels.tiling", "recognise"),
    "tiling": ("mvpfx.kernels.tiling:Tiling", "drafts"),
    "folding": ("mvpfx.passes.fuse_tiles", "fold"),
    "placing": ("mvpfx.passes.fuse_tiles", "offsets_of"),
    "building": ("mvpfx.passes.fuse_tiles:_ChainBuilder", "step"),
    "guards": ("mvpfx.variant", "size_check"),
    "generating": ("mvpfx.variant", "generate"),
    "packing": ("mvpfx.kernels.weight", "joined"),
    "preparing": ("mvpfx.kernels.prepared_chain:PreparedChain", "_fill"),
    "entering": ("mvpfx.kernels.prepared_chain:PreparedChain", "_enter"),
    "masks": ("mvpfx.kernels.prepared_chain:PreparedChain", "_mask"),
    "running": ("mvpfx.kernels.prepared_chain:PreparedChain", "run"),
}


@kernels
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["bert", pytest.param("llama_cached", marks=pytest.mark.slow)])
def test_a_fault_at_any_stage_changes_no_result(
    name: str,
    stage: str,
    with_net: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, small, batch = native(name)
    wanted = call(model, batch)
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "mvpfx"):
        broken = inject(patched, *STAGES[stage])
        for _ in range(2):
            assert output_difference(wanted, call(small, batch))[0] <= 1e-5
    if not broken.calls:
        assert stage == "masks"  # of a causal model there is none
        return
    said = [record.getMessage() for record in caplog.records if record.name == "mvpfx"]
    assert said and len(said) == len(set(said))
    assert all("failed: IndexError: injected. " in text for text in said)
    assert "failed: IndexError: injected" in mvpfx.explain(small)
    difference, _ = output_difference(wanted, call(small, batch))  # and nothing is broken
    assert difference <= 1e-5


@kernels
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("stage", ["entering", "running", "packing"])
def test_a_cache_is_updated_once_whichever_chain_fails(
    stage: str, at: int, with_net: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of a chain that went before, tiles handed on, and caches are as without a fault."""
    model, small, batch = native("llama_cached")
    ids = batch["input_ids"]
    inject(monkeypatch, *STAGES[stage], at=at)
    with torch.no_grad():
        caches: list[Any] = [None, None]
        for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:7]):
            outs = [
                one(input_ids=part, past_key_values=cache, use_cache=True)
                for one, cache in zip((model, small), caches, strict=True)
            ]
            caches = [out.past_key_values for out in outs]
            assert caches[0].get_seq_length() == caches[1].get_seq_length()
            assert (outs[0].logits - outs[1].logits).abs().max() <= 1e-5


@kernels
def test_tiles_that_were_not_handed_on_are_done_without(
    with_net: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two chains with a node between them that reads what the first one makes."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.first(x))
            z = self.second(torch.cumsum(self.second(y), 1))
            return self.third(y + z) + y

    torch.manual_seed(0)
    model, x = zeroed(nn.Sequential(Split(), nn.Identity())), torch.randn(2, 5, 32)
    small = mvpfx.convert(model, example_inputs=x, lowering="native")
    wanted = call(model, (x,))
    for at in (1, 2, 3):
        other = copy.deepcopy(small)
        with monkeypatch.context() as patched:
            broken = inject(patched, *STAGES["running"], at=at)
            assert (call(other, (x,)) - wanted).abs().max() <= 1e-5
            assert broken.calls >= 2
        assert (call(other, (x,)) - wanted).abs().max() <= 1e-5


@kernels
@pytest.mark.parametrize("stage", ["packing", "running"])
def test_a_layer_by_itself(stage: str, with_net: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = SparseLinear.from_dense(torch.eye(8) * 2, torch.ones(8), output_layout="tiled")
    x = torch.randn(2, 3, 8)
    inject(monkeypatch, *STAGES[stage])
    with torch.no_grad():
        assert torch.equal(layer(x), 2 * x + 1)
        held = (layer.crow_indices, layer.col_indices, layer.values, layer.bias)
        found = torch.ops.mvpfx.tiled_linear(*held, x.view(6, 8), 8)
        assert torch.equal(found, (2 * x + 1).view(6, 8))


@kernels
@pytest.mark.parametrize("stage", ["signature", "tiling", "generating", "packing", "running"])
def test_without_the_net_a_fault_is_raised(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, small, batch = native("bert")
    inject(monkeypatch, *STAGES[stage])
    with pytest.raises(IndexError, match=r"^injected$"):
        call(small, batch)


@kernels
def test_threads_in_which_calls_fail(with_net: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, small, batch = native("bert")
    wanted, gaps = call(model, batch).logits, list[float]()
    inject(monkeypatch, *STAGES["entering"], at=4)

    def work() -> None:
        for _ in range(4):
            gaps.append(float((call(small, batch).logits - wanted).abs().max()))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(gaps) == 12 and max(gaps) <= 1e-5


def prepared() -> tuple[nn.Module, nn.Module, Batch]:
    """A prepared model at half of its weights, and the same with `W *= mask`."""
    model, batch = build("bert")
    mvpfx.prepare(model, mvpfx.PruningConfig(density=0.5, schedule=mvpfx.ConstantSchedule()))
    plain = mvpfx.convert(model, lowering="dense")
    return model.eval(), plain, batch


MASKED_STAGES = {
    **{name: STAGES[name] for name in ("flattening", "signature", "guards", "generating")},
    "sites": ("mvpfx.api", "graph_sites"),
    "masking": ("mvpfx.passes.insert_masks", "_insert"),
}


@pytest.mark.parametrize("stage", MASKED_STAGES)
def test_masks_apply_whatever_fails(
    stage: str, with_net: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain, batch = prepared()
    wanted = call(plain, batch).logits
    with monkeypatch.context() as patched:
        broken = inject(patched, *MASKED_STAGES[stage])
        assert (call(model, batch).logits - wanted).abs().max() <= 1e-6
        assert broken.calls
        assert "failed: IndexError: injected" in mvpfx.explain(model)
        model(**batch).logits.sum().backward()  # with gradients of scores and weights
    grads = [p.grad for name, p in model.named_parameters() if "scores" in name]
    assert grads and all(grad is not None for grad in grads)
    assert (call(model, batch).logits - wanted).abs().max() <= 1e-6


def test_what_the_user_has_to_mend_passes(with_net: None) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.raw = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) @ self.raw

    model = mvpfx.prepare(Late(), mvpfx.PruningConfig(density=0.5))
    mvpfx.parameter_groups(model, lr=1e-3, score_lr=1e-2)
    with pytest.raises(RefusedError, match=r"^raw feeds a matmul, but had no scores"):
        model(torch.randn(2, 4))


@kernels
def test_a_weight_of_another_size_is_refused(with_net: None) -> None:
    _, small, batch = native("bert")
    call(small, batch)
    layer = next(module for module in small.modules() if isinstance(module, SparseLinear))
    layer.bias = nn.Parameter(torch.zeros(3), requires_grad=False)
    with pytest.raises(ValueError, match=r"bias of \[3\]"):
        call(small, batch)


@kernels
def test_the_users_own_errors_are_raised_as_they_are(with_net: None) -> None:
    model, small, batch = native("bert")
    wrong = {**batch, "input_ids": batch["input_ids"] + 10**6}
    for one in (model, small):
        with pytest.raises(IndexError, match="index out of range"):
            call(one, wrong)
    assert not any(region.faults for region in regions(small).values())
