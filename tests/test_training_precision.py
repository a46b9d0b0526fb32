"""Number formats: autocast, models of half and double precision, gradient scaling."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mvpfx
from tests.training import (
    assert_equal,
    assert_same_gradients,
    assert_same_step,
    half,
    masked_pair,
    masks_of,
    pair,
    shuffle_scores,
    step,
    whole,
)
from tests.zoo import ZOO
from tests.zoo.entry import Batch, loss, output

pytestmark = pytest.mark.every_model
NAMES = ["BERT", "GPT-2", "Llama", "T5", "ViT"]
HALVES = [torch.bfloat16, torch.float16]
DTYPES = pytest.mark.parametrize("dtype", HALVES, ids=str)


@DTYPES
@pytest.mark.parametrize("name", NAMES)
def test_autocast_computes_and_rounds_the_same(name: str, dtype: torch.dtype) -> None:
    raw, prepared, batch = pair(name)
    for training in (True, False):
        for model in (raw, prepared):
            model.train(training)
            model.zero_grad()
            torch.manual_seed(3)
            with torch.autocast("cpu", dtype=dtype):
                result = model(**batch)
            assert output(result).dtype == dtype
            loss(result).backward()
            model.result = result
        assert_equal(output(prepared.result), output(raw.result))
        assert_equal(loss(prepared.result), loss(raw.result), "loss")
        assert_same_gradients(prepared, raw)
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in prepared.parameters())


def test_autocast_switched_between_calls_and_inside_a_cached_weight() -> None:
    raw, prepared, batch = masked_pair("BERT")
    raw.eval()
    prepared.eval()
    for dtype in (None, torch.bfloat16, torch.float16, None, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            first, again = prepared(**batch), prepared(**batch)
            wanted = raw(**batch)
        assert_equal(output(first), output(wanted), str(dtype))
        assert_equal(output(again), output(wanted), str(dtype))


def test_autocast_inside_a_forward() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.low(x)
            return self.high(x.float())

    raw = Mixed()
    prepared = mvpfx.prepare(copy.deepcopy(raw), whole())
    assert_same_step(prepared, raw, {"x": torch.randn(3, 8)})


def floating(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch with its floating tensors in another dtype."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in NAMES), ("BERT", torch.float16), ("BERT", torch.float64)],
    ids=str,
)
def test_a_model_of_another_dtype(name: str, dtype: torch.dtype) -> None:
    raw = ZOO[name].model()
    batch = floating(ZOO[name].batch(0), dtype)
    before = mvpfx.prepare(copy.deepcopy(raw), whole()).to(dtype)
    raw.to(dtype)
    after = mvpfx.prepare(copy.deepcopy(raw), whole())
    called = mvpfx.prepare(ZOO[name].model(), whole())
    called(**ZOO[name].batch(0))
    called.to(dtype)
    wanted = step(raw, batch)
    for prepared in (before, after, called):
        found = step(prepared, batch)
        assert output(found).dtype == output(wanted).dtype
        assert_equal(output(found), output(wanted))
        gradients = {n: p.grad for n, p in raw.named_parameters()}
        for parameter_name, parameter in prepared.named_parameters():
            if not parameter_name.endswith("_mask.scores"):
                assert_equal(parameter.grad, gradients[parameter_name], parameter_name)
        for mask in masks_of(prepared):
            scores = mask.require_scores()
            assert scores.dtype == torch.float32
            gradient = gradients[mask.site.name]
            assert (scores.grad is None) == (gradient is None)
            if gradient is not None:
                assert scores.grad is not None and scores.grad.dtype == torch.float32
                assert scores.grad.any()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64], ids=str)
def test_masks_do_not_move_with_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    prepared = mvpfx.prepare(ZOO["BERT"].model(), half())
    shuffle_scores(prepared)
    scores = [mask.require_scores().detach().clone() for mask in masks_of(prepared)]
    before = [mask.mask().clone() for mask in masks_of(prepared)]
    for dtypes in (dtype, torch.float32, dtype):
        prepared.to(dtypes)
    for mask, old, kept in zip(masks_of(prepared), scores, before, strict=True):
        assert torch.equal(mask.require_scores(), old)
        assert torch.equal(mask.mask(), kept)


def test_layers_of_mixed_dtypes() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.high(self.low(x.to(self.low.weight.dtype)).to(self.high.weight.dtype))

    raw = Mixed()
    prepared = mvpfx.prepare(copy.deepcopy(raw), whole())
    for dtype in (torch.float32, torch.float16, torch.float64):
        raw.zero_grad()
        prepared.zero_grad()
        x = torch.randn(3, 8).to(dtype)
        wanted, found = raw(x), prepared(x)
        assert_equal(found, wanted)
        wanted.sum().backward()
        found.sum().backward()
        for name, parameter in raw.named_parameters():
            assert_equal(prepared.get_parameter(name).grad, parameter.grad, name)


def test_gradient_scaling_skips_and_scales_the_same() -> None:
    raw, prepared, batch = pair("BERT")
    losses: list[list[torch.Tensor]] = []
    for model, parameters in (
        (raw, raw.parameters()),
        (prepared, mvpfx.parameter_groups(prepared, lr=0.1, weight_decay=0.0)),
    ):
        model.eval()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2)
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        seen: list[torch.Tensor] = []
        for index in range(4):
            with torch.autocast("cpu", dtype=torch.float16):
                value = loss(model(**batch))
            if index == 1:
                value = value * float("inf")  # an overflow: this step is to be skipped
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            seen += [value.detach(), torch.tensor(scaler.get_scale())]
        losses.append(seen)
    for found, wanted in zip(losses[1], losses[0], strict=True):
        torch.testing.assert_close(found, wanted)
    assert all(torch.isfinite(p).all() for p in prepared.parameters())
