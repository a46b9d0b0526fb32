import copy
import re

import pytest
import torch
from torch import nn

import mvpfx
from mvpfx.explanation import decisions_text
from mvpfx.pipeline import Decision
from mvpfx.report import Row, converted_table
from tests.graphs import mlp, zero_

X = torch.linspace(-2, 2, 20).view(5, 4)


def test_converted_table_with_and_without_times() -> None:
    rows = [
        Row("a.weight", (8, 4), (4, 4), "row", 16, 32, "reduced", 128, 64),
        Row("b.weight", (3, 8), (3, 8), "element", 6, 24, "csr", 96, 64, 5, 0.5, 0.25),
    ]
    assert converted_table(rows[:1]) == (
        "site      shape           granularity      density    kept / total  storage      "
        "bytes before    bytes after\n"
        "--------  --------------  -------------  ---------  --------------  ---------  "
        "--------------  -------------\n"
        "a.weight  8 x 4 -> 4 x 4  row               0.5000         16 / 32  reduced    "
        "           128             64\n"
        "total                                       0.5000         16 / 32             "
        "           128             64"
    )
    last = converted_table(rows).splitlines()[-1].split()
    assert last == ["total", "0.3929", "22", "/", "56", "224", "128", "0.500", "0.250"]


def test_decisions_are_grouped_by_site() -> None:
    decisions = [
        Decision("a", "fold mask", True, "density 0.5"),
        Decision("b", "fold mask", False, "read twice"),
        Decision("a", "store as csr", True, "asked for"),
    ]
    assert decisions_text(decisions) == (
        "a\n  + fold mask: density 0.5\n  + store as csr: asked for\nb\n  - fold mask: read twice"
    )


def test_a_prepared_model_shows_current_and_target_density() -> None:
    model = mlp(nn.ReLU())
    mvpfx.prepare(model, mvpfx.PruningConfig(density=0.25))
    scheduler = mvpfx.SparsityScheduler(model, total_steps=4)
    assert mvpfx.sparsity_table(model).splitlines()[2].split() == (
        ["0.weight", "8", "x", "4", "element", "1.0000", "1.0000", "0.2500", "32", "/", "32"]
    )
    while scheduler.step_count < 4:
        scheduler.step()
    assert mvpfx.sparsity_table(model).splitlines()[-1].split() == [
        "total",
        "0.2500",
        "14",
        "/",
        "56",
    ]


def test_a_prepared_model_with_a_threshold_shows_it() -> None:
    model = mlp(nn.ReLU())
    config = mvpfx.PruningConfig(criterion="soft_movement", threshold=0.1, penalty_lambda=5.0)
    mvpfx.prepare(model, config)
    assert "tau 0.1000" in mvpfx.sparsity_table(model)


def test_a_converted_model_explains_itself() -> None:
    model = mlp(nn.ReLU())
    zero_(model.get_parameter("0.weight")[:4])
    small = mvpfx.convert(model, example_inputs=X, lowering="dense")
    line = mvpfx.sparsity_table(small).splitlines()[2]
    assert line.split()[:7] == ["0.weight", "8", "x", "4", "->", "4", "x"]
    text = mvpfx.explain(small)
    assert "+ remove dead channels: 8 x 4 -> 4 x 4" in text
    assert "Largest output difference, masked vs converted: " in text


def test_a_layer_that_was_not_pruned_is_not_part_of_the_total_density() -> None:
    layers = [nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 512)]
    model, x = nn.Sequential(*layers), torch.randn(4, 32)
    config = mvpfx.PruningConfig(criterion="magnitude", density=0.25, overrides={"4": None})
    mvpfx.prepare(model, config, example_inputs=x)
    scheduler = mvpfx.SparsityScheduler(model, total_steps=1)
    scheduler.step()
    before = mvpfx.sparsity_table(model).splitlines()[-1].split()
    for lowering in ("native", "csr", "dense"):
        small = mvpfx.convert(copy.deepcopy(model).eval(), example_inputs=x, lowering=lowering)
        total = mvpfx.sparsity_table(small).splitlines()[-1].split()
        assert total[:5] == before[:5] == ["total", "0.2500", "1,536", "/", "6,144"]


def test_nothing_gained_is_said() -> None:
    small = mvpfx.convert(mlp(nn.ReLU()), example_inputs=X)
    assert "Nothing was gained: no site became smaller." in mvpfx.explain(small)


@pytest.mark.parametrize("show", [mvpfx.sparsity_table, mvpfx.explain])
def test_a_plain_model_is_an_error(show: object) -> None:
    message = (
        "Linear is neither prepared nor converted. "
        "Call mvpfx.prepare(model) before fine-tuning, or mvpfx.convert(model) for deployment."
    )
    assert callable(show)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        show(nn.Linear(2, 2))
