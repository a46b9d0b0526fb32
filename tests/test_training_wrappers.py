"""Prepared models inside other things: wrappers, threads, replicas, modes, several calls a step."""

# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvpfx
from tests.training import (
    assert_equal,
    assert_same_gradients,
    assert_same_step,
    half,
    masked_pair,
    masks_of,
    regions,
    shuffle_scores,
    step,
)
from tests.zoo import ZOO
from tests.zoo.entry import Batch, loss, output

pytestmark = pytest.mark.every_model
NAMES = ["BERT", "Llama", "T5", "ViT"]


class Wrapper(nn.Module):
    """Adds a head of its own, and a loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> Any:
        return self.model(**batch)


@pytest.mark.parametrize("wrap", [nn.DataParallel, Wrapper])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_in_a_wrapper(name: str, wrap: Any) -> None:
    raw, prepared, batch = masked_pair(name)
    wrapped = wrap(prepared)
    step(wrapped, batch)
    step(raw, batch)
    assert_same_gradients(prepared, raw)
    listed = [p for g in mvpfx.parameter_groups(wrapped, lr=0.1) for p in g["params"]]
    assert {id(p) for p in listed} == {id(p) for p in prepared.parameters()}
    mvpfx.SparsityScheduler(wrapped, total_steps=3).step()
    assert mvpfx.explain(wrapped) == mvpfx.explain(prepared)


def test_a_wrapped_model_is_prepared_as_a_whole() -> None:
    raw = ZOO["BERT"].model()
    batch = ZOO["BERT"].batch(0)
    wrapped = mvpfx.prepare(Wrapper(copy.deepcopy(raw)), half())
    shuffle_scores(wrapped)
    with torch.no_grad():
        for mask in masks_of(wrapped):
            raw.get_parameter(mask.site.name.removeprefix("model.")).mul_(mask.mask())
    assert_same_step(wrapped, Wrapper(raw), batch)


def replicated(model: nn.Module) -> Any:
    """A replica as nn.DataParallel makes it, on the CPU."""
    originals = list(model.modules())
    replicas = [module._replicate_for_data_parallel() for module in originals]
    numbers = {id(module): number for number, module in enumerate(originals)}
    copies = {id(p): p.clone() for p in [*model.parameters(), *model.buffers()]}
    for module, replica in zip(originals, replicas, strict=True):
        inside: Any = replica
        inside._former_parameters = OrderedDict()
        for name, child in module._modules.items():
            if child is None:
                replica._modules[name] = None
            else:
                setattr(replica, name, replicas[numbers[id(child)]])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, copies[id(parameter)])
                inside._former_parameters[name] = copies[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                replica._buffers[name] = copies[id(buffer)]
    return replicas[0]


@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after a call"])
@pytest.mark.parametrize("name", NAMES)
def test_replicas_of_data_parallel(name: str, called: bool) -> None:
    raw, prepared, batch = masked_pair(name)
    for model in (raw, prepared):
        model.eval()
    if called:
        prepared(**batch)
    parts = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)]
    losses: list[Tensor] = []
    for part in parts:
        losses.append(loss(replicated(prepared)(**part)))
        loss(raw(**part)).backward()
    torch.stack(losses).sum().backward()
    assert_same_gradients(prepared, raw)
    assert not called or any("nn.DataParallel" in r for g in regions(prepared) for r in g.declined)


def test_twins_in_one_forward() -> None:
    raw, prepared, batch = masked_pair("BERT")
    other = {k: v.flip(0) for k, v in batch.items()}
    for model in (raw, prepared):
        model.train()
        torch.manual_seed(0)
        first, second = model(**batch).logits, model(**other).logits
        F.cosine_similarity(first, second).sum().backward()
    assert_same_gradients(prepared, raw)


def test_a_model_inside_a_prepared_model_of_the_same_kind() -> None:
    class Block(nn.Module):
        def __init__(self, inner: nn.Module | None = None) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
            self.blocks = nn.ModuleList([] if inner is None else [inner, copy.deepcopy(inner)])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x + self.down(torch.relu(self.up(x)))

    raw = Block(Block(Block()))
    prepared = mvpfx.prepare(copy.deepcopy(raw), half())
    shuffle_scores(prepared)
    with torch.no_grad():
        for mask in masks_of(prepared):
            raw.get_parameter(mask.site.name).mul_(mask.mask())
    for _ in range(2):
        assert_same_step(prepared, raw, {"x": torch.randn(3, 8)})
        for model in (raw, prepared):
            model.zero_grad()


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
}


@pytest.mark.parametrize("name", NAMES)
def test_modes_in_turns(name: str) -> None:
    raw, prepared, batch = masked_pair(name)
    for model in (raw, prepared):
        model.eval()
    for mode in ("inference_mode", "no_grad", "enable_grad", "inference_mode", "enable_grad"):
        with MODES[mode]():
            found, wanted = output(prepared(**batch)), output(raw(**batch))
        assert_equal(found, wanted, mode)
        assert found.requires_grad == wanted.requires_grad
        assert found.is_inference() == wanted.is_inference()
    for model in (raw, prepared):
        model.zero_grad()
    assert_same_step(prepared, raw, batch)


def test_a_model_prepared_in_inference_mode_trains() -> None:
    raw, batch = ZOO["BERT"].model(), ZOO["BERT"].batch(0)
    with torch.inference_mode():
        prepared = mvpfx.prepare(raw, half(), example_inputs=batch)
        prepared(**batch)
    step(prepared, batch)
    assert all(mask.require_scores().grad is not None for mask in masks_of(prepared))


@pytest.mark.parametrize("name", ["BERT", "T5"])
def test_threads_that_infer_in_different_ways(name: str) -> None:
    raw, prepared, batch = masked_pair(name)
    for model in (raw, prepared):
        model.eval()
    half_batch = {k: v[:1] for k, v in batch.items()}
    jobs: list[tuple[str, Batch]] = [(mode, each) for mode in MODES for each in (batch, half_batch)]
    wanted = [output(raw(**each)) for _, each in jobs]
    found: dict[int, Tensor] = {}
    errors: list[BaseException] = []

    def work(number: int) -> None:
        mode, each = jobs[number]
        try:
            for _ in range(2):
                with MODES[mode]():
                    found[number] = output(prepared(**each))
        except Exception as error:  # noqa: BLE001  reported below, by the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for number, result in enumerate(wanted):
        assert_equal(found[number], result, str(number))


def test_threads_that_train_copies() -> None:
    raw, prepared, batch = masked_pair("BERT")
    for model in (raw, prepared):
        model.eval()
    step(raw, batch)
    twins = [copy.deepcopy(prepared) for _ in range(3)]
    threads = [threading.Thread(target=lambda m=m: loss(m(**batch)).backward()) for m in twins]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for twin in twins:
        assert_same_gradients(twin, raw)
