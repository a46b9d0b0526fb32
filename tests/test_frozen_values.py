"""What a forward reads from Python and not from tensors: a later call sees what changed."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import itertools
import math
import types
from collections.abc import Callable
from typing import Any, ClassVar

import numpy
import pytest
import torch
from torch import Tensor, nn

import mvpfx
from tests.zoo.check import difference

ALPHA: Any = 1.0
BOX: dict[str, Any] = {"v": 1.0, "inner": {"list": [1.0]}}
LIST: list[Any] = [1.0]
ARRAY = numpy.ones(2)
TENSOR = torch.ones(())
QUEUE = collections.deque([1.0])
MODULE = types.ModuleType("settings")
MODULE.__dict__["alpha"] = 1.0


class Holder:
    shared: Any = 1.0

    def __init__(self) -> None:
        self.value: Any = 1.0

    def __call__(self) -> Any:
        return self.value

    def method(self) -> Any:
        return self.value


class Slots:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 1.0


@dataclasses.dataclass
class Data:
    value: float = 1.0


class Size(enum.IntEnum):
    ONE = 1
    THREE = 3


HOLDER = Holder()


def helper() -> Any:
    return ALPHA


def with_default(box: dict[str, Any] = BOX) -> Any:
    return box["v"]


def counter() -> tuple[Callable[[], Any], Callable[[Any], None]]:
    value: Any = 1.0

    def get() -> Any:
        return value

    def put(new: Any) -> None:
        nonlocal value
        value = new

    return get, put


GET, PUT = counter()


class Described:
    """A class that only an attribute of another class leads to."""

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return ALPHA


class Net(nn.Module):
    inherited: ClassVar[Any] = 1.0
    described = Described()

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(4, 4), how
        self.holder, self.data, self.array = Holder(), Data(), numpy.ones(1)
        self.tensors, self.history = [torch.ones(())], collections.deque([1.0], maxlen=4)
        self.nested, self.size = {"a": [{"b": 1.0}]}, Size.ONE
        self.partial = functools.partial(with_default, BOX)
        self.method = self.holder.method
        self.by_name = {"scale": torch.ones(1)}
        self.slots = Slots()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * READ[self.how](self)


class Child(Net):
    pass


READ: dict[str, Callable[[Net], Any]] = {
    "attribute object": lambda net: net.holder.value,
    "callable object": lambda net: net.holder(),
    "bound method": lambda net: net.method(),
    "data class": lambda net: net.data.value,
    "partial": lambda net: net.partial(),
    "array": lambda net: float(net.array[0]),
    "list of tensors": lambda net: net.tensors[0],
    "dictionary of tensors": lambda net: net.by_name["scale"],
    "deque": lambda net: net.history[-1],
    "nested containers": lambda net: net.nested["a"][0]["b"],
    "enum": lambda net: int(net.size),
    "class attribute": lambda net: net.inherited,
    "class attribute by the class": lambda net: Net.inherited,
    "descriptor of a class": lambda net: net.described,
    "slots": lambda net: net.slots.value,
    "global number": lambda net: ALPHA,
    "global behind a helper": lambda net: helper(),
    "global dictionary": lambda net: BOX["v"],
    "global inner list": lambda net: BOX["inner"]["list"][0],
    "global list": lambda net: LIST[0],
    "global array": lambda net: float(ARRAY[0]),
    "global tensor, replaced": lambda net: TENSOR,
    "global deque": lambda net: QUEUE[0],
    "global object": lambda net: HOLDER.value,
    "class of a global": lambda net: Holder.shared,
    "name in a module": lambda net: MODULE.alpha,
    "default argument": lambda net: with_default(),
    "closure": lambda net: GET(),
    "replaced function": lambda net: READ_INNER(),
}


def READ_INNER() -> float:
    return 1.0


def _replace_function(net: Net) -> None:
    globals()["READ_INNER"] = lambda: 3.0


def _set(name: str) -> Callable[[Net], None]:
    def change(net: Net) -> None:
        globals()[name] = 3.0

    return change


CHANGE: dict[str, Callable[[Net], Any]] = {
    "attribute object": lambda net: setattr(net.holder, "value", 3.0),
    "callable object": lambda net: setattr(net.holder, "value", 3.0),
    "bound method": lambda net: setattr(net.holder, "value", 3.0),
    "data class": lambda net: setattr(net.data, "value", 3.0),
    "partial": lambda net: BOX.update(v=3.0),
    "array": lambda net: net.array.fill(3.0),
    "list of tensors": lambda net: net.tensors.__setitem__(0, torch.tensor(3.0)),
    "dictionary of tensors": lambda net: net.by_name.update(scale=torch.full((1,), 3.0)),
    "deque": lambda net: net.history.append(3.0),
    "nested containers": lambda net: net.nested["a"][0].update(b=3.0),
    "enum": lambda net: setattr(net, "size", Size.THREE),
    "class attribute": lambda net: setattr(Net, "inherited", 3.0),
    "class attribute by the class": lambda net: setattr(Net, "inherited", 3.0),
    "descriptor of a class": _set("ALPHA"),
    "slots": lambda net: setattr(net.slots, "value", 3.0),
    "global number": _set("ALPHA"),
    "global behind a helper": _set("ALPHA"),
    "global dictionary": lambda net: BOX.update(v=3.0),
    "global inner list": lambda net: BOX["inner"]["list"].__setitem__(0, 3.0),
    "global list": lambda net: LIST.__setitem__(0, 3.0),
    "global array": lambda net: ARRAY.fill(3.0),
    "global tensor, replaced": lambda net: globals().update(TENSOR=torch.tensor(3.0)),
    "global deque": lambda net: QUEUE.__setitem__(0, 3.0),
    "global object": lambda net: setattr(HOLDER, "value", 3.0),
    "class of a global": lambda net: setattr(Holder, "shared", 3.0),
    "name in a module": lambda net: setattr(MODULE, "alpha", 3.0),
    "default argument": lambda net: BOX.update(v=3.0),
    "closure": lambda net: PUT(3.0),
    "replaced function": _replace_function,
}


@pytest.fixture(autouse=True)
def same_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test begins with ones, and ends with what was there."""
    for name in ("ALPHA", "TENSOR", "READ_INNER"):
        monkeypatch.setitem(globals(), name, globals()[name])
    monkeypatch.setitem(BOX, "v", 1.0)
    monkeypatch.setattr(Net, "inherited", 1.0)
    monkeypatch.setattr(Holder, "shared", 1.0)
    monkeypatch.setattr(HOLDER, "value", 1.0)
    monkeypatch.setattr(MODULE, "alpha", 1.0)
    BOX["inner"]["list"][0] = LIST[0] = QUEUE[0] = 1.0
    ARRAY.fill(1.0)
    PUT(1.0)


