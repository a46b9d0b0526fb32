"""deepsparse's worker: what it answers, and what is told when it fails or dies.

The worker is the real one; the deepsparse that it imports is a file of this test.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.deepsparse_engine import DeepsparseEngine, Worker, deepsparse_version

PYTHON = Path(sys.executable)
DOUBLING = """
__version__ = "0.1"
print("a banner, on stdout")

class Engine:
    input_names = ["b", "a"]
    def __init__(self, batch_size, num_cores):
        self.factor = batch_size * 10 + num_cores
    def run(self, arrays):
        print("more of it")
        b, a = arrays
        return [self.factor * (a - b)]

def compile_model(path, batch_size, num_cores):
    if not path.endswith("model.onnx"):
        raise ValueError(f"{path}:\\nno such model")
    return Engine(batch_size, num_cores)
"""
DYING = """
import os, sys
__version__ = "0.1"

def compile_model(path, batch_size, num_cores):
    print("an instruction that is not there", file=sys.stderr, flush=True)
    os._exit(4)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that workers import as deepsparse."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = tmp_path / "deepsparse.py"
    path.write_text(DOUBLING)
    return path


def batch() -> dict[str, Tensor]:
    return {"a": torch.arange(6).view(2, 3), "b": torch.ones(2, 3, dtype=torch.long)}


def test_a_model_runs_in_a_worker(fake: Path) -> None:
    engine = DeepsparseEngine(PYTHON, fake.parent / "model.onnx", batch(), threads=1)
    wanted = 21 * (torch.arange(6).view(2, 3) - 1)  # batch 2, 1 thread; inputs by their names
    assert torch.equal(engine.output(), wanted)
    assert 0 <= engine.turn() < 1000 and 0 <= engine.turn() < 1000
    assert engine.details == {}
    engine.close()
    assert engine._worker.process.returncode == 0
    assert deepsparse_version(PYTHON) == "0.1"


def test_an_error_is_answered_and_the_worker_goes_on(fake: Path) -> None:
    path = fake.parent / "inputs.npz"
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in batch().items()}
    np.savez(path, **arrays)
    message = (
        "the deepsparse worker failed when it was asked for 'load': "
        "ValueError: elsewhere:\nno such model"
    )
    outputs = str(fake.parent / "outputs.npy")
    rest = {"inputs": str(path), "outputs": outputs, "batch": 2, "threads": 1}
    with Worker(PYTHON) as worker:
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            worker.ask("load", model="elsewhere", **rest)
        worker.ask("load", model="model.onnx", **rest)
        assert list(worker.ask("turn")) == ["ms"]
    assert worker.process.returncode == 0


def test_a_worker_that_dies_is_told_with_what_it_wrote(fake: Path) -> None:
    fake.write_text(DYING)
    message = (
        "the deepsparse worker ended with status 4 when it was asked for 'load'. "
        "It wrote:\nan instruction that is not there"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        DeepsparseEngine(PYTHON, fake.parent / "model.onnx", batch(), threads=1)


def test_a_worker_that_is_gone_is_told_too(fake: Path) -> None:
    with Worker(PYTHON) as worker:
        assert worker.ask("version") == {"version": "0.1"}
        worker.process.kill()
        worker.process.wait()
        message = (
            "the deepsparse worker ended with status -9 when it was asked for 'turn'. It wrote:\n"
            "a banner, on stdout"
        )
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            worker.ask("turn")


def test_an_environment_without_deepsparse_is_told(fake: Path) -> None:
    fake.write_text("raise ImportError('numpy 2 is too new')\n")
    message = (
        r"the deepsparse worker ended with status 1 when it was asked for 'version'\. It wrote:\n"
        r"Traceback \(most recent call last\):\n(.*\n)+ImportError: numpy 2 is too new"
    )
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        deepsparse_version(PYTHON)
