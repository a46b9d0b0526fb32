"""Find sites: which weights, by which rule."""

from __future__ import annotations

import mvpfx
from mvpfx.passes.capture import Capture
from mvpfx.passes.find_sites import FindSites
from mvpfx.pipeline import run
from mvpfx.program import Program
from tests.models import build


def found(name: str, config: mvpfx.PruningConfig) -> tuple[Program, list[str]]:
    model, batch = build(name)
    program, records = run((Capture(batch), FindSites(config)), Program(model))
    return program, [str(decision) for decision in records[-1].decisions]


def test_functional_matmuls_of_every_form() -> None:
    program, _ = found("functional_mlp", mvpfx.PruningConfig())
    dims = {site.name: site.out_dim for site in program.sites.values()}
    assert dims == {
        "up": 1,
        "down": 0,
        "mix": 1,
        "flipped": 0,
        "bank": 2,
        "layers.0": 1,
        "layers.1": 1,
    }


def test_tied_weight_is_one_site_named_by_its_matmul() -> None:
    program, decisions = found("tied", mvpfx.PruningConfig())
    assert list(program.sites) == ["hidden.weight", "out.weight"]
    assert program.sites["out.weight"].aliases == ("embedding.weight",)
    assert decisions[-1].endswith("tied to embedding.weight")


def test_base_model_blocks_by_default_and_overrides_add_and_remove() -> None:
    program, decisions = found("bert", mvpfx.PruningConfig())
    assert len(program.sites) == 12
    assert "- classifier.weight: site: outside the repeated blocks of the base model" in decisions
    overrides = {"classifier": {"density": 0.5}, "re:.*attention.*": None}
    program, decisions = found("bert", mvpfx.PruningConfig(overrides=overrides))
    assert len(program.sites) == 5
    assert program.rules["classifier.weight"].density == 0.5
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert f"- {query}: site: an override leaves it alone" in decisions


def test_convert_keeps_every_weight() -> None:
    model, batch = build("bert")
    program, records = run((Capture(batch), FindSites()), Program(model))
    assert len(program.sites) == 14
    assert not records[-1].decisions
