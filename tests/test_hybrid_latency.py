"""The benchmark of structured latency: what it zeroes, counts and bounds; a tiny run of it."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mvpfx
from benchmarks import hybrid_latency, results_file, structured_table
from benchmarks.hybrid_latency import LinearsAlone, Shape
from benchmarks.measure import Quartiles
from mvpfx.storage import SparseLinear

TINY = Shape(layers=3, hidden=64, heads=4, ffn=96, vocabulary=99, sequence=8, block=8)


def test_the_zeros_are_those_of_hybrid_pruning() -> None:
    dense = hybrid_latency.dense_bert(TINY)
    model: Any = hybrid_latency.hybrid(dense, TINY, 0.25)
    heads = 0
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        parts = [attention.query, attention.key, attention.value]
        live = [part.weight.view(4, -1).count_nonzero(1) > 0 for part in parts]
        live.append(layer.attention.output.dense.weight.t().reshape(4, -1).count_nonzero(1) > 0)
        assert all(torch.equal(live[0], other) for other in live)
        for part in parts:
            tiles = part.weight.view(8, 8, 8, 8).transpose(1, 2).reshape(64, 64)
            nonzero = tiles.count_nonzero(1)
            assert set(nonzero.tolist()) <= {0, 64}
            assert int((nonzero > 0).sum()) == round(0.5 * 64 * int(live[0].sum()) / 4)
        heads += int(live[0].sum())
        up, down = layer.intermediate.dense.weight, layer.output.dense.weight
        assert torch.equal(up.count_nonzero(1) > 0, down.count_nonzero(0) > 0)
        assert bool((layer.intermediate.dense.bias != 0).all())
    assert heads == 6  # sqrt(0.25) of 12
    widths = [
        int((la.intermediate.dense.weight.count_nonzero(1) > 0).sum())
        for la in model.bert.encoder.layer
    ]
    assert sorted(widths) == [12, 24, 36]  # 0.5, 1 and 1.5 times a quarter of 96
    assert (
        hybrid_latency.stored(model)
        == hybrid_latency.stored(dense)
        == 3 * (4 * 64**2 + 2 * 64 * 96)
    )
    nonzero = hybrid_latency.stored(model, nonzero=True)
    assert nonzero / hybrid_latency.stored(dense) == pytest.approx(0.25)


def test_what_is_stored_counts_however_it_is_stored() -> None:
    dense = hybrid_latency.dense_bert(TINY)
    masked = hybrid_latency.hybrid(dense, TINY, 0.25)
    batch = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
    reduced = mvpfx.convert(masked, example_inputs=batch, lowering="dense")
    sparse = mvpfx.convert(masked, example_inputs=batch, lowering="csr")
    kept = sum(
        m.weight.numel()
        for m in hybrid_latency.linears(reduced).values()
        if isinstance(m, nn.Linear)
    )
    assert hybrid_latency.stored(reduced) == kept < hybrid_latency.stored(dense)
    assert all(isinstance(m, SparseLinear) for m in hybrid_latency.linears(sparse).values())
    assert hybrid_latency.stored(sparse) == hybrid_latency.stored(masked, nonzero=True)


def test_a_converted_model_runs_what_the_dense_one_runs_and_nothing_else() -> None:
    dense = hybrid_latency.dense_bert(TINY)
    batch = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
    masked = hybrid_latency.hybrid(dense, TINY, 0.25)
    small = mvpfx.convert(masked, example_inputs=batch, lowering="dense")
    assert _operations(small, batch) == _operations(dense, batch)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())


@torch.no_grad()
def _operations(model: nn.Module, batch: dict[str, torch.Tensor]) -> Counter[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(**batch)
    # With one head left a reshape finds its elements in order: a view takes the alias's place.
    aliases = ("aten::view", "aten::_reshape_alias")
    return Counter(event.name for event in profile.events() or () if event.name not in aliases)


def test_linears_alone_are_the_models_own_each_called_once() -> None:
    dense = hybrid_latency.dense_bert(TINY)
    alone = LinearsAlone(dense, batch=2, sequence=8)
    calls: list[tuple[nn.Module, tuple[int, ...]]] = []
    for layer in alone.linears:
        layer.register_forward_hook(lambda m, x, _out: calls.append((m, tuple(x[0].shape))))
    alone(input_ids=torch.zeros(2, 8, dtype=torch.long))
    own = [m for m in dense.get_submodule("bert.encoder").modules() if isinstance(m, nn.Linear)]
    assert [module for module, _ in calls] == own
    assert [shape for _, shape in calls] == [(2, 8, layer.in_features) for layer in own]


def test_the_bound_is_time_outside_linears_and_their_share_of_the_rest() -> None:
    def around(median: float) -> Quartiles:
        return Quartiles(median - 1, median, median + 1)

    times = {"dense": around(100), "dense, linears": around(80)}
    times |= {"0.5": around(66), "0.5, linears": around(50)}
    found = hybrid_latency.against_bound(times, "0.5", density=0.5)
    assert found["bound_ms"] == 60
    assert found["latency_over_bound"] == pytest.approx(1.1)
    assert found["faster"] == pytest.approx(100 / 66)


def test_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--layers 2 --hidden 64 --heads 4 --ffn 96 --vocabulary 99 --sequence 8 --block 8"
    rest = "--density 0.25 --rounds 3 --multiple-of 16"
    output = tmp_path / "hybrid.json"
    hybrid_latency.main([*sizes.split(), *rest.split(), "--output", str(output)])
    (result,) = results_file.read_all(tmp_path)
    assert [(case["dtype"], case["batch"]) for case in result["cases"]] == [
        ("fp32", 1),
        ("bf16", 1),
    ]
    for case in result["cases"]:
        (row,) = case["converted"]
        assert sorted(row["ffn_widths"]) == [16, 48]  # 12 and 36, rounded up
        assert row["linear_density_nonzero"] == pytest.approx(0.25)
        assert 0.25 < row["linear_density_stored"] < 0.5
        assert row["largest_output_difference"] <= (1e-4 if case["dtype"] == "fp32" else 0.1)
        assert row["latency_ms"]["q1"] > row["linears_ms"]["q1"] > 0
    assert result["environment"]["threads"] == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:3] for line in lines[2:4]] == [
        [" fp32    ", " 1       "],
        [" bf16    ", " 1       "],
    ]
    assert structured_table.latency([]) == "No result file yet."
