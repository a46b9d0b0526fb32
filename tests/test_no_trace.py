"""A recording leaves no fake tensor behind, wherever a forward keeps what it computed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import BeitConfig, BeitModel

import mvpfx
from tests.zoo.check import difference

STORE: dict[Any, Any] = {}
LIST: list[Any] = []
latest: Any = None


@functools.lru_cache(maxsize=4)
def cached_places(count: int) -> Tensor:
    return torch.arange(count)


def memoized(function: Callable[..., Any]) -> Callable[..., Any]:
    kept: dict[Any, Any] = {}

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if args not in kept:
            kept[args] = function(*args)
        return kept[args]

    return call


def cached_method(function: Callable[..., Any]) -> Callable[..., Any]:
    """As transformers caches the position bias of BEiT."""
    cached = functools.lru_cache(maxsize=4)(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return cached(*args)

    return call


@memoized
def memoized_places(count: int) -> Tensor:
    return torch.arange(count)


class Helper:
    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}


class Net(nn.Module):
    of_class: ClassVar[Any] = None
    by_size: ClassVar[dict[int, Tensor]] = {}

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.helper = how, Helper()
        self.emb, self.up, self.out = nn.Embedding(16, 8), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.up(x + self.emb(PLACES[self.how](self)))))

    @cached_method
    def places(self, count: int) -> Tensor:
        return torch.arange(count)

    @functools.lru_cache(maxsize=4)  # noqa: B019  what is tested
    def cached(self, count: int) -> Tensor:
        return torch.arange(count)

    @functools.cached_property
    def property(self) -> Tensor:
        return torch.arange(5)

    def in_dictionary(self) -> Tensor:
        return STORE.setdefault(5, torch.arange(5))

    def in_list(self) -> Tensor:
        LIST.append(torch.arange(5))
        return LIST[-1]

    def in_global(self) -> Tensor:
        global latest
        latest = torch.arange(5)
        return latest

    def in_class(self) -> Tensor:
        if Net.of_class is None:
            Net.of_class = torch.arange(5)
        return Net.of_class

    def in_dictionary_of_class(self) -> Tensor:
        return self.by_size.setdefault(5, torch.arange(5))

    def in_new_class_attribute(self) -> Tensor:
        if not hasattr(Net, "made_later"):
            Net.made_later = torch.arange(5)
        return Net.made_later

    def in_helper(self) -> Tensor:
        return self.helper.kept.setdefault(5, torch.arange(5))

    def in_attribute(self) -> Tensor:
        self.latest = torch.arange(5)
        return self.latest

    def in_function(self) -> Tensor:
        if "latest" not in vars(helper_function):
            vars(helper_function)["latest"] = torch.arange(5)
        return vars(helper_function)["latest"]


def helper_function() -> None:
    """Has an attribute."""


PLACES: dict[str, Callable[[Net], Tensor]] = {
    "lru_cache": lambda net: cached_places(5),
    "memoized in a closure": lambda net: memoized_places(5),
    "cached method": lambda net: net.places(5),
    "lru_cache of a method": lambda net: net.cached(5),
    "cached property": lambda net: net.property,
    "dictionary": lambda net: net.in_dictionary(),
    "list": lambda net: net.in_list(),
    "global": lambda net: net.in_global(),
    "class": lambda net: net.in_class(),
    "dictionary of the class": lambda net: net.in_dictionary_of_class(),
    "new class attribute": lambda net: net.in_new_class_attribute(),
    "helper object": lambda net: net.in_helper(),
    "attribute": lambda net: net.in_attribute(),
    "attribute of a function": lambda net: net.in_function(),
}


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    global latest
    latest = Net.of_class = None
    for kept in (STORE, LIST, Net.by_size):
        kept.clear()
    cached_places.cache_clear()
    for owner, name in ((Net, "made_later"), (helper_function, "latest")):
        if hasattr(owner, name):
            delattr(owner, name)


@pytest.mark.parametrize("how", PLACES)
def test_the_model_and_later_ones_stay_whole(how: str) -> None:
    torch.manual_seed(0)
    model, x = Net(how).eval(), torch.randn(2, 5, 8)
    spare = copy.deepcopy(model)
    prepared = mvpfx.prepare(copy.deepcopy(model), mvpfx.PruningConfig(density=1.0))
    found = [prepared(x) for _ in range(3)]
    small = mvpfx.convert(model, example_inputs=x)
    found += [small(x), model(x), model(x), prepared(x)]
    wanted = spare(x)
    for each in found:
        assert type(each) is Tensor
        assert difference(each, wanted) < 1e-6


def test_beit_and_later_models_of_its_class() -> None:
    config = BeitConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=16,
        use_relative_position_bias=True,
    )
    model, x = BeitModel(config).eval(), {"pixel_values": torch.randn(1, 3, 32, 32)}
    with torch.no_grad():
        small = mvpfx.convert(model, example_inputs=x)
        wanted = model(**x).last_hidden_state
        assert type(wanted) is Tensor
        assert difference(small(**x).last_hidden_state, wanted) < 1e-4
        assert type(BeitModel(config).eval()(**x).last_hidden_state) is Tensor
