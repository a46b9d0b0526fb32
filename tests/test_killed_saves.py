"""A process killed anywhere in a save leaves the old content or the new at the path, never neither.

The saving child counts what it asks of the system and ends itself before the chosen call. Nothing
is tidied up between two kills, so a save meets what earlier ones left.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mvpfx
from mvpfx import model_state, store

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the saving process is forked"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]

KILLED = 9
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "shutil.rmtree"}
X = torch.linspace(-1, 1, 48).view(3, 16)


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


@dataclass(frozen=True)
class Kind:
    """What is saved, and what is read back."""

    models: tuple[nn.Module, nn.Module]
    save: Callable[[nn.Module, Path], object]
    load: Callable[[Path], nn.Module]


def model_kind() -> Kind:
    def converted(seed: int) -> nn.Module:
        model = net(seed)
        with torch.no_grad():
            model.get_parameter("0.weight")[torch.rand(32, 16) < 0.8] = 0
        return mvpfx.convert(model, example_inputs=(X,), lowering="csr")

    return Kind((converted(0), converted(1)), mvpfx.save, lambda folder: mvpfx.load(folder, net(9)))


def checkpoint_kind() -> Kind:
    def load(folder: Path) -> nn.Module:
        model = net(9)
        mvpfx.load_checkpoint(folder, model)
        return model

    return Kind((net(0), net(1)), lambda m, f: mvpfx.save_checkpoint(f, m, step=3), load)


KINDS = {"model": model_kind, "checkpoint": checkpoint_kind}


def killed(save: Callable[[], object], point: int, count_to: Path | None = None) -> bool:
    """Save in a child that ends before its call number `point`; returns whether it was reached."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
    try:
        calls = Calls(point)
        sys.addaudithook(lambda event, _: calls.count() if event in EVENTS else None)
        for owner, name in ((store, "save_file"), (model_state, "save_file"), (torch, "save")):
            setattr(owner, name, calls.torn(getattr(owner, name)))
        for name in ("fsync", "close"):
            setattr(os, name, calls.counted(getattr(os, name)))
        save()
        done = calls.made
        if count_to is not None:
            count_to.write_text(str(done))
        os._exit(0)
    finally:
        os._exit(1)


class Calls:
    """Counts calls, and ends the process before one of them."""

    def __init__(self, last: int) -> None:
        self.made, self.last = 0, last

    def count(self) -> None:
        if self.made == self.last:
            os._exit(KILLED)
        self.made += 1

    def counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.count()
            return real(*args)

        return call

    def torn(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """A function that writes a file: half of it is there when the process ends within."""

        def call(content: Any, path: Path, **options: Any) -> Any:
            self.count()
            result = real(content, path, **options)
            if self.made == self.last:
                os.truncate(path, path.stat().st_size // 2)
            self.count()
            return result

        return call


def same(model: nn.Module, expected: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(model(X), expected)


@pytest.mark.parametrize("points", [14, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", list(KINDS))
def test_nothing_is_lost(kind: str, points: int, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child must not wait for threads that it does not have
    try:
        check(KINDS[kind](), tmp_path, points)
    finally:
        torch.set_num_threads(threads)


def check(kind: Kind, root: Path, points: int) -> None:
    folder, counted = root / "model-7", root / "count"
    with torch.no_grad():
        outputs = [model(X) for model in kind.models]
    kind.save(kind.models[0], folder)
    assert not killed(lambda: kind.save(kind.models[1], folder), -1, counted)
    calls, held = int(counted.read_text()), 1
    assert calls >= 14, "what is counted went missing"
    assert same(kind.load(folder), outputs[1])
    reached = replaced = 0
    for number in range(points):
        # Evenly over a save, the last calls too; leftovers of the one before add a few.
        point = number * calls // points if points < calls else number % (calls + 4)
        ended = killed(lambda new=1 - held: kind.save(kind.models[new], folder), point)
        reached += ended
        found = kind.load(folder)
        now = next((i for i, output in enumerate(outputs) if same(found, output)), None)
        assert now is not None, f"killed before call {point}: another model"
        assert ended or now != held, "a save that went through left the old model"
        replaced += now != held
        held = now
    assert reached >= points * 0.8
    assert replaced
    kind.save(kind.models[0], folder)
    assert same(kind.load(folder), outputs[0])
    assert sorted(path.name for path in root.iterdir()) == ["count", "model-7"]


def test_a_folder_without_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is written as ".": the names next to it are made from what it is called."""
    model = model_kind().models[0]
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path / "m")
    mvpfx.save(model, ".")
    monkeypatch.chdir(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(mvpfx.load(".", net(9))(X), model(X))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
