"""The comparison with other structured pruners: what each of them leaves, and how exactly."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import peer_models, results_file, structured_peers, structured_table
from benchmarks.peer_models import Case

pytest.importorskip("torch_pruning")
CASES = {case.name: case for case in peer_models.cases()}
PADDED = ["convolutions, batch norm, padded", "residual block, padded, no biases"]
ATTENDING = ["BERT, heads"]
"""Constant values of heads are not handed on to a query that may attend to nothing."""
FOLDED_BY_AO = ["MLP", "FFN with its norm and shortcut", "convolutions"]


@pytest.mark.parametrize("name", [n for n in CASES if n not in PADDED + ATTENDING])
def test_as_much_goes_as_with_a_peer_and_the_function_stays(name: str) -> None:
    row = structured_peers.compare(CASES[name], silent=False)
    ours, peer = row["mvpfx"], row["torch_pruning"]
    assert ours["parameters"] == peer["parameters"] < row["parameters"]
    assert ours["difference"] <= 1e-5
    assert ours["left"] == []
    assert peer["difference"] > 1e-3  # it drops the constants
    assert ("parameters" in row["torch_ao"]) == (name in FOLDED_BY_AO)
    if name in FOLDED_BY_AO:
        assert row["torch_ao"]["parameters"] == ours["parameters"]
        assert row["torch_ao"]["difference"] <= 1e-5


@pytest.mark.parametrize(
    ("name", "left"),
    [
        (PADDED[0], "0.weight: 4 of 16 rows"),
        (PADDED[1], "conv1.weight: 10 of 32 rows"),
    ],
)
def test_constants_beside_padding_stay_and_the_reason_is_told(name: str, left: str) -> None:
    row = structured_peers.compare(CASES[name], silent=False)
    reason = "they are constant, not zero, and padding puts zeros beside them"
    assert row["mvpfx"]["left"] == [f"{left} are zero, but {reason}"]
    assert row["torch_pruning"]["parameters"] < row["mvpfx"]["parameters"] < row["parameters"]
    assert row["torch_pruning"]["difference"] > 1e-3


@pytest.mark.parametrize("name", ATTENDING)
def test_constant_values_of_heads_stay_and_the_reason_is_told(name: str) -> None:
    row = structured_peers.compare(CASES[name], silent=False)
    reason = "a query that may attend to nothing gets 0, not their constant values"
    assert sum(reason in line for line in row["mvpfx"]["left"]) == 4
    assert row["torch_pruning"]["parameters"] < row["mvpfx"]["parameters"] == row["parameters"]
    assert row["torch_pruning"]["difference"] > 1e-3


@pytest.mark.parametrize("name", list(CASES))
def test_all_agree_where_dead_channels_hand_on_zeros(name: str) -> None:
    row = structured_peers.compare(CASES[name], silent=True)
    able = [row[key] for key in structured_peers.PEERS if "cannot" not in row[key]]
    assert len(able) == 1 + (name in FOLDED_BY_AO)
    assert {answer["parameters"] for answer in able} == {row["mvpfx"]["parameters"]}
    assert max(answer["difference"] for answer in [row["mvpfx"], *able]) <= 1e-5


def test_a_conversion_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(masked: nn.Module, case: Case) -> nn.Module:
        return peer_models.build(case, silent=False, seed=1)

    monkeypatch.setattr(structured_peers, "by_mvpfx", wrong)
    message = (
        r"MLP: the converted model's outputs differ from the masked one's by \d\.\de\+00 of the "
        r"largest; at most 1e-05 was to be expected"
    )
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        structured_peers.compare(CASES["MLP"], silent=False)


def test_a_peers_error_is_its_answer() -> None:
    def refuse(masked: nn.Module, case: Case) -> nn.Module:
        raise NotImplementedError("not\n  this one")

    case = CASES["MLP"]
    found = structured_peers.attempt(refuse, peer_models.build(case, silent=False), case)
    assert found == {"cannot": "NotImplementedError: not this one"}


@pytest.mark.slow
def test_the_committed_results_are_what_runs_now(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    structured_peers.main(["--output", str(tmp_path / "peers.json")])
    (now,) = results_file.read_all(tmp_path)
    committed = json.loads((results_file.FOLDER / "structured_peers.json").read_text())
    assert [_counts(row) for row in now["rows"]] == [_counts(row) for row in committed["rows"]]
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"\| MLP +\| constants +\| 3,333 +\| 1,157 +\| \de-0\d +\| 1,157 ", lines[2])
    assert lines[-1] == (
        "- torch.ao.pruning cannot (BERT, FFN units; BERT, heads): "
        f"`{now['rows'][-1]['torch_ao']['cannot']}`"
    )


def _counts(row: dict[str, Any]) -> tuple[Any, ...]:
    kept = [row[key].get("parameters") for key in ("mvpfx", *structured_peers.PEERS)]
    return row["case"], row["silent"], row["parameters"], *kept, row["mvpfx"]["left"]


def test_reasons_are_told_once_without_the_text_of_modules() -> None:
    error = "Exception: Error: Conv2d( 3, (3, 3) ) still contains masks!"
    row: dict[str, Any] = {
        "case": "A",
        "mvpfx": {"parameters": 1, "difference": 0.0, "left": ["0.weight: needed"]},
        "torch_pruning": {"parameters": 1, "difference": 0.0},
        "torch_ao": {"cannot": error},
    }
    assert structured_table.notes([row, {**row, "case": "B"}]) == [
        "mvpfx keeps (A; B): `0.weight: needed`",
        "torch.ao.pruning cannot (A; B): `Exception: Error: Conv2d(...) still contains masks!`",
    ]
    assert structured_table.peers([]) == "No result file yet."


def test_silence_is_silent() -> None:
    case = CASES["residual block, inner channels"]
    model = peer_models.build(case, silent=True)
    seen: list[torch.Tensor] = []

    def see(module: nn.Module, inputs: Any, out: Any) -> None:
        seen.append(out)

    model.get_submodule("norm1").register_forward_hook(see)
    structured_peers.outputs(model, case.batch)
    channels = case.zeroed["conv1"]
    assert torch.count_nonzero(seen[0][:, channels]) == 0
    assert torch.count_nonzero(seen[0]) == seen[0].numel() // 2
