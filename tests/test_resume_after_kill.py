"""A run that is ended by SIGKILL goes on from its last checkpoint as if nothing had been."""

import sys
from pathlib import Path

import pytest

from benchmarks.kill_and_resume import equal, point, start
from benchmarks.resumable_run import KINDS, SAVE_EVERY, STEPS, Record, run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")


@pytest.fixture(scope="module", params=KINDS)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to; its name is the kind of loop."""
    folder = tmp_path_factory.mktemp("reference") / str(request.param)
    run(folder.name, folder)
    return folder


def test_a_record_that_differs_is_not_equal(reference: Path, tmp_path: Path) -> None:
    expected = Record(reference).read()
    assert len(expected) == STEPS
    assert equal(reference, expected)
    changed = [{**line, "masks": "0"} if line["step"] == 3 else line for line in expected]
    assert not equal(reference, changed)
    assert not equal(tmp_path, expected)


def test_killed_in_a_step(reference: Path, tmp_path: Path) -> None:
    """Resumed in this process, so that nothing but the checkpoint is carried over."""
    assert start(reference.name, tmp_path, "--kill-step", 13) < 0
    assert len(Record(tmp_path).read()) == 13
    run(reference.name, tmp_path)
    assert equal(tmp_path, Record(reference).read())
    assert len(Record(tmp_path).read()) == STEPS + 3  # steps 11 to 13 are taken again


@pytest.mark.slow
@pytest.mark.parametrize("call", range(1, 15))
def test_killed_within_a_save(reference: Path, tmp_path: Path, call: int) -> None:
    found = point(reference.name, tmp_path, 2 * SAVE_EVERY, call)
    assert found["killed"]
    assert equal(tmp_path, Record(reference).read())


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 5, 6, 17, 20, 23])
def test_killed_after_any_step(reference: Path, tmp_path: Path, step: int) -> None:
    found = point(reference.name, tmp_path, step, 0)
    assert found["killed"]
    assert equal(tmp_path, Record(reference).read())
