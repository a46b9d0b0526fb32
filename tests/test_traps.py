"""The traps of capturing a running module: in each of them the forward looks right."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportPrivateUsage=false

from __future__ import annotations

import copy
import pickle
import random
import threading
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvpfx
from mvpfx.mask import Mask
from mvpfx.region import Region, region_of
from tests.models import build, loss, output

CONFIG = mvpfx.PruningConfig(density=0.5, schedule=mvpfx.ConstantSchedule())


def prepared(model: nn.Module) -> nn.Module:
    return mvpfx.prepare(model, CONFIG)


def root_region(model: nn.Module) -> Region:
    region = region_of(model)
    assert region is not None
    return region


def masked_copy(model: nn.Module, like: nn.Module) -> nn.Module:
    """A copy of the raw `model` with the weights that the prepared `like` computes with."""
    reference = copy.deepcopy(model)
    for mask in like.modules():
        if isinstance(mask, Mask):
            with torch.no_grad():
                reference.get_parameter(mask.site.name).mul_(mask.mask())
    return reference


def test_1_a_captured_weight_is_masked_once() -> None:
    raw = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model = prepared(copy.deepcopy(raw))
    reference = masked_copy(raw, model)
    x = torch.randn(3, 8)
    model(x).sum().backward()
    reference(x).sum().backward()
    assert root_region(model).calls == 1
    gradient = reference.get_parameter("0.weight").grad
    scores = model.get_parameter("0.weight_mask.scores").grad
    assert gradient is not None and scores is not None
    torch.testing.assert_close(scores, gradient * raw.get_parameter("0.weight"))


def test_2_autocast_does_not_remember_fakes() -> None:
    raw, batch = build("mlp")
    model = prepared(copy.deepcopy(raw))
    reference = masked_copy(raw, model).eval()
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [model(**batch), model(**batch)]
        wanted = reference(**batch)
    assert root_region(model).calls == 2
    assert all(type(f) is Tensor and f.dtype == wanted.dtype for f in found)
    torch.testing.assert_close(found[1], wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_3_checkpointing_around_a_first_call(name: str, reentrant: bool) -> None:
    raw, batch = build(name)
    model: Any = prepared(copy.deepcopy(raw))
    reference: Any = masked_copy(raw, model)
    for each in (model, reference):
        each.train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # renamed in transformers 5.2x
            each.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(0)
    loss(reference(**batch)).backward()
    torch.manual_seed(0)
    loss(model(**batch)).backward()
    weights = dict(reference.named_parameters())
    masks = {m.site.name: m for m in model.modules() if isinstance(m, Mask)}
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("scores"):
            assert parameter.grad is not None and parameter.grad.any()
            continue
        wanted = weights[parameter_name].grad
        if wanted is not None and parameter_name in masks:
            wanted = wanted * masks[parameter_name].mask()
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-5, atol=1e-7)


class Doubled(torch.autograd.Function):
    """Rounds; its backward doubles, which no look inside the forward would show."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 2


class WithFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(Doubled.apply(self.first(x)))  # pyright: ignore[reportArgumentType]


def test_4_autograd_functions_keep_their_backward() -> None:
    raw = WithFunction()
    model = prepared(copy.deepcopy(raw))
    reference = masked_copy(raw, model)
    x = torch.randn(3, 8) * 5
    model(x).sum().backward()
    reference(x).sum().backward()
    assert root_region(model).calls == 1
    wanted = reference.get_parameter("first.bias").grad
    torch.testing.assert_close(model.get_parameter("first.bias").grad, wanted)


