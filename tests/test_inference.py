"""Converted models are called in any gradient mode, and compute what their weights say."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvpfx
from mvpfx.cost import Quartiles
from mvpfx.kernels import weight as weights
from mvpfx.kernels.changes import fingerprint
from mvpfx.kernels.library import LIBRARY, MISSING
from mvpfx.kernels.weight import PackedWeight
from mvpfx.storage import SparseLinear
from tests.test_fuse_tiles import call, native, regions

kernels = pytest.mark.skipif(LIBRARY is None, reason=MISSING)
X = torch.linspace(-1, 1, 5 * 64).view(5, 64)


class Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(torch.relu(self.up(x))))


def ffn(dtype: torch.dtype = torch.float32, lowering: str = "native") -> Any:
    """A converted model of two sparse layers with a norm between them."""
    torch.manual_seed(0)
    model = nn.Sequential(Ffn(), nn.Identity()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(torch.rand_like(parameter) < 0.2)
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return mvpfx.convert(model, example_inputs=(X,), lowering=lowering).to(dtype)


def wanted(small: Any, x: Tensor) -> Tensor:
    """What the parameters say, in dense operations."""
    inner = small[0]
    up, down = ((layer.dense().detach(), layer.bias.detach()) for layer in (inner.up, inner.down))
    hidden = torch.relu(nn.functional.linear(x, *up))
    norm = inner.norm
    hidden = nn.functional.layer_norm(hidden, (64,), norm.weight, norm.bias, norm.eps)
    return nn.functional.linear(hidden, *down).detach()


@kernels
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("convert_in", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_each_mode_runs_the_same_chains(
    mode: Any, convert_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with convert_in():
        small = ffn()
    assert not any(p.requires_grad or p.is_inference() for p in small.parameters())
    packed: list[object] = []

    def counted(layers: Any) -> PackedWeight:
        packed.append(layers)
        return PackedWeight(layers)

    monkeypatch.setattr(weights, "PackedWeight", counted)
    with mode():
        outs = [small(X) for _ in range(3)]
    assert not any(out.requires_grad for out in outs)
    assert all((out - wanted(small, X)).abs().max() <= 1e-5 for out in outs)
    assert len(packed) <= 2, "once a layer, not at each call"
    assert sum(region.calls for region in regions(small).values()) == 3


@kernels
def test_a_layer_by_itself_is_native_without_no_grad() -> None:
    layer: Any = ffn()[0].up
    x = torch.randn(3, 64)
    with torch.profiler.profile() as profile:
        layer(x)
    names = {event.key for event in profile.key_averages()}
    assert not any("mvpfx::sparse_linear" in name or "aten::mm" in name for name in names)


@pytest.mark.parametrize("what", ["values", "bias", "norm", "input", "new module"])
@kernels
def test_a_gradient_that_is_asked_for_is_there(what: str) -> None:
    small, x = ffn(), X.clone()
    small(x)
    inner = small[0]
    if what == "values":
        asked = inner.down.values.requires_grad_()
    elif what == "bias":
        asked = inner.up.bias.requires_grad_()
    elif what == "norm":
        asked = inner.norm.weight.requires_grad_()
    elif what == "input":
        asked = x.requires_grad_()
    else:
        inner.norm = nn.LayerNorm(64)
        asked = inner.norm.weight
    small(x).square().sum().backward()
    assert asked.grad is not None and asked.grad.any()


@kernels
def test_a_forward_that_asks_for_gradients_itself_is_left_alone() -> None:
    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = Ffn()

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(self.energy(x).sum(), x)[0]

    torch.manual_seed(0)
    model = nn.Sequential(Force(), nn.Identity()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) < 0.4)
    small = mvpfx.convert(model, lowering="native")
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            assert (small(X) - model(X)).abs().max() <= 1e-5


def _data(p: nn.Parameter) -> None:
    p.data.copy_(0.5 * p.data)


def _numpy(p: nn.Parameter) -> None:
    array = p.detach().numpy()
    array *= 0.5


def _twice(p: nn.Parameter) -> None:
    p.data = 0.5 * p.data
    p.data = 1.5 * p.data


def _swapped(p: nn.Parameter) -> None:
    p.data.copy_(p.data.flip(0))


UNSEEN: dict[str, Callable[[nn.Parameter], None]] = {
    "data": _data,
    "numpy": _numpy,
    "data twice": _twice,
    "order": _swapped,
}


@kernels
@pytest.mark.parametrize("which", ["values", "bias", "norm"])
@pytest.mark.parametrize("how", UNSEEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_past_all_counters_are_seen_after_eval(
    how: str, which: str, dtype: torch.dtype
) -> None:
    small, x = ffn(dtype), X.to(dtype)
    call(small, (x,))
    inner = small[0]
    held = {"values": inner.up.values, "bias": inner.down.bias, "norm": inner.norm.weight}[which]
    if dtype is torch.bfloat16 and how == "numpy":
        how = "data"
    UNSEEN[how](held)
    small.eval()
    limit = 1e-5 if dtype is torch.float32 else 5e-2
    with torch.no_grad():
        assert (small(x) - wanted(small, x)).abs().max() <= limit


def _load(small: Any, other: dict[str, Tensor]) -> None:
    small.load_state_dict({name: value * 1 for name, value in other.items()})


def _assign(small: Any, other: dict[str, Tensor]) -> None:
    small.load_state_dict({name: value * 1 for name, value in other.items()}, assign=True)


def _round(small: Any, _: dict[str, Tensor]) -> None:
    small.to(torch.bfloat16).to(torch.float32)


def _halve(small: Any, _: dict[str, Tensor]) -> None:
    small.half().float()


def _share(small: Any, _: dict[str, Tensor]) -> None:
    small.share_memory()


def _in_place(small: Any, _: dict[str, Tensor]) -> None:
    for parameter in small.parameters():
        parameter.mul_(1.25)


CHANGES = (_load, _assign, _round, _halve, _share, _in_place)


@kernels
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("lowering", ["csr", "native"])
def test_whatever_else_changes_weights_is_seen_at_once(lowering: str, mode: Any) -> None:
    small = ffn(lowering=lowering)
    with mode():
        for change in CHANGES:
            small(X)
            other = {
                name: value * 0.5 if value.is_floating_point() else value
                for name, value in small.state_dict().items()
            }
            change(small, other)
            for _ in range(2):
                assert (small(X) - wanted(small, X)).abs().max() <= 1e-5
        for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
            assert torch.equal(twin(X), small(X))


@kernels
def test_weights_that_stayed_are_not_packed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    small = ffn()
    call(small, (X,))
    monkeypatch.setattr(weights, "PackedWeight", None)
    for _ in range(2):
        call(small.train().eval(), (X,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [0, 1, 3, 1001, 300_001])
def test_fingerprints_tell_values_apart(size: int, dtype: torch.dtype) -> None:
    values = torch.randn(size).to(dtype)
    first = fingerprint(values)
    assert fingerprint(values.clone()) == first
    assert fingerprint(torch.cat([values[:1], values])[1:]) == first  # wherever it begins
    if size:
        for place in {0, size // 2, size - 1}:
            changed = values.clone()
            changed[place] = changed[place] * 2 + 1
            assert fingerprint(changed) != first
    if size > 1:
        assert fingerprint(values.flip(0)) != first


@kernels
def test_training_on_is_asked_for() -> None:
    _, small, batch = native("bert")
    with pytest.raises(RuntimeError, match="does not require grad"):
        small(**batch).logits.sum().backward()
    small.requires_grad_()(**batch).logits.sum().backward()
    assert all(
        layer.values.grad is not None
        for layer in small.modules()
        if isinstance(layer, SparseLinear)
    )


@pytest.mark.parametrize(
    ("csr", "taken"), [((1.0, 0.9, 1.1), True), ((2.8, 2.5, 2.9), False), ((2.0, 1.5, 3.4), False)]
)
def test_a_gain_that_is_noise_keeps_weights_dense(
    csr: tuple[float, float, float], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: object) -> dict[str, Quartiles]:
        return {"dense": Quartiles(3.0, 2.9, 3.2), "csr": Quartiles(*csr)}

    def missing(*_: object) -> str:
        return "not here"

    def compare(functions: dict[str, Any], *_: object, **__: object) -> dict[str, Quartiles]:
        kinds = {"dense": Quartiles(3.0, 2.9, 3.2), "all dense": Quartiles(3.0, 2.9, 3.2)}
        return {name: kinds.get(name, Quartiles(*csr)) for name in functions}

    monkeypatch.setattr("mvpfx.passes.choose_storage.measure_storages", measure)
    monkeypatch.setattr("mvpfx.passes.choose_storage.no_kernels", missing)
    monkeypatch.setattr("mvpfx.comparison.compare", compare)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    with torch.no_grad():
        for index in (0, 2):
            model[index].weight.mul_(torch.rand(64, 64) < 0.1)  # pyright: ignore[reportCallIssue, reportArgumentType]
    small = mvpfx.convert(model, example_inputs=(X,))
    assert any(isinstance(module, SparseLinear) for module in small.modules()) == taken


def test_a_smaller_model_that_is_slower_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(functions: dict[str, Any], *_: object, **__: object) -> dict[str, Quartiles]:
        fast, slow = Quartiles(1.0, 0.9, 1.1), Quartiles(2.0, 1.9, 2.1)
        return {name: fast if name == "dense" else slow for name in functions}

    monkeypatch.setattr("mvpfx.comparison.compare", compare)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    with torch.no_grad():
        model[0].weight[:7] = 0  # pyright: ignore[reportIndexIssue, reportArgumentType]
    small: Any = mvpfx.convert(model, example_inputs=(X,))
    assert small[0].weight.shape == (64, 64)
    text = "- shrink: the smaller model is slower: 1.000 ms -> 2.000 ms"
    assert text in mvpfx.explain(small)
    smaller: Any = mvpfx.convert(model, example_inputs=(X,), lowering="dense")
    assert smaller[0].weight.shape == (57, 64)
