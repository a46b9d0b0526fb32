"""The recorder: what it writes down besides plain calls, and what it refuses."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvpfx
from mvpfx import interception
from mvpfx.region import Region, region_of
from tests.models import build
from tests.test_traps import masked_copy, prepared
from tests.zoo.check import difference


class Around(nn.Module):
    """A function of what a layer gives."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(width, width), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


def root(model: nn.Module) -> Region:
    region = region_of(model)
    assert region is not None
    return region


def assert_same(raw: nn.Module, *inputs: Tensor) -> Region:
    """Calls of the prepared module give what the masked one gives, forward and backward."""
    model = prepared(copy.deepcopy(raw))
    reference = masked_copy(raw, model)
    for x in inputs:
        pair = [x.clone().requires_grad_() for _ in range(2)]
        found, wanted = model(pair[0] * 1), reference(pair[1] * 1)
        assert difference(found, wanted) == 0
        if found.numel():
            found.sum().backward()
            wanted.sum().backward()
            assert difference(pair[0].grad, pair[1].grad) == 0
    return root(model)


def test_in_place_calls_without_a_result_are_kept() -> None:
    def doubled(x: Tensor) -> Tensor:
        x = x.clone()
        torch._foreach_mul_([x], 2.0)  # pyright: ignore[reportPrivateImportUsage]
        return x

    region = assert_same(Around(doubled), torch.randn(2, 8))
    assert region.calls == 1


def test_gradients_asked_for_inside_are_asked_for_in_the_graph() -> None:
    def own_gradient(x: Tensor) -> Tensor:
        weight = torch.ones(8)
        weight.requires_grad = True
        return x * torch.autograd.grad((weight * 3).sum(), weight)[0]

    def marked(x: Tensor) -> Tensor:
        offset = torch.ones(8)
        offset.requires_grad = True
        return x + offset

    assert assert_same(Around(marked), torch.randn(2, 8)).calls == 1
    assert_same(Around(own_gradient), torch.randn(2, 8))


def test_an_assigned_property_is_refused() -> None:
    def assigned(x: Tensor) -> Tensor:
        out = torch.zeros(2, 8)
        out.data = x.detach() * 2
        return x + out

    region = assert_same(Around(assigned), torch.randn(2, 8))
    assert list(region.declined) == ["its forward assigns the .data of a tensor"]


def test_numpy_random_numbers_are_drawn_once_and_anew() -> None:
    model = prepared(Around(lambda x: x * float(numpy.random.rand())))
    x = torch.ones(1, 8)
    numpy.random.seed(0)
    found = [float(model(x).detach().sum()) for _ in range(4)]
    assert len(set(found)) == 4
    assert list(root(model).declined) == ["its forward changes state: NumPy's random generator"]
    after = numpy.random.rand()
    numpy.random.seed(0)
    assert [numpy.random.rand() for _ in range(5)][-1] == after


class Remembering(nn.Module):
    """Writes to what it holds: an object's attribute and a list in a dictionary of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.record = SimpleNamespace(calls=0)
        self._memory: dict[str, list[Tensor]] = {"seen": []}

    def forward(self, x: Tensor) -> Tensor:
        self.record.calls += 1
        out = self.layer(x)
        self._memory["seen"].append(out)
        return out * self.record.calls


def test_what_a_forward_writes_into_objects_is_real_and_written_once() -> None:
    raw = Remembering()
    region = assert_same(raw, torch.randn(2, 8), torch.randn(2, 8), torch.randn(2, 8))
    assert region.calls == 0
    assert list(region.declined) == [
        "its forward changes state: Remembering.record, Remembering._memory"
    ]
    model: Any = prepared(Remembering())
    model(torch.randn(2, 8))
    assert model.record.calls == 1
    assert [type(t) for t in model._memory["seen"]] == [Tensor]


class Switched(nn.Module):
    """Branches on what objects and dictionaries hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.options = SimpleNamespace(negate=False)
        self.scaling = {"default": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x) * self.scaling["default"]
        return -out if self.options.negate else out