class Stateful(nn.Module):
    """Keeps things on itself while running."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.last: Tensor | None = None
        self.count = 0
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        out = self.layer(x)
        self.last = out
        self.seen.append(out)
        return out * 2


def test_5_state_written_by_a_forward_is_real_and_written_once() -> None:
    raw = Stateful()
    model: Any = prepared(copy.deepcopy(raw))
    reference = masked_copy(raw, model)
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), reference(x))
    assert type(model.last) is Tensor
    assert model.count == 1
    assert [type(t) for t in model.seen] == [Tensor]
    assert "its forward changes state" in mvpfx.explain(model)


def test_5_inner_hooks_run_and_keep_working() -> None:
    raw, batch = build("mlp")
    model = prepared(copy.deepcopy(raw)).eval()
    model(**batch)
    seen: list[Any] = []
    handle = model.get_submodule("0").register_forward_hook(lambda m, a, out: seen.append(out))
    out = model(**batch)
    handle.remove()
    assert [type(t) for t in seen] == [Tensor]
    torch.testing.assert_close(out, masked_copy(raw, model).eval()(**batch))
    assert "0 has forward hooks" in mvpfx.explain(model)


def test_5_python_random_numbers_are_drawn_once_and_anew() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if random.random() < 0.5 else x

    model = prepared(Sometimes())
    x = torch.randn(2, 4)
    random.seed(0)
    found = [torch.equal(model(x), x) for _ in range(20)]
    random.seed(0)
    wanted = [random.random() >= 0.5 for _ in range(20)]
    assert found == wanted


def test_6_example_inputs_do_not_move_batch_norm_or_training_mode() -> None:
    raw, batch = build("conv_net")
    raw.train()
    raw.get_submodule("4").eval()
    model = mvpfx.prepare(copy.deepcopy(raw), CONFIG, example_inputs=batch)
    for name, before in raw.named_buffers():
        assert torch.equal(before, model.get_buffer(name)), name
    modes = [m.training for m in model.modules() if not isinstance(m, Mask)]
    assert modes == [m.training for m in raw.modules()]
    model(**batch)
    assert int(model.get_buffer("1.num_batches_tracked")) == 1


def test_7_a_view_that_holds_the_head_count_is_never_reshaped_in_silence() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)
            self.v, self.o = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            parts = [
                w(x).view(*x.shape[:2], 4, 4).transpose(1, 2) for w in (self.q, self.k, self.v)
            ]
            out = F.scaled_dot_product_attention(*parts).transpose(1, 2)
            return self.o(out.reshape(x.shape))

    model = Heads()
    with torch.no_grad():
        model.o.weight[:, :4] = 0
    x = torch.randn(2, 5, 16)
    small = mvpfx.convert(model, example_inputs=x)
    torch.testing.assert_close(small(x), model(x), atol=1e-5, rtol=0)
    declined = [d for d in mvpfx.report_of(small).decisions if not d.applied]
    assert any("the module's forward fails" in d.reason for d in declined), declined


def test_8_attention_implementation_may_change_after_capture() -> None:
    raw, batch = build("bert")
    model: Any = prepared(copy.deepcopy(raw)).eval()
    reference: Any = masked_copy(raw, model).eval()
    model(**batch)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        reference.set_attn_implementation(implementation)
        found = model(**batch, output_attentions=implementation == "eager")
        wanted = reference(**batch, output_attentions=implementation == "eager")
        torch.testing.assert_close(found.logits, wanted.logits)
        assert len(found.attentions or ()) == len(wanted.attentions or ())


def test_8_an_attribute_changed_after_capture_counts() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.factor = nn.Linear(4, 4), 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.factor

    model: Any = prepared(Scaled())
    x = torch.randn(2, 4)
    before = model(x)
    model.factor = 3.0
    torch.testing.assert_close(model(x), before * 3)


def test_9_other_threads_run_while_one_captures() -> None:
    raw, batch = build("bert")
    model = prepared(copy.deepcopy(raw)).eval()
    reference = masked_copy(raw, model).eval()
    wanted = output(reference(**batch))
    found: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            found.extend(output(model(**batch)) for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    for each in found:
        torch.testing.assert_close(each, wanted)


@pytest.mark.parametrize("name", ["bert", "functional_mlp", "tied"])
def test_9_copies_and_pickles_work_on_their_own(name: str) -> None:
    model, batch = build(name)
    mvpfx.prepare(model, CONFIG, example_inputs=batch).eval()
    wanted = output(model(**batch))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model)
        torch.testing.assert_close(output(copied(**batch)), wanted)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        torch.testing.assert_close(output(model(**batch)), wanted)
