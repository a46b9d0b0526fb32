"""What comes of damaged folders: each is loaded, measured, and called if it was taken.

`python -m tests.damaged_folders GOOD KIND FIRST COUNT` loads some of them one after the other and
writes a line for each, so that whoever started it sees which one a crash or a hang belongs to.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import mvpfx
from mvpfx.pruned_folder import load_pruned
from tests.damage import KINDS

GIB = 1 << 30
SECONDS = 5.0


@dataclass
class Found:
    """What came of one folder.

    Attributes:
        number: of the damage.
        seconds: of the processor that loading took, and one call of what was loaded.
        grown: bytes that the process's peak was above what it had before.
        loaded: whether it was taken.
        called: whether a call of what was loaded gave something.
        wrong: what should not have happened.
    """

    number: int
    seconds: float
    grown: int
    loaded: bool = False
    called: bool = False
    wrong: str = ""


def signature(model: torch.nn.Module) -> dict[str, tuple[list[int], str]]:
    """Shapes and types of all tensors."""
    held = (*model.named_parameters(), *model.named_buffers())
    return {name: (list(tensor.shape), str(tensor.dtype)) for name, tensor in held}


def as_built(model: Any) -> dict[str, tuple[list[int], str]]:
    """The same of what the class builds by the configuration: absent units come back as zeros."""
    with torch.device("meta"):
        return signature(type(model)(model.config))


def reader(kind: str, good: Path) -> Callable[[Path], torch.nn.Module]:
    """What loads a folder of a kind."""
    if kind == "pruned":
        return load_pruned
    if kind != "checkpoint":
        return mvpfx.load
    model = torch.load(good.parent / "model.pt", weights_only=False)

    def load(folder: Path) -> torch.nn.Module:
        fresh = copy.deepcopy(model)
        mvpfx.load_checkpoint(folder, fresh)
        return fresh

    return load


class Trial:
    """Loads damaged copies of one folder."""

    def __init__(self, kind: str, good: Path) -> None:
        self._kind, self._good = kind, good
        self._load = reader(kind, good)
        self._batch = torch.load(good.parent / "batch.pt")
        warnings.simplefilter("ignore")
        self._expected = signature(self._load(good))

    def run(self, number: int) -> Found:
        """Damage, load and call."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "m"
            shutil.copytree(self._good, folder)
            KINDS[self._kind](folder, random.Random(f"{self._kind} {number}"))
            before = reset_peak()
            start, found = time.process_time(), Found(number, 0.0, 0)
            try:
                self._look(self._load(folder), found)
            except ValueError:
                pass
            except Exception as error:  # noqa: BLE001  refused, but not as it is promised
                found.wrong = f"{type(error).__name__}: {str(error)[:200]}"
            found.seconds = time.process_time() - start
            found.grown = peak() - before
        return found

    def _look(self, model: torch.nn.Module, found: Found) -> None:
        found.loaded = True
        own = signature(model)
        wanted = self._expected if self._kind != "pruned" else as_built(model)
        different = [n for n, held in own.items() if wanted.get(n) != held]
        if different:
            name = different[0]
            found.wrong = f"{name} is {own[name]}, and {wanted.get(name)} was needed"
        try:
            with torch.no_grad():
                model(**self._batch)
            found.called = True
        except Exception:  # noqa: BLE001  whatever the model raises
            found.called = False


_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> int:
    """Begin to measure the peak of memory; returns what the process has now."""
    if not _STATUS.is_file():
        return 0
    _RESET.write_text("5")
    return peak()


def peak() -> int:
    """The peak of the process's memory in bytes; 0 where the system does not tell."""
    if not _STATUS.is_file():
        return 0
    line = next(one for one in _STATUS.read_text().splitlines() if one.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Load some damaged folders, a line for each: its number before, what came of it after."""
    good, kind, first, count = sys.argv[1:]
    torch.set_num_threads(1)
    trial = Trial(kind, Path(good))
    for number in range(int(first), int(first) + int(count)):
        print(number, flush=True)
        print(json.dumps(asdict(trial.run(number))), flush=True)


if __name__ == "__main__":
    main()
