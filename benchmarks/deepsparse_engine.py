"""deepsparse as one engine among others, though it needs an environment of its own.

deepsparse 1.8, the last one, wants numpy < 2 and onnx < 1.17. So a worker process, run by the
python of such an environment, holds the engine, and is asked for each turn when it is due.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SCRIPT = Path(__file__).parent / "deepsparse_worker.py"


class Worker:
    """A process that answers requests, a JSON object a line.

    Attributes:
        process: ends when this is closed, or used as a context manager.
    """

    def __init__(self, python: Path, script: Path = SCRIPT) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "stderr.txt"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [str(python), str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """Ask for something and wait for the answer.

        Raises:
            RuntimeError: the worker answers with an error, or has ended; says what it wrote.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **more}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.process.wait()
            raise RuntimeError(
                f"the deepsparse worker ended with status {status} when it was asked for {do!r}. "
                f"It wrote:\n{self._written()}"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(
                f"the deepsparse worker failed when it was asked for {do!r}: {answer['error']}"
            )
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended before, and `ask` has said so
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self._folder.cleanup()

    def _written(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace").strip() or "nothing"


class DeepsparseEngine:
    """A model in a worker.

    Attributes:
        details: nothing to add to the result.
    """

    def __init__(
        self,
        python: Path,
        model: Path,
        tensors: dict[str, Tensor],
        threads: int,
    ) -> None:
        """Load the model.

        Args:
            python: of an environment with deepsparse.
            model: an ONNX file; other files are written beside it.
            tensors: what the model is called with, by the names of its inputs; the first dimension
                is the batch.
            threads: of the engine. The worker runs on the cores that this process may use.

        Raises:
            RuntimeError: the worker cannot.
        """
        self.details: dict[str, Any] = {}
        inputs, outputs = model.parent / "inputs.npz", model.parent / "outputs.npy"
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        np.savez(inputs, **arrays)
        self._worker = Worker(python)
        try:
            files = {"model": str(model), "inputs": str(inputs), "outputs": str(outputs)}
            batch = len(next(iter(tensors.values())))
            self._worker.ask("load", **files, batch=batch, threads=threads)
        except BaseException:
            self.close()
            raise
        self._output = torch.from_numpy(np.load(outputs))

    def output(self) -> Tensor:
        """What the first call returned."""
        return self._output

    def turn(self) -> float:
        """Milliseconds of the second of two calls."""
        return self._worker.ask("turn")["ms"]

    def close(self) -> None:
        """End the worker."""
        self._worker.close()


def deepsparse_version(python: Path) -> str:
    """The version of deepsparse that a worker finds.

    Raises:
        RuntimeError: it finds none.
    """
    with Worker(python) as worker:
        return worker.ask("version")["version"]
