"""Native kernels are told how long memory is, and refuse what is short."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvpfx
from mvpfx.kernels import prepared_chain
from mvpfx.kernels.library import LIBRARY, MISSING, CStep
from mvpfx.kernels.operators import tiled_linear
from mvpfx.kernels.weight import HeldMatrix, PackedWeight
from mvpfx.storage import SparseLinear
from tests.graphs import outputs
from tests.test_fuse_tiles import native

native_kernels = pytest.mark.skipif(LIBRARY is None, reason=MISSING)
X = torch.linspace(-2, 2, 320).view(2, 10, 16)


def block(lowering: str) -> nn.Module:
    """A sparse layer, a norm and another sparse layer, converted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 16)).eval()
    for name in ("0.weight", "3.weight"):
        weight = model.get_parameter(name)
        with torch.no_grad():
            weight *= torch.rand_like(weight) < 0.3
    return mvpfx.convert(model, example_inputs=(X,), lowering=lowering)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def matrix(**changes: Any) -> Any:
    """Two rows of three columns with three values, but for what is changed."""
    held: dict[str, Any] = {
        "crow_indices": int32(0, 2, 3),
        "col_indices": int32(0, 2, 1),
        "values": torch.ones(3),
        "bias": torch.zeros(2),
        "in_features": 3,
        "out_features": 2,
    }
    return HeldMatrix(**{**held, **changes})


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "few row starts": ({"crow_indices": int32(0, 3)}, "has 2 row starts"),
    "many row starts": ({"crow_indices": int32(0, 1, 2, 3)}, "has 4 row starts"),
    "few values": ({"values": torch.ones(2)}, r"values of \[2\]"),
    "few indices": ({"col_indices": int32(0, 2)}, "2 column indices"),
    "a short bias": ({"bias": torch.zeros(1)}, r"a bias of \[1\]"),
    "a bias in two dimensions": ({"bias": torch.zeros(1, 2)}, r"a bias of \[1, 2\]"),
    "a start before the first": ({"crow_indices": int32(-1, 2, 3)}, "first row start is -1"),
    "a start in between": ({"crow_indices": int32(0, 9, 3)}, "row start is 3, and 9 is needed"),
    "an end too far": ({"crow_indices": int32(0, 2, 4)}, "last row start is 4, and 3 is needed"),
    "a column too far": ({"col_indices": int32(0, 3, 1)}, "column index is 3, and 2 is needed"),
    "a column before": ({"col_indices": int32(0, -1, 1)}, "column index is -1, and 2 is needed"),
    "blocks that do not divide": (
        {"values": torch.ones(1, 2, 2), "col_indices": int32(0), "crow_indices": int32(0, 1)},
        "block size is 2",
    ),
}


@native_kernels
@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_matrix_is_not_packed(name: str) -> None:
    changes, message = BROKEN[name]
    PackedWeight([matrix()])
    with pytest.raises(ValueError, match=message):
        PackedWeight([matrix(**changes)])


@native_kernels
def test_values_at_the_same_place_add_up() -> None:
    held = matrix(col_indices=int32(2, 2, 1), values=torch.tensor([1.0, 2.0, 4.0]))
    x = torch.eye(3)
    found = tiled_linear(
        held.crow_indices, held.col_indices, held.values, held.bias, x, held.out_features
    )
    assert found.t().tolist() == [[0, 0, 3], [0, 4, 0]]


@native_kernels
def test_the_operator_looks_at_its_input() -> None:
    held = matrix()
    tensors = held.crow_indices, held.col_indices, held.values, held.bias
    tiled_linear(*tensors, torch.ones(4, 3), 2)
    for width in (2, 4):
        with pytest.raises(ValueError, match=f"3 features in torch.float32 met {width}"):
            tiled_linear(*tensors, torch.ones(4, width), 2)


FIELDS = ("weight_count", "bias_count", "tensor_count", "features")
SLICES: tuple[Callable[[CStep], Any], ...] = (
    lambda step: step.input,
    lambda step: step.output,
    lambda step: step.epilogue.factor,
    lambda step: step.epilogue.addend,
)


def shortened(step: CStep) -> Iterator[str]:
    """One length of the step after the other, shorter by one while it is yielded."""
    for name in FIELDS:
        number = getattr(step, name)
        if number and not (name == "bias_count" and not (step.bias or step.epilogue.bias)):
            setattr(step, name, number - 1)
            yield name
            setattr(step, name, number)
    for number, read in enumerate(SLICES):
        piece = read(step)
        if piece.stride > 0:
            piece.size, size = 0, piece.size
            yield f"slice {number}"
            piece.size = size


