"""convert: the same function, smaller; the input untouched; every decision on record."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import mvpfx
from mvpfx.mask import Mask
from mvpfx.storage import SparseLinear
from tests.models import ZOO, Batch, build, output

TOLERANCE = 1e-4


def pruned(name: str, device: str = "cpu", **options: Any) -> tuple[nn.Module, Batch]:
    """A prepared model of the zoo with random scores, at its final density."""
    model, batch = build(name)
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    options = {"density": 0.2, "schedule": mvpfx.ConstantSchedule(), **options}
    model = mvpfx.prepare(model.to(device), mvpfx.PruningConfig(**options), example_inputs=batch)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for mask in model.modules():
            if isinstance(mask, Mask) and mask.scores is not None:
                mask.scores.copy_(torch.rand(mask.scores.shape, generator=generator))
    return model.eval(), batch


@pytest.mark.parametrize("lowering", ["auto", "csr", pytest.param("dense", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ZOO)
def test_converted_computes_what_the_masked_model_computes(
    name: str, lowering: str, device: str
) -> None:
    model, batch = pruned(name, device)
    small = mvpfx.convert(model, example_inputs=batch, lowering=lowering)
    with torch.no_grad():
        difference = (output(model(**batch)) - output(small(**batch))).abs().max()
    report = mvpfx.report_of(small)
    assert float(difference) <= TOLERANCE
    assert report.max_difference is not None and report.max_difference <= TOLERANCE
    assert not any(isinstance(module, Mask) for module in small.modules())
    assert not any(name.endswith("scores") for name in small.state_dict())
    assert type(small).__mro__[0] in type(model).__mro__
    if lowering == "csr" and name not in ("functional_mlp", "conv_net", "attention"):
        assert any(isinstance(module, SparseLinear) for module in small.modules())


@pytest.mark.parametrize("name", ["bert", "functional_mlp", "tied"])
def test_the_input_model_is_left_as_it_was(name: str) -> None:
    model, batch = pruned(name)
    model.train()
    before = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    mvpfx.convert(model, example_inputs=batch, lowering="csr")
    assert [type(module) for module in model.modules()] == classes
    assert all(module.training for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize(
    ("name", "out", "channels", "heads"),
    [
        ("bert", "attention.output.dense", "encoder.layer.*[0-9].output.dense", 4),
        ("roberta", "attention.output.dense", "encoder.layer.*[0-9].output.dense", 4),
        ("distilbert", "attention.out_lin", "ffn.lin2", 4),
        ("vit", "attention.o_proj", "mlp.fc2", 4),
    ],
)
def test_heads_and_channels_go(name: str, out: str, channels: str, heads: int) -> None:
    others = "query|key|value|intermediate.dense|[qkv]_proj|[qkv]_lin|fc1|lin1"
    overrides: dict[str, Any] = {
        f"re:.*{out}": {"granularity": "head"},
        f"re:.*{channels}": {"granularity": (32, 1)},
        f"re:.*({others})": None,
    }
    model, batch = pruned(name, density=0.5, overrides=overrides)
    small = mvpfx.convert(model, example_inputs=batch, lowering="dense")
    masks = [m for m in model.modules() if isinstance(m, Mask)]
    assert len(masks) == 4
    blocks = sum(p.numel() for n, p in model.named_parameters() if is_block_weight(n))
    left = sum(p.numel() for n, p in small.named_parameters() if is_block_weight(n))
    assert left == blocks / 2
    for length in (1, 3):
        if "input_ids" in batch:
            ids = batch["input_ids"][:1, :length]
            torch.testing.assert_close(model(ids).logits, small(ids).logits, rtol=0, atol=1e-5)


def is_block_weight(name: str) -> bool:
    return "layer" in name and name.endswith(".weight") and "orm" not in name


def test_constants_of_dead_units_are_folded_not_dropped() -> None:
    model, batch = build("bert")
    with torch.no_grad():
        for layer in model.get_submodule("bert.encoder.layer"):  # pyright: ignore[reportGeneralTypeIssues]
            layer.intermediate.dense.weight[:10] = 0
            layer.attention.self.value.weight[:8] = 0
            layer.attention.self.query.weight[8:16] = 0  # uniform attention: alive
    small: Any = mvpfx.convert(model.eval(), example_inputs=batch)
    layer = small.bert.encoder.layer[0]
    assert layer.intermediate.dense.weight.shape == (38, 32)
    # A query that may attend to nothing gets 0, and not what these values hand on.
    assert layer.attention.self.value.weight.shape == (32, 32)
    with torch.no_grad():
        torch.testing.assert_close(small(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)


def test_without_example_inputs_a_prepared_model_uses_what_it_captured() -> None:
    only_up: dict[str, Any] = {
        "re:.*intermediate.dense": {"granularity": (1, 32)},
        "re:.*(attention.*|[0-9].output.dense)": None,
    }
    model, batch = pruned("bert", density=0.5, overrides=only_up)
    with torch.no_grad():
        model(**batch)
    small = mvpfx.convert(model)
    report = mvpfx.report_of(small)
    assert report.max_difference is None and report.latency_after_ms is None
    assert any(d.applied and "remove" in d.action for d in report.decisions)
    with torch.no_grad():
        torch.testing.assert_close(
            small(**batch).logits, model(**batch).logits, rtol=0, atol=TOLERANCE
        )


def test_graphs_show_the_lowered_model() -> None:
    model, batch = pruned("bert")
    small = mvpfx.convert(model, example_inputs=batch, lowering="csr")
    graph = mvpfx.graphs(small)["bert.encoder.layer.1"]
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    assert "output.dense" in called and "attention.self.query" in called
    assert not any(target.endswith("_mask") for target in called)


def test_generation_with_a_cache_after_convert() -> None:
    model, batch = pruned("llama_cached", density=0.5)
    small: Any = mvpfx.convert(model, example_inputs=batch, lowering="csr")
    masked: Any = model
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ids = batch["input_ids"]
    options["attention_mask"] = torch.ones_like(ids)
    assert torch.equal(small.generate(ids, **options), masked.generate(ids, **options))


def test_converted_models_copy_save_and_move() -> None:
    model, batch = pruned("bert")
    small = mvpfx.convert(model, example_inputs=batch, lowering="csr")
    wanted = small(**batch).logits
    for copied in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        copied.load_state_dict(small.state_dict())
        assert torch.equal(copied(**batch).logits, wanted)
        assert mvpfx.sparsity_table(copied) == mvpfx.sparsity_table(small)
    assert mvpfx.graphs(copy.deepcopy(small)).keys() == mvpfx.graphs(small).keys()
