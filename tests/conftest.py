"""Fixtures for all tests."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mvpfx.kernels import library as kernels
from mvpfx.kernels.library import INSTRUCTIONS, isa, use_isa
from mvpfx.net import SWITCH
from mvpfx.training_kernels import library as training_kernels

os.environ[SWITCH] = "off"  # so that the net under optimisations hides no fault
torch.set_num_threads(1)
# pytest listens to each logger that does not propagate; with a listener, torch writes down each
# step of a recording for it, and recordings take a third longer.
logging.getLogger("torch.__trace").propagate = True
FEW_MODELS = {"BERT", "Llama", "bert", "convolutions", "nn.TransformerEncoder", "tied weights"}
"""What stands for all where a test marked `every_model` repeats over the argument `name`."""

REPEATED = [
    re.compile(line)
    for line in (Path(__file__).parent / "slow_cases.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
"""Ids of cases that are slow ones."""

LONGEST = "test_random_graphs.py"
"""One test of it takes longer than many files; begun last, all other workers would wait for it."""


def pytest_configure(config: pytest.Config) -> None:
    """Without native kernels each conversion says so; tests are not about that."""
    if kernels.LIBRARY is None:
        config.addinivalue_line("filterwarnings", "ignore:sparse weights are multiplied by torch")


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of all other models are slow ones; files of many tests begin first."""
    for item in items:
        arguments = getattr(item, "callspec", None)
        name = arguments.params.get("name") if arguments is not None else None
        if name is not None and item.get_closest_marker("every_model") and name not in FEW_MODELS:
            item.add_marker(pytest.mark.slow)
    _mark_repeated(config, items)
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name != LONGEST, -sizes[item.path], item.path))


def _mark_repeated(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the cases of `slow_cases.txt`; each line must name some, where whole files are run."""
    ids = [f"{item.path.name}::{item.nodeid.partition('::')[2]}" for item in items]
    files = {item.path.name for item in items}
    for pattern in REPEATED:
        found = [item for item, test in zip(items, ids, strict=True) if pattern.match(test)]
        for item in found:
            item.add_marker(pytest.mark.slow)
        whole = not any("::" in argument for argument in config.args)
        if not found and whole and pattern.pattern.partition("::")[0] in files:
            raise pytest.UsageError(f"tests/slow_cases.txt: no test matches {pattern.pattern}")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The devices a device-agnostic test runs on; CUDA is skipped where there is none."""
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return name


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction sets that native kernels are compiled for; skipped where there is none."""
    best = isa()
    assert best is not None
    try:
        use_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    use_isa(best)


@pytest.fixture
def fixed_inference() -> Iterator[None]:
    """The same random numbers each time, and no gradients."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(params=["native", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A training step with the native library, and with operations of torch in its place."""
    if request.param == "plain":
        monkeypatch.setattr(training_kernels, "LIBRARY", None)
    elif training_kernels.LIBRARY is None:
        pytest.skip("the native library was not built")
    return request.param
