"""Every private torch API the package uses exists in the installed torch."""

import importlib

import pytest
import torch

from mvpfx.torch_private import REQUIRED


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in REQUIRED.items() for name in names]
)
def test_private_api_exists(module: str, name: str) -> None:
    found = importlib.import_module(module)
    assert hasattr(found, name), (
        f"torch {torch.__version__} has no {module}.{name}, which mvpfx/torch_private.py relies on"
    )


def test_nothing_else_imports_private_modules() -> None:
    import pathlib
    import re

    root = pathlib.Path(__file__).parent.parent
    pattern = re.compile(r"^\s*(from|import) torch(\.\w+)*\._|torch\._[A-Za-z]")
    for path in [*root.glob("mvpfx/*.py"), *root.glob("passes/*.py")]:
        if path.name == "torch_private.py":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not pattern.search(line), f"{path.name}:{number} uses a private torch API"