@pytest.mark.parametrize("kind", [Net, Child])
@pytest.mark.parametrize("how", READ)
def test_a_change_is_seen(how: str, kind: type[Net]) -> None:
    model, x = kind(how), torch.randn(2, 4)
    mvpfx.prepare(model, mvpfx.PruningConfig(density=1.0))
    with torch.no_grad():
        before = model(x)
        assert difference(model(x), before) == 0
        CHANGE[how](model)
        for _ in range(2):
            torch.testing.assert_close(model(x), 3 * before)


NUMBERS: dict[str, Any] = {
    "float64": numpy.float64(0.5),
    "float32": numpy.float32(0.5),
    "int64": numpy.int64(2),
    "bool": numpy.bool_(True),
    "sqrt": numpy.sqrt(4),
    "zero-dimensional sum": numpy.ones(3).sum(),
    "IntEnum": Size.THREE,
    "infinity": math.inf,
    "complex": complex(1, 2),
}


class Scaled(nn.Module):
    def __init__(self, number: Any) -> None:
        super().__init__()
        self.layer, self.number = nn.Linear(4, 4), number

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) / self.number + torch.full((4,), 1.0)[: int(self.number.real > 0)]


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_any_kind_stand_in_graphs(name: str) -> None:
    model, x = Scaled(NUMBERS[name]), torch.randn(3, 4)
    wanted = model(x)
    config = mvpfx.PruningConfig(density=1.0)
    torch.testing.assert_close(mvpfx.prepare(model, config)(x), wanted)
    if not wanted.is_complex():
        small = mvpfx.convert(model.eval(), example_inputs=x)
        torch.testing.assert_close(small(x), wanted)


class Reads(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(4, 4), how
        self.count = itertools.count(1)
        self.numbers = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.how == "count":
            return y * next(self.count)
        if self.how == "iterator":
            return y * next(self.numbers)
        with torch.no_grad():
            first = y.detach()[0, 0]
            if self.how == "numpy":
                return y * float(first.numpy())
            if self.how == "asarray":
                return y * float(numpy.asarray(first))
            return y * first.tolist()


@pytest.mark.parametrize("how", ["count", "iterator", "numpy", "asarray", "tolist"])
def test_what_cannot_be_frozen_is_not_captured(how: str) -> None:
    torch.manual_seed(0)
    model, x = Reads(how), torch.randn(3, 4)
    layer = model.layer
    plain = nn.functional.linear(x, layer.weight.detach().clone(), layer.bias.detach().clone())
    mvpfx.prepare(model, mvpfx.PruningConfig(density=1.0))
    for call in range(1, 4):
        factor = float(plain[0, 0]) if how in ("numpy", "asarray", "tolist") else call
        torch.testing.assert_close(model(x), factor * plain)
