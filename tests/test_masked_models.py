"""Prepared models against `W *= mask`: forward, loss, gradients of weights and scores, eval."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvpfx
from mvpfx.granularity import to_matrix
from mvpfx.mask import Mask
from mvpfx.region import region_of
from mvpfx.state import state_of
from tests.models import ZOO, Batch, Tied, build, loss, output

RELATIVE = 1e-6
GRANULARITIES: list[Any] = ["element", (4, 8)]
BLOCKS: dict[str, Any] = {
    "functional_mlp": ((4, 8), {}),
    "tied": ((1, 8), {}),
    "conv_net": ((4, 4), {"0": None, "7": None}),
}
"""Blocks that tile models with odd shapes, and the sites they leave out."""


def config(granularity: Any = "element", **more: Any) -> mvpfx.PruningConfig:
    return mvpfx.PruningConfig(
        density=0.4, granularity=granularity, schedule=mvpfx.ConstantSchedule(), **more
    )


def masks(model: nn.Module) -> dict[str, Mask]:
    return {m.site.name: m for m in model.modules() if isinstance(m, Mask)}


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for mask in masks(model).values():
        assert mask.scores is not None
        with torch.no_grad():
            noise = torch.rand(mask.scores.shape, generator=generator)
            mask.scores.copy_(noise)


def assert_close(found: Tensor | None, wanted: Tensor | None, what: str) -> None:
    assert found is not None and wanted is not None, what
    found, wanted = found.detach(), wanted.detach()
    scale = float(wanted.abs().max().clamp_min(1e-12))
    difference = float((found - wanted).abs().max())
    assert difference <= RELATIVE * scale, f"{what}: {difference / scale:.1e} relative"


def reference_of(model: nn.Module, prepared: nn.Module) -> nn.Module:
    """`model` with each site's weight multiplied by its mask; an embedding stays raw."""
    reference = copy.deepcopy(model)
    if isinstance(reference, Tied):
        reference.out.weight = nn.Parameter(reference.out.weight.detach().clone())
    for name, mask in masks(prepared).items():
        weight = reference.get_parameter(name)
        with torch.no_grad():
            weight.mul_(mask.mask())
    return reference


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_training_step_equals_reference(name: str, granularity: Any, device: str) -> None:
    model, batch = build(name)
    model, batch = model.to(device), to_device(batch, device)
    overrides: dict[str, Any] = {}
    if granularity != "element":
        granularity, overrides = BLOCKS.get(name, (granularity, {}))
    prepared = mvpfx.prepare(
        copy.deepcopy(model), config(granularity, overrides=overrides), example_inputs=batch
    )
    randomize(prepared)
    reference = reference_of(model, prepared)
    for training in (True, False):
        prepared.train(training)
        reference.train(training)
        check_step(prepared, reference, model, batch)
    assert not any(declined(prepared))


def declined(prepared: nn.Module) -> list[dict[str, int]]:
    """What the regions could not capture; every region must have been called."""
    regions = [region_of(prepared.get_submodule(name)) for name in state_of(prepared).regions]
    assert all(region is not None and (region.calls or region.declined) for region in regions)
    return [region.declined for region in regions if region is not None]


def check_step(prepared: nn.Module, reference: nn.Module, raw: nn.Module, batch: Batch) -> None:
    prepared.zero_grad()
    reference.zero_grad()
    torch.manual_seed(3)
    wanted = reference(**batch)
    torch.manual_seed(3)
    found = prepared(**batch)
    assert_close(output(found), output(wanted), "output")
    assert_close(loss(found), loss(wanted), "loss")
    loss(wanted).backward()
    loss(found).backward()
    raw_weights = dict(raw.named_parameters(remove_duplicate=False))
    wanted_gradients = {n: p.grad for n, p in reference.named_parameters(remove_duplicate=False)}
    by_site = masks(prepared)
    for name, mask in by_site.items():
        gradient = wanted_gradients[name]
        assert gradient is not None and mask.scores is not None
        product = (gradient * raw_weights[name]).detach()
        matrix = to_matrix(product, mask.site.out_dim, mask.site.parts)
        scores = mask.granularity.reduce(matrix, mask.site.parts)
        assert_close(mask.scores.grad, scores, f"scores of {name}")
    for name, parameter in prepared.named_parameters():
        if name.endswith("scores"):
            continue
        gradient = wanted_gradients[name]
        names = [s for s, m in by_site.items() if name in (s, *m.site.aliases)]
        if names and gradient is not None:
            if by_site[names[0]].site.aliases:
                masked = wanted_gradients["out.weight"]
                assert masked is not None
                gradient = gradient + masked * by_site[names[0]].mask()
            else:
                gradient = gradient * by_site[names[0]].mask()
        if gradient is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert_close(parameter.grad, gradient, name)


def to_device(batch: Batch, device: str) -> Batch:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


@pytest.mark.parametrize("name", ZOO)
def test_fallback_equals_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import mvpfx.region
    from mvpfx.recording import CaptureError

    model, batch = build(name)
    prepared = mvpfx.prepare(copy.deepcopy(model), config(), example_inputs=batch)
    randomize(prepared)

    def refuse(*_: Any, **__: Any) -> None:
        raise CaptureError("refused by the test")

    monkeypatch.setattr(mvpfx.region, "capture", refuse)
    check_step(prepared, reference_of(model, prepared), model, batch)
    assert "refused by the test" in mvpfx.explain(prepared)


@pytest.mark.parametrize("name", ZOO)
def test_state_dict_keys_and_order_are_unchanged(name: str) -> None:
    model, batch = build(name)
    before = list(model.state_dict())
    prepared = mvpfx.prepare(model, config(), example_inputs=batch)
    after = [key for key in prepared.state_dict() if "_mask." not in key]
    assert after == before
    added = [key for key in prepared.state_dict() if key.endswith("scores")]
    assert len(added) == len(masks(prepared))


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "vit", "gpt2", "llama"])
def test_save_pretrained_loads_in_plain_transformers(name: str, tmp_path: Any) -> None:
    model, batch = build(name)
    kind: Any = type(model)
    prepared: Any = mvpfx.prepare(model, config(), example_inputs=batch)
    prepared.save_pretrained(tmp_path)
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is kind
    assert not info["missing_keys"]
    kept = masks(prepared)
    for key, value in loaded.state_dict().items():
        raw = prepared.state_dict()[key]
        assert torch.equal(value, raw * kept[key].mask() if key in kept else raw), key


def test_blocks_hold_ffn_pairs_and_attention_in_one_graph() -> None:
    model, batch = build("bert")
    prepared = mvpfx.prepare(model, config(), example_inputs=batch)
    assert list(mvpfx.graphs(prepared)) == state_of(prepared).regions
    prepared(**batch)
    assert not any(declined(prepared))
    found = mvpfx.graphs(prepared)
    assert list(found) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    calls = [
        str(n.target) for n in found["bert.encoder.layer.0"].graph.nodes if n.op == "call_module"
    ]
    for layer in ("attention.self.query", "attention.self.key", "attention.self.value"):
        assert f"{layer}.weight_mask" in calls
    for layer in ("attention.output.dense", "intermediate.dense", "output.dense"):
        assert f"{layer}.weight_mask" in calls
