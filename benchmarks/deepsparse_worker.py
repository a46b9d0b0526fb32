"""deepsparse in a process of its own, run by the python of an environment that has it.

Driven over stdin and stdout, a JSON object a line each way, started by `deepsparse_engine`:

    {"do": "version"}                               {"version": "1.8.0"}
    {"do": "load", "model": "model.onnx", "inputs": "inputs.npz", "outputs": "outputs.npy",
     "batch": 1, "threads": 1}                      {"outputs": "outputs.npy"}
    {"do": "turn"}                                  {"ms": 51.2}

`load` writes the first output on the inputs, `turn` calls twice and times the second. An error is
answered with {"error": "ValueError: ..."}; the end of stdin ends the process.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any

# What deepsparse prints, when it is imported or called, must not get among the replies.
REPLIES = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
# The folder of this script has files that are called as packages are, `coverage.py` for one.
sys.path = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
deepsparse: Any = importlib.import_module("deepsparse")
np: Any = importlib.import_module("numpy")


class Answers:
    """What the requests ask for, each by the method of its name."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.inputs: list[Any] = []

    def version(self) -> dict[str, Any]:
        """The version of deepsparse."""
        return {"version": deepsparse.__version__}

    def load(
        self, model: str, inputs: str, outputs: str, batch: int, threads: int
    ) -> dict[str, Any]:
        """Compile a model and run it once."""
        self.engine = deepsparse.compile_model(model, batch_size=batch, num_cores=threads)
        arrays = np.load(inputs)
        self.inputs = [arrays[name] for name in self.engine.input_names]
        np.save(outputs, self.engine.run(self.inputs)[0])
        return {"outputs": outputs}

    def turn(self) -> dict[str, Any]:
        """One call that does not count, and one that does."""
        self.engine.run(self.inputs)
        start = time.perf_counter()
        self.engine.run(self.inputs)
        return {"ms": 1000 * (time.perf_counter() - start)}


def main() -> None:
    """Answer until there are no more requests."""
    answers = Answers()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(answers, request.pop("do"))(**request)
        except Exception as error:  # noqa: BLE001 - whoever asked is told, whatever it is
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=REPLIES, flush=True)


if __name__ == "__main__":
    main()
