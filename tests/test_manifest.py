"""Manifests and folders: damage is named, nothing is touched, a killed save leaves old or new."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mvpfx
from mvpfx import manifest as manifests
from mvpfx.checkpoint import TRAINING
from mvpfx.manifest import ADVICE, MANIFEST
from mvpfx.model_state import WEIGHTS
from mvpfx.random_state import random_states
from mvpfx.saved_config import CONFIG
from tests.small_run import Run, raises, same


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    run = Run()
    run.steps(3)
    return mvpfx.save_checkpoint(tmp_path / "checkpoint-3", run.model, **run.parts)


def cut(path: Path) -> str:
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    return (
        f"{path} has {size // 2} bytes and was saved with {size}: it is cut short or of another "
        f"checkpoint. {ADVICE}"
    )


def flip(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return (
        f"{path} does not have the SHA-256 it was saved with: it is corrupted or of another "
        f"checkpoint. {ADVICE}"
    )


def remove(path: Path) -> str:
    size = path.stat().st_size
    path.unlink()
    return f"{path} is missing; {size} bytes are needed. {ADVICE}"


@pytest.mark.parametrize("damage", [cut, flip, remove])
@pytest.mark.parametrize("name", [WEIGHTS, TRAINING, CONFIG])
def test_a_damaged_file_is_named_and_nothing_is_touched(
    name: str, damage: Callable[[Path], str], saved: Path
) -> None:
    message = damage(saved / name)
    run = Run(seed=1)
    run.steps(1)
    before, numbers = run.snapshot(), random_states()
    for call in (
        lambda: mvpfx.load_checkpoint(saved, run.model, **run.parts),
        lambda: mvpfx.load_checkpoint(saved, run.model),
        lambda: mvpfx.latest_checkpoint(saved.parent),
        lambda: mvpfx.pruning_config(saved),
    ):
        with raises(message):
            call()
    assert same(run.snapshot(), before)
    assert random_states()["python"] == numbers["python"]
    assert torch.equal(torch.get_rng_state(), numbers["torch"])


def test_a_damaged_or_foreign_manifest(saved: Path) -> None:
    path = saved / MANIFEST
    text = path.read_text()
    body = json.loads(text)
    versioned = {**body, "version": 2}
    del versioned["digest"]
    versioned["digest"] = manifests.digest_of(versioned)
    cases = {
        text[:-40]: f"{path} is cut short or corrupted: it is no JSON. {ADVICE}",
        "[]": f"{path} is cut short or corrupted: it is no JSON. {ADVICE}",
        text.replace('"step": 3', '"step": 4'): (
            f"{path} is corrupted: it does not match its own digest. {ADVICE}"
        ),
        '{"format": "zip"}': (
            f"{path} is of something else: its format is 'zip', and 'mvpfx checkpoint' is needed. "
            "Pass the folder of a checkpoint."
        ),
        json.dumps(versioned): (
            f"{path} has version 2, and this release of mvpfx reads version 1. "
            "Load it with the release that saved it."
        ),
    }
    for content, message in cases.items():
        path.write_text(content)
        with raises(message):
            mvpfx.load_checkpoint(saved, Run().model)
    path.unlink()
    with raises(
        f"{saved} has no {MANIFEST}, so it is no checkpoint that was saved whole. Pass a folder "
        "that mvpfx.save_checkpoint, PruningTrainer or PruningCallback wrote."
    ):
        mvpfx.load_checkpoint(saved, Run().model)
    absent = saved / "absent"
    with raises(
        f"{absent} is no folder. Pass the folder of a checkpoint; mvpfx.latest_checkpoint finds "
        "the newest."
    ):
        mvpfx.load_checkpoint(absent, Run().model)


def test_a_file_of_another_checkpoint_is_refused(saved: Path) -> None:
    run = Run(seed=3)
    run.steps(4)
    other = mvpfx.save_checkpoint(saved.parent / "checkpoint-4", run.model, **run.parts)
    shutil.copy(other / WEIGHTS, saved / WEIGHTS)
    path = saved / WEIGHTS
    with raises(
        f"{path} does not have the SHA-256 it was saved with: it is corrupted or of another "
        f"checkpoint. {ADVICE}"
    ):
        mvpfx.load_checkpoint(saved, Run().model)


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_save_that_is_killed_anywhere_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that changes a folder is one after which the process may end."""
    run, folder = Run(), tmp_path / "checkpoint-0"
    calls, kill_at = 0, -1

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == kill_at:
                raise Killed
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "replace", deadly(os.replace))
    monkeypatch.setattr(os, "fsync", deadly(os.fsync))
    monkeypatch.setattr(torch, "save", deadly(torch.save))
    monkeypatch.setattr(shutil, "rmtree", deadly(shutil.rmtree))
    outcomes: list[str] = []
    for kill_at in range(1, 40):
        calls = -1000
        mvpfx.save_checkpoint(folder, run.model, **run.parts, extra="old")
        calls = 0
        try:
            mvpfx.save_checkpoint(folder, run.model, **run.parts, extra=f"new {kill_at}")
        except Killed:
            calls = -1000
            newest = mvpfx.latest_checkpoint(tmp_path)
            assert newest == folder
            outcomes.append(mvpfx.load_checkpoint(folder, run.model, **run.parts).extra)
        else:
            break
    news = [f"new {number}" for number in range(1, kill_at)]
    assert {"old", *outcomes} <= {"old", *news}
    assert outcomes[0] == "old"
    assert outcomes[-1] == news[-1]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_the_latest_is_by_number_and_hidden_folders_are_none(tmp_path: Path) -> None:
    assert mvpfx.latest_checkpoint(tmp_path / "absent") is None
    assert mvpfx.latest_checkpoint(tmp_path) is None
    for step in (9, 10):
        mvpfx.save_checkpoint(tmp_path / f"checkpoint-{step}", nn.Linear(2, 2), step=step)
    (tmp_path / ".checkpoint-11.saving").mkdir()
    (tmp_path / "logs").mkdir()
    assert mvpfx.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-12").mkdir()
    path = tmp_path / "checkpoint-12"
    with raises(
        f"{path} has no {MANIFEST}, so it is no checkpoint that was saved whole. Pass a folder "
        "that mvpfx.save_checkpoint, PruningTrainer or PruningCallback wrote."
    ):
        mvpfx.latest_checkpoint(tmp_path)