@native_kernels
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_each_length_of_a_chain_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, small, batch = native(name)
    tried: list[str] = []

    class Shortening:
        def mvpfx_run(self, geometry: Any, steps: Any, *rest: Any) -> Any:
            assert LIBRARY is not None
            for number, step in enumerate(steps):
                for what in shortened(step):
                    wrong = LIBRARY.mvpfx_run(geometry, steps, *rest)
                    leaves = step.kind in (0, 1) and what == "features"  # fewer are in range
                    combined = step.kind == 4 and what == "features"
                    assert leaves or combined or wrong is not None, f"step {number} {what}"
                    assert wrong is None or f"step {number} (" in wrong.decode()
                    tried.append(what)
            scratch = LIBRARY.mvpfx_run(geometry, steps, rest[0], 0, rest[2])
            assert scratch is not None
            return LIBRARY.mvpfx_run(geometry, steps, *rest)

    expected = outputs(small, batch)
    monkeypatch.setattr(prepared_chain, "LIBRARY", Shortening())
    assert torch.equal(outputs(small, batch), expected)
    assert len(tried) >= 40 and {"weight_count", "tensor_count"} <= set(tried)


@native_kernels
def test_structs_are_as_long_as_the_library_has_them() -> None:
    """A field that only one side has would shift all that follow: the last ones are read right."""
    assert ctypes.sizeof(CStep) % 8 == 0
    assert CStep.tensor_count.offset == ctypes.sizeof(CStep) - 8


def parameter(module: nn.Module, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value, requires_grad=False))


def data(module: nn.Module, name: str, value: Tensor) -> None:
    module.get_parameter(name).data = value


def view(module: nn.Module, name: str, value: Tensor) -> None:
    held = module.get_parameter(name)
    held.data = held.data[: len(value)]


def resized(module: nn.Module, name: str, value: Tensor) -> None:
    with torch.no_grad():
        module.get_parameter(name).requires_grad_(False).resize_(value.shape)


def given_back(module: nn.Module, name: str, value: Tensor) -> None:
    module.get_parameter(name).untyped_storage().resize_(4 * value.numel())


def assigned(module: nn.Module, name: str, value: Tensor) -> None:
    module.load_state_dict({**module.state_dict(), name: value}, assign=True)


WAYS = (parameter, data, view, resized, given_back, assigned)
PLACES = (("0", "bias"), ("0", "values"), ("2", "weight"), ("2", "bias"), ("3", "bias"))


@pytest.mark.parametrize(("where", "name"), PLACES)
@pytest.mark.parametrize(
    ("lowering", "way"),
    [
        *(pytest.param("native", way, marks=native_kernels) for way in WAYS),
        *(("csr", way) for way in WAYS if way is not given_back),  # at which torch does not look
    ],
)
def test_what_replaces_a_parameter_later(
    lowering: str, where: str, name: str, way: Callable[..., None]
) -> None:
    small = block(lowering)
    module = small.get_submodule(where)
    with torch.no_grad():
        small(X)  # whatever is prepared is prepared
        value = module.get_parameter(name).detach()[:1].clone()
        with pytest.raises((ValueError, RuntimeError)):  # noqa: PT012  here, or in the call
            way(module, name, value)
            small(X)


def test_indices_of_a_state_dict_are_looked_at() -> None:
    layer = SparseLinear.from_dense(torch.eye(4))
    state = layer.state_dict()
    for name, value, message in (
        ("col_indices", int32(0, 1, 2, 9), "a column index is out of its 4 columns"),
        ("col_indices", int32(0, 1, 2, -1), "a column index is out of its 4 columns"),
        ("crow_indices", int32(0, 3, 2, 3, 4), "the row starts do not divide"),
        ("crow_indices", int32(0, 1, 2, 3, 9), "the row starts do not divide"),
    ):
        for assign in (False, True):
            with pytest.raises(RuntimeError, match=message):
                layer.load_state_dict({**state, name: value}, assign=assign)
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict({name: value}, strict=False)
    twice = {**state, "crow_indices": int32(0, 2, 2, 3, 4), "col_indices": int32(1, 1, 2, 3)}
    with pytest.raises(RuntimeError, match="stands twice in its row"):
        layer.load_state_dict(twice)
    assert torch.equal(layer.dense(), torch.eye(4))
    layer.load_state_dict(state)
