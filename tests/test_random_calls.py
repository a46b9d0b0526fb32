"""Random calls of the zoo, and that the comparison sees what it must see."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import random_calls as benchmark
from tests import random_calls
from tests.random_calls import Call, NotApplicableError, differences, run
from tests.zoo import ZOO

CALLS = 3
FAST = [(name, "element") for name in ("BERT", "Llama", "convolutions", "tied weights")]
SLOW = [
    *((name, "hybrid") for name in ("BERT", "Llama", "convolutions")),
    *((name, "element") for name in ("T5", "Mixtral", "nn.TransformerEncoder", "ALBERT", "GPT-2")),
    *((name, "head") for name in ("BERT", "T5")),
]
"""Of all models and granularities: `python -m benchmarks.random_calls`."""


@pytest.mark.parametrize("way", random_calls.WAYS)
@pytest.mark.parametrize(
    ("model", "granularity"), [*FAST, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW)]
)
def test_random_calls_agree(model: str, granularity: str, way: str) -> None:
    try:
        tally = random_calls.check(ZOO[model], granularity, way, seed=1, calls=CALLS)
    except NotApplicableError as reason:
        pytest.skip(str(reason))
    assert tally.calls == CALLS
    assert tally.wrong == []
    assert tally.raised == []


class Changed(nn.Module):
    """A model that does to its output what it is told."""

    def __init__(self, inner: nn.Module, change: str) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x: torch.Tensor) -> object:
        out: torch.Tensor = self.inner(x)
        if self.change == "values":
            return out + 1
        if self.change == "shape":
            return out[..., :1]
        if self.change == "dtype":
            return out.double()
        if self.change == "twice":
            return out, out
        raise IndexError(self.change)


@pytest.mark.parametrize("change", ["values", "shape", "dtype", "twice", "exception"])
def test_faults_are_seen(change: str) -> None:
    entry = ZOO["matmul, mm, linear"]
    model = entry.model()
    tally = run(entry, model, Changed(copy.deepcopy(model), change), seed=0, calls=6)
    assert tally.calls == 6
    compared = tally.calls - tally.refused
    faults = tally.raised if change == "exception" else tally.wrong
    assert compared > 0 and len(faults) >= compared


def test_a_model_agrees_with_its_copy() -> None:
    entry = ZOO["BERT"]
    model = entry.model()
    tally = run(entry, model, copy.deepcopy(model), seed=0, calls=20, training=True)
    assert (tally.calls, tally.wrong, tally.raised) == (20, [], [])
    assert tally.refused < 5


def test_nan_equals_nan_and_nothing_else() -> None:
    value = torch.tensor([1.0, float("nan")])
    assert list(differences(value, value.clone(), Call({}))) == []
    assert list(differences(value, torch.tensor([1.0, 2.0]), Call({}))) != []


def test_the_command_prints_seeds_and_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    chosen = ["--only", "matmul, mm, linear", "--granularities", "element", "head"]
    benchmark.main([*chosen, "--calls", "2", "--seed", "3", "--output", str(path)])
    printed = capsys.readouterr().out
    assert "seed 3, 2 calls of each model in each way" in printed
    assert "prepared: models 1, calls 2," in printed
    rows = json.loads(path.read_text())["rows"]
    assert [row["calls"] for row in rows] == [2, 2, 2, 0, 0, 0]
    assert "not_prepared" in rows[-1]
