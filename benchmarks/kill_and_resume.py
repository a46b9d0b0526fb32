"""Does a run that was killed and resumed equal the run that was not, to the bit?

    python -m benchmarks.kill_and_resume --points 20

Half of the points are in a plain torch loop and half in the Trainer; every other one is within a
save. Each run is a process of its own.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.results_file import FOLDER, environment, write
from benchmarks.resumable_run import KINDS, SAVE_EVERY, STEPS, Record

RESULT = FOLDER / "kill_and_resume.json"
MOST_CALLS = 10
"""Calls in one save that a process may end at."""


def start(kind: str, folder: Path, *options: object) -> int:
    """Run in a process of its own; returns its exit status, negative for a signal."""
    command = [sys.executable, "-m", "benchmarks.resumable_run", kind, str(folder)]
    done = subprocess.run(
        [*command, *map(str, options)], capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the {kind} run failed:\n{done.stderr}")
    return done.returncode


def equal(folder: Path, reference: list[dict[str, Any]]) -> bool:
    """Whether every step in a folder's record is that of the reference, and none is lacking."""
    expected = {line["step"]: line for line in reference}
    found = Record(folder).read()
    same = all(line == expected[line["step"]] for line in found)
    return same and {line["step"] for line in found} == set(range(1, STEPS + 1))


def point(kind: str, folder: Path, step: int, call: int) -> dict[str, Any]:
    """Kill a run at one point, resume it as often as it takes, and say what came out."""
    status = start(kind, folder, "--kill-step", step, "--kill-call", call)
    taken = len(Record(folder).read())
    if status:
        start(kind, folder)
    repeated = len(Record(folder).read()) - STEPS
    where = f"call {call} of the next save" if call else "after the step"
    return {
        "loop": kind,
        "step": step,
        "where": where,
        "killed": bool(status),
        "steps_taken": taken,
        "steps_repeated": repeated,
    }


def main() -> None:
    """Kill and resume, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    points: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        references: dict[str, list[dict[str, Any]]] = {}
        for kind in KINDS:
            start(kind, Path(temporary) / kind)
            references[kind] = Record(Path(temporary) / kind).read()
        for number in range(options.points):
            kind = KINDS[number % len(KINDS)]
            folder = Path(temporary) / str(number)
            within_save = number // len(KINDS) % 2
            last = STEPS - STEPS % SAVE_EVERY if within_save else STEPS - 1
            step = generator.randint(1, last)
            call = generator.randint(1, MOST_CALLS) if within_save else 0
            found = point(kind, folder, step, call)
            found["bit_equal"] = equal(folder, references[kind])
            points.append(found)
            print(found, flush=True)
    killed = [found for found in points if found["killed"]]
    result = {
        "benchmark": "kill_and_resume",
        "settings": {"steps": STEPS, "save_every": SAVE_EVERY, "seed": options.seed},
        "environment": environment(torch.device("cpu")),
        "points": points,
        "killed": len(killed),
        "bit_equal": sum(found["bit_equal"] for found in killed),
    }
    write(RESULT, result)
    print(f"{result['bit_equal']} / {result['killed']} bit-equal")


if __name__ == "__main__":
    main()
