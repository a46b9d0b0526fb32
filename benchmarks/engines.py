"""What runs a model on a CPU: mvpfx, torch, torch.compile, onnxruntime, OpenVINO and deepsparse.

All get the same weights, the same batch and as many threads. The three that read ONNX share a
file: opset 14, which deepsparse can read, attention written out. In each of the three such a file
ran as fast as, or faster than, one of the newest opset with `scaled_dot_product_attention`.
"""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import copy
import importlib.util
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import mvpfx
from benchmarks.deepsparse_engine import DeepsparseEngine

REFERENCE = "torch"
"""The engine that others are compared with."""
OPSET = 14


class Engine(Protocol):
    """A model that is ready to run."""

    @property
    def details(self) -> dict[str, Any]:
        """What else belongs into the result."""
        ...

    def output(self) -> Tensor:
        """Scores of the batch, in float32."""
        ...

    def turn(self) -> float:
        """Call twice; milliseconds of the second call, which finds caches as this engine left
        them, and not the threads of another that still spin.
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


@dataclass(frozen=True)
class Task:
    """What every engine of a cell runs.

    Attributes:
        model: with its zeros, in the dtype, in eval mode.
        tensors: what the model is called with, by name.
        settings: what else its forward takes.
        dtype: "fp32" or "bf16".
        threads: of each engine.
        folder: for files, which must last as long as the engines.
        deepsparse_python: of an environment with deepsparse.
    """

    model: nn.Module
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    dtype: str
    threads: int
    folder: Path
    deepsparse_python: Path | None = None

    @property
    def call(self) -> dict[str, Any]:
        """All keyword arguments of the forward."""
        return {**self.tensors, **self.settings}

    @cached_property
    def onnx(self) -> Path:
        """The model in float32 as an ONNX file."""
        path = self.folder / "model.onnx"
        model: Any = copy.deepcopy(self.model).float()
        model.set_attn_implementation("eager")
        names = list(self.tensors)
        wrapped = Positional(model, names, dict(self.settings)).eval()
        with torch.no_grad(), warnings.catch_warnings():
            # That this exporter is an old one is known: the newer one writes opset 18 and above.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                wrapped,
                tuple(self.tensors.values()),
                path,
                dynamo=False,
                opset_version=OPSET,
                input_names=names,
                output_names=["logits"],
            )
        return path


class Positional(nn.Module):
    """A model that takes tensors by position and returns its scores, as exporters want it."""

    def __init__(self, model: nn.Module, names: list[str], settings: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.settings = model, names, settings

    def forward(self, *tensors: Tensor) -> Tensor:
        """The scores."""
        return self.model(**dict(zip(self.names, tensors, strict=True)), **self.settings).logits


@dataclass(frozen=True)
class InProcess:
    """An engine of this process: how it is called, and how its scores are read."""

    call: Callable[[], Any]
    read: Callable[[Any], Tensor]
    details: dict[str, Any] = field(default_factory=dict[str, Any])

    def output(self) -> Tensor:
        """Scores of the batch, in float32."""
        return self.read(self.call()).float()

    def turn(self) -> float:
        """Milliseconds of the second of two calls."""
        self.call()
        start = time.perf_counter()
        self.call()
        return 1000 * (time.perf_counter() - start)

    def close(self) -> None:
        """Nothing to give back."""


def torch_eager(task: Task) -> Engine:
    """The model as it is: zeros are multiplied like any value."""
    return _module(task.model, task)


def torch_compile(task: Task) -> Engine:
    """The model through inductor."""
    torch.compiler.reset()
    return _module(torch.compile(task.model), task)


def by_mvpfx(task: Task) -> Engine:
    """What `convert` makes of the model, with the batch as example."""
    small = mvpfx.convert(task.model, example_inputs=task.call)
    rows = mvpfx.report_of(small).rows
    return _module(small, task, {"storages": dict(Counter(row.storage for row in rows))})


def _module(model: Any, task: Task, details: dict[str, Any] | None = None) -> Engine:
    call = task.call
    return InProcess(lambda: model(**call), lambda found: found.logits, details or {})


def onnxruntime(task: Task) -> Engine:
    """A session on the CPU.

    Raises:
        NotImplementedError: bf16, which its CPU kernels do not take.
    """
    if task.dtype != "fp32":
        raise NotImplementedError(f"its CPU kernels take no {task.dtype}")
    import onnxruntime as runtime

    options: Any = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = task.threads, 1
    # Within a call threads may spin, but not on in the turns of others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session: Any = runtime.InferenceSession(
        str(task.onnx), options, providers=["CPUExecutionProvider"]
    )
    feed = {name: tensor.numpy() for name, tensor in task.tensors.items()}
    feed = {found.name: feed[found.name] for found in session.get_inputs()}
    return InProcess(lambda: session.run(None, feed), lambda found: torch.from_numpy(found[0]))


def openvino(task: Task) -> Engine:
    """A compiled model on the CPU, which computes in the dtype asked for."""
    import openvino as runtime

    settings = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[task.dtype],
        "INFERENCE_NUM_THREADS": task.threads,
        "PERFORMANCE_HINT": "LATENCY",
        # This process is bound to its cores already.
        "ENABLE_CPU_PINNING": False,
    }
    model: Any = runtime.compile_model(task.onnx, "CPU", settings)
    feed = {port.get_any_name(): task.tensors[port.get_any_name()].numpy() for port in model.inputs}
    return InProcess(lambda: model(feed), lambda found: torch.from_numpy(found[0].copy()))


def deepsparse(task: Task) -> Engine:
    """An engine in a worker process.

    Raises:
        NotImplementedError: bf16, which it does not have.
    """
    if task.dtype != "fp32":
        raise NotImplementedError(f"it has no {task.dtype}")
    assert task.deepsparse_python is not None
    return DeepsparseEngine(task.deepsparse_python, task.onnx, dict(task.tensors), task.threads)


ENGINES: dict[str, Callable[[Task], Engine]] = {
    REFERENCE: torch_eager,
    "mvpfx": by_mvpfx,
    "torch.compile": torch_compile,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "deepsparse": deepsparse,
}
OWN = (REFERENCE, "mvpfx")
"""Engines that have to run; of the others an error is their answer."""


def missing(name: str, deepsparse_python: Path | None) -> str | None:
    """Why an engine is left out; None where it can be tried."""
    if name == "deepsparse" and deepsparse_python is None:
        return "no --deepsparse-python was given"
    if name in ("onnxruntime", "openvino") and importlib.util.find_spec(name) is None:
        return f"{name} is not installed"
    return None
