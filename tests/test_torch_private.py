"""Private API of torch: what is missing is named, and what is newer than tested is said once."""

import re
import subprocess
import sys
import warnings

import pytest
import torch

import mvpfx
from mvpfx import _supported_torch
from mvpfx._supported_torch import NEWEST, REQUIRED, check_names, is_newer_than_tested


def test_private_api_exists() -> None:
    check_names(REQUIRED)


def test_what_is_missing_is_named() -> None:
    wanted = {
        "torch._C": ("_nothing", "_is_tracing"),
        "torch._gone": ("x",),
        "torch": ("_less",),
    }
    message = (
        f"mvpfx needs torch._C._nothing, torch._gone, torch._less, which torch {torch.__version__} "
        "does not have. It was tested with torch 2.11 to 2.14: install one of these, or a newer "
        "mvpfx."
    )
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        check_names(wanted)


@pytest.mark.parametrize(
    ("module", "name"),
    [("torch._C", "_is_tracing"), ("torch._subclasses.fake_tensor", "FakeTensorMode")],
)
def test_an_import_names_what_is_missing(module: str, name: str) -> None:
    code = f"import importlib, torch; del importlib.import_module({module!r}).{name}; import mvpfx"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert f"ImportError: mvpfx needs {module}.{name}, which torch" in run.stderr


def test_an_import_brings_neither_the_compiler_nor_transformers() -> None:
    left_out = "torch._dynamo", "torch._inductor", "torch.onnx", "transformers", "torchao"
    code = f"import sys, mvpfx; print([m for m in {left_out} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_a_newer_torch_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = f"{NEWEST[0]}.{NEWEST[1] + 1}.0"
    monkeypatch.setattr(torch, "__version__", newer)
    _supported_torch._warn_if_untested.cache_clear()
    with pytest.warns(UserWarning, match=f"not tested with torch {re.escape(newer)}"):
        mvpfx.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mvpfx.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("version", "newer"),
    [
        ("2.11.0", False), ("2.14.1+cpu", False), ("2.14.0a0+git1", False), ("2.15.0", True),
        ("2.100.0", True), ("3.0.0", True), ("main", False),
    ],
)  # fmt: skip
def test_versions_are_compared_by_number(version: str, newer: bool) -> None:
    assert is_newer_than_tested(version) is newer


def test_nothing_else_imports_private_modules() -> None:
    import pathlib
    import re

    root = pathlib.Path(__file__).parent.parent
    pattern = re.compile(r"^\s*(from|import) torch(\.\w+)*\._|torch\._[A-Za-z]")
    for path in [*root.glob("mvpfx/*.py"), *root.glob("passes/*.py")]:
        if path.name in ("torch_private.py", "_supported_torch.py"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not pattern.search(line), f"{path.name}:{number} uses a private torch API"
