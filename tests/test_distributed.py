"""DDP and FSDP2: the same masks on every rank at every step, and those of a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed_cases import resume_halfway, save_halfway, special_cases
from tests.distributed_worker import Run, launch, make, rows, train_cases

MODELS: list[dict[str, Any]] = [
    {"name": "bert"},
    {"name": "bert", "scope": "global"},
    {"name": "bert", "granularity": (4, 8), "scope": "global"},
    {"name": "odd", "scope": "global"},
    {"name": "odd", "granularity": "row", "scope": "global"},
    {"name": "odd", "granularity": "column"},
    {"name": "bert", "criterion": "magnitude", "scope": "global"},
    {"name": "odd", "criterion": "magnitude"},
    {"name": "odd", "criterion": "soft_movement", "threshold": 0.7, "penalty_lambda": 3.0},
    {"name": "bert", "criterion": "platon", "scope": "global"},
    {"name": "odd", "criterion": "saliency"},
    {"name": "odd", "criterion": "ema_magnitude", "scope": "global"},
    {"name": "bert", "granularity": "2:4", "density": 0.5},
    {"name": "llama", "scope": "global"},
]
ENGINES = ["ddp", "fsdp", "fsdp_kept"]
RUNS: list[tuple[str, dict[str, Any]]] = [
    *((engine, model) for engine in ENGINES for model in MODELS if model["name"] == "odd"),
    ("ddp", {"name": "odd", "criterion": "second_order", "scope": "global"}),
    ("ddp", {"name": "odd", "criterion_options": {"accumulate": 1}, "scope": "global"}),
    ("fsdp", {"name": "bert", "scope": "global"}),
    ("ddp", {"name": "bert", "granularity": "2:4", "density": 0.5}),
    ("fsdp_kept", {"name": "llama", "scope": "global"}),
]
SLOW: list[tuple[str, dict[str, Any]]] = [
    *((engine, model) for engine in ENGINES for model in MODELS if (engine, model) not in RUNS),
    ("ddp", {"name": "bert", "criterion_options": {"accumulate": 1}}),
]
Results = dict[tuple[str, str], list[dict[str, Any]]]


def single(model: dict[str, Any], parts: int) -> Run:
    """The run of one process, whose batch comes in `parts` that accumulate."""
    prepared, batch = make(**model)
    size = len(next(iter(batch.values()))) // parts
    halves = [rows(batch, i * size, (i + 1) * size) for i in range(parts)]
    return Run(prepared, "plain", None).advance(halves)


def results_of(runs: list[tuple[str, dict[str, Any]]]) -> Results:
    """Results of both ranks by engine and model."""
    cases: list[dict[str, Any]] = [{"model": model, "engine": engine} for engine, model in runs]
    results = launch(2, train_cases, cases)
    return {
        (case["engine"], str(case["model"])): [result[i] for result in results]
        for i, case in enumerate(cases)
    }


@pytest.fixture(scope="module")
def ranks() -> Results:
    return results_of(RUNS)


@pytest.fixture(scope="module")
def more_ranks() -> Results:
    return results_of(SLOW)


@pytest.mark.parametrize(("engine", "model"), RUNS, ids=str)
def test_ranks_agree_with_one_another_and_with_one_process(
    ranks: Results, engine: str, model: dict[str, Any]
) -> None:
    assert_agree(ranks[engine, str(model)], model)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "model"), SLOW, ids=str)
def test_ranks_of_larger_models_agree(
    more_ranks: Results, engine: str, model: dict[str, Any]
) -> None:
    assert_agree(more_ranks[engine, str(model)], model)


def assert_agree(results: list[dict[str, Any]], model: dict[str, Any]) -> None:
    first, second = results
    assert first["prints"] == second["prints"]
    assert len(set(first["prints"])) > 2, "the masks did not move"
    wanted = single(model, parts=2)
    assert first["prints"] == wanted.prints
    assert [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)] == (
        pytest.approx(wanted.losses, rel=1e-6)
    )


@pytest.mark.slow
def test_ranks_keep_what_one_process_keeps_on_the_whole_batch() -> None:
    models: list[dict[str, Any]] = [{"name": "bert", "scope": "global"}, {"name": "llama"}]
    models = [model | {"dtype": torch.float64} for model in models]
    cases: list[dict[str, Any]] = [
        {"model": model, "engine": engine} for model in models for engine in ("ddp", "fsdp")
    ]
    for case, result in zip(cases, launch(2, train_cases, cases)[0], strict=True):
        assert result["prints"] == single(case["model"], parts=1).prints, case


@pytest.mark.slow
def test_four_ranks_rank_more_shards_than_rows() -> None:
    model = {"name": "odd", "scope": "global", "granularity": "row"}
    small = {**model, "batch": 4}
    results = launch(4, train_cases, [{"model": small, "engine": "fsdp"}])
    assert len({str(result[0]["prints"]) for result in results}) == 1
    assert results[0][0]["prints"] == single(small, parts=4).prints


@pytest.fixture(scope="module")
def odds() -> list[dict[str, Any]]:
    """What both ranks found in the special cases."""
    return launch(2, special_cases)


def test_a_forward_sees_scores_that_changed_in_the_shards(odds: list[dict[str, Any]]) -> None:
    for found in odds:
        assert found["stale"] == [], found["stale"]


def test_mixed_precision_keeps_scores_in_float32(odds: list[dict[str, Any]]) -> None:
    assert odds[0]["bf16 prints"] == odds[1]["bf16 prints"]
    assert odds[0]["bf16 dtypes"] == {"torch.float32"}
    message = (
        "the scores of bert.encoder.layer.0.attention.self.query.weight are bfloat16, and only "
        "float32 ranks them exactly. Leave them out of what casts parameters; for fully_shard with "
        "a mixed precision policy call mvpfx.distributed.shard_scores(block, mesh=mesh) before "
        "fully_shard(block, ...)."
    )
    assert odds[0]["bf16 error"] == message


def test_blocks_run_as_graphs_and_tables_read_shards(odds: list[dict[str, Any]]) -> None:
    for found in odds:
        assert found["declined"] == {}
        assert found["table"] == found["whole table"]


def test_a_sharded_model_is_neither_prepared_nor_converted(odds: list[dict[str, Any]]) -> None:
    assert odds[0]["prepare error"] == (
        "layers.0.weight is sharded over ranks already, and scores start from the whole weight. "
        "Call mvpfx.prepare before fully_shard."
    )
    assert odds[0]["convert error"].startswith(
        "layers.0.weight is sharded over ranks, and a converted model is whole. Gather the state "
    )
    assert odds[0]["policy error"].startswith(
        "scores are ranked in float32, so shard_scores takes no mp_policy; found "
    )
    assert odds[0]["no scores error"] == (
        "Linear has no scores to shard. Call mvpfx.prepare(model) first, and shard_scores for "
        "blocks that hold sites whose criterion stores scores."
    )


def test_the_gathered_state_converts(odds: list[dict[str, Any]]) -> None:
    assert odds[0]["converted difference"] <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [(2, 1), (1, 2)], ids=str)
def test_a_checkpoint_goes_on_with_another_number_of_ranks(
    tmp_path: Path, worlds: tuple[int, int]
) -> None:
    saved = launch(worlds[0], save_halfway, str(tmp_path))
    resumed = launch(worlds[1], resume_halfway, str(tmp_path))
    assert resumed[0]["print at start"] == saved[0]["print when saved"]
    assert resumed[-1]["prints"] == saved[0]["prints"]
    assert resumed[0]["prints"] == saved[-1]["prints"]