def test_switches_in_objects_and_dictionaries_are_seen_after_capture() -> None:
    raw = Switched()
    model: Any = prepared(copy.deepcopy(raw))
    reference: Any = masked_copy(raw, model)
    x = torch.randn(2, 8)
    for negate, scale in ((False, 1.0), (True, 1.0), (True, 3.0), (False, 1.0)):
        for each in (model, reference):
            each.options.negate, each.scaling["default"] = negate, scale
        assert difference(model(x), reference(x)) == 0
    assert root(model).calls == 4 and len(root(model).captured()) == 3


def test_empty_inputs_have_a_variant_of_their_own() -> None:
    region = assert_same(
        Around(lambda x: x.sum(0) if x.shape[0] else x.sum(0) + 1),
        *(torch.randn(rows, 8) for rows in (3, 5, 0, 1, 0, 4)),
    )
    assert region.calls == 6 and not region.declined


def test_strides_of_inputs_are_symbols() -> None:
    def stride(x: Tensor) -> Tensor:
        return x * x.stride(0)

    raw = Around(stride)
    model, reference = prepared(copy.deepcopy(raw)), None
    reference = masked_copy(raw, model)
    for length in (5, 7, 1):
        x = torch.randn(3, length, 8)[:, 0]
        assert difference(model(x), reference(x)) == 0
    assert not root(model).declined


class StrideOfInput(nn.Module):
    """Reads how its input lies in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.stride(0) > 40:
            return self.layer(x) * 2
        return self.layer(x) * x.stride(0)


def test_control_flow_on_strides_is_a_condition() -> None:
    raw = StrideOfInput()
    model = prepared(copy.deepcopy(raw))
    reference = masked_copy(raw, model)
    for length in (2, 3, 5, 7, 9, 4):
        x = torch.randn(3, length, 8)[:, 0]
        assert difference(model(x), reference(x)) == 0
    assert root(model).calls == 6 and not root(model).declined


def test_nothing_is_logged_where_a_kernel_refuses(caplog: pytest.LogCaptureFixture) -> None:
    def refused(x: Tensor) -> Tensor:
        return x + torch.unique(x.detach()).sum() + len(torch.nonzero(x > 0))

    with caplog.at_level(logging.ERROR):
        region = assert_same(Around(refused), torch.randn(2, 8))
    assert region.declined
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_hooks_of_transformers_that_collect_nothing_do_not_hinder() -> None:
    raw, batch = build("bert")
    model: Any = mvpfx.prepare(copy.deepcopy(raw)).eval()
    reference: Any = masked_copy(raw, model).eval()
    for each in (model, reference):
        each.set_attn_implementation("eager")
    regions = [region_of(model.get_submodule(f"bert.encoder.layer.{i}")) for i in range(2)]
    for collect in (False, True, False, True, False):
        found = model(**batch, output_attentions=collect)
        wanted = reference(**batch, output_attentions=collect)
        assert difference(found.logits, wanted.logits) <= 1e-6
        assert len(found.attentions or ()) == (2 if collect else 0)
        for one, other in zip(found.attentions or (), wanted.attentions or (), strict=True):
            assert difference(one, other) <= 1e-6
    for region in regions:
        assert region is not None
        assert region.calls == 3
        assert region.declined == {"attention.self has forward hooks": 2}


def test_kernels_that_refuse_symbols_in_cpp_are_recorded() -> None:
    def padded(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 8 - x.shape[0] % 8)).view(-1, 8, 8).sum((0, 1))

    inputs = [torch.randn(rows, 8) for rows in (3, 5, 11)]
    region = assert_same(Around(padded), *inputs)
    assert region.calls == 3 and not region.declined


@pytest.mark.parametrize("where", ["AttentionIsLeaf", "CHECKPOINT_GENERATOR", "inspect"])
def test_a_recording_that_cannot_begin_leaves_no_trace(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(3, 8)
    model = prepared(copy.deepcopy(raw))
    expected = masked_copy(raw, model)
    with monkeypatch.context() as patch:
        patch.setattr(interception, where, "nothing that can be used")
        before = nn.Module.__call__
        for _ in range(2):
            assert difference(model(x), expected(x)) == 0
        assert nn.Module.__call__ is before
        assert not interception.is_capturing()
    assert root(model).declined
    other = threading.Thread(target=lambda: model(x[:2, None]))  # waits for a lock that is held
    other.start()
    other.join(timeout=60)
    assert not other.is_alive()
