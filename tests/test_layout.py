"""The layout holds: who may import whom, how long a file may be, what the wheel will contain."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOUNS = sorted(p for p in (ROOT / "mvpfx").rglob("*.py") if "passes" not in p.parts)
PASSES = sorted((ROOT / "passes").glob("*.py"))
OTHERS = sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def package_of(path: Path) -> list[str]:
    """The dotted package that holds a file, as a list: passes/ is mvpfx.passes."""
    folders = list(path.relative_to(ROOT).parent.parts)
    return ["mvpfx", *folders] if folders[:1] == ["passes"] else folders


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports anywhere, absolute; `from a import b` gives a.b as well as a."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = package_of(path)
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_passes(path: Path) -> set[str]:
    return {name for name in imports(path) if f"{name}.".startswith("mvpfx.passes.")}


def test_the_link_to_the_passes_is_relative() -> None:
    link = ROOT / "mvpfx" / "passes"
    assert link.is_symlink()
    assert link.readlink() == Path("../passes")


@pytest.mark.parametrize("path", NOUNS, ids=relative)
def test_only_the_api_imports_passes(path: Path) -> None:
    if path.name not in ("api.py", "conversion.py"):
        assert imports_passes(path) == set()


@pytest.mark.parametrize("path", PASSES, ids=relative)
def test_passes_import_neither_one_another_nor_the_api(path: Path) -> None:
    assert imports_passes(path) == set()
    assert "mvpfx.api" not in set(imports(path))


@pytest.mark.parametrize("path", [*NOUNS, *PASSES], ids=relative)
def test_the_package_imports_no_tests_and_no_benchmarks(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert roots.isdisjoint({"tests", "benchmarks", "passes"})


@pytest.mark.parametrize("path", [*NOUNS, *PASSES, *OTHERS], ids=relative)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines < MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


def test_every_package_is_listed_for_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(package_of(path)) for path in [*NOUNS, *PASSES] if path.name == "__init__.py"}
    assert set(settings["packages"]) == found


def test_every_pass_has_a_twin_test_file() -> None:
    passes = {path.stem for path in PASSES if path.stem != "__init__"}
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert passes - tested == set()


def test_the_name_passes_is_refused() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1] == (
        "ImportError: This folder is the package mvpfx.passes and was imported as 'passes'. "
        "Write `import mvpfx.passes` (or `from mvpfx.passes import ...`) instead."
    )


def test_the_native_sources_are_those_that_are_built() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    extensions = settings["ext-modules"]
    listed = {path for each in extensions for path in (*each["sources"], *each["depends"])}
    folders = [ROOT / "mvpfx" / name / "src" for name in ("kernels", "training_kernels")]
    held = {path for folder in folders for path in folder.iterdir()}
    assert listed == {relative(path) for path in held if path.suffix in (".cpp", ".h")}
