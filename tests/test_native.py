"""A native library is used where it was built from these sources, and no other file is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from mvpfx.kernels import library as kernels
from mvpfx.native import NAME, Interface
from mvpfx.training_kernels import library as training_kernels


@pytest.fixture(params=[kernels, training_kernels], ids=lambda library: library.__name__)
def library(request: pytest.FixtureRequest) -> ModuleType:
    if request.param.LIBRARY is None:
        pytest.skip("the library was not built")
    return request.param


def test_what_was_built_is_found(library: ModuleType) -> None:
    interface: Interface = library.INTERFACE
    folder = Path(str(library.__file__)).parent
    found = interface.find(folder)
    assert found is not None
    assert getattr(found, interface.version_function)() == interface.version


def test_a_library_of_other_sources_is_not_used(library: ModuleType) -> None:
    interface: Interface = library.INTERFACE
    folder = Path(str(library.__file__)).parent
    assert replace(interface, version=interface.version + 1).find(folder) is None
    assert replace(interface, version_function="mvpfx_none").find(folder) is None
    more = {**interface.functions, "mvpfx_no_such_function": (None, ())}
    assert replace(interface, functions=more).find(folder) is None


def test_another_file_is_no_library(library: ModuleType, tmp_path: Path) -> None:
    interface: Interface = library.INTERFACE
    path = tmp_path / f"{NAME}.so"
    path.write_bytes(b"no library")
    assert interface.open(path) is None
    assert interface.find(tmp_path / "nowhere") is None
