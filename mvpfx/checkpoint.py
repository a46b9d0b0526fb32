"""Checkpoints: everything a run needs to go on to the bit, written whole and checked when read."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mvpfx.api import prepare
from mvpfx.checks import as_count
from mvpfx.file_limits import check_stored_plainly
from mvpfx.manifest import (
    ADVICE,
    Manifest,
    place_of,
    replacing,
    settled,
    verify_checkpoint,
    write_manifest,
)
from mvpfx.model_state import read_state, save_state, without_wrappers
from mvpfx.random_state import random_states, restore_random_states
from mvpfx.saved_config import check_config, read_config, save_config
from mvpfx.saved_labels import save_labels, take_labels
from mvpfx.scheduler import SparsityScheduler
from mvpfx.state import find_state

TRAINING = "training.pt"
_NUMBERED = re.compile(r"(?:.*[^0-9])?([0-9]+)")


class Stateful(Protocol):
    """What has a state to be saved: an optimizer, a learning-rate scheduler."""

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain data and tensors."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Go on where `state_dict` was taken."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` found beside the states that it loaded.

    Attributes:
        step: as given to `save_checkpoint`.
        extra: likewise; None where nothing was given.
    """

    step: int
    extra: Any


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    *,
    optimizer: Stateful | None = None,
    scheduler: SparsityScheduler | None = None,
    lr_scheduler: Stateful | None = None,
    step: int | None = None,
    extra: Any = None,
) -> Path:
    """Save all that a run needs to go on exactly where it is; all of it is there, or nothing is.

    The files are written into a hidden folder beside `folder`, flushed to disk, and renamed. What
    `folder` held before is replaced. With several processes, call it on one of them.

    Args:
        folder: of the checkpoint. `latest_checkpoint` finds those whose name ends in the step, such
            as `checkpoint-120`.
        model: prepared or not; DDP and `torch.compile` around it are looked through.
        optimizer: whose state to save.
        scheduler: of the density.
        lr_scheduler: of the learning rate.
        step: optimizer steps taken; by default the scheduler's.
        extra: anything else of yours, such as an epoch: plain data and tensors.

    Returns:
        `folder`, as a path.

    Raises:
        TypeError: something is no plain data or tensor.
        ValueError: neither `step` nor `scheduler` is given, or a tensor is sharded over ranks.
    """
    if step is None and scheduler is None:
        raise ValueError("save_checkpoint needs step=, the optimizer steps taken so far.")
    step = as_count(scheduler.step_count if step is None and scheduler else step, "step", least=0)
    model, folder = without_wrappers(model), Path(folder)
    given = {"optimizer": optimizer, "lr_scheduler": lr_scheduler}
    parts = {name: part.state_dict() for name, part in given.items() if part is not None}
    with replacing(folder) as staged:
        tied = save_state(model, staged)
        _save_training(staged, {**parts, "extra": extra, "random": random_states()})
        save_config(model, staged)
        save_labels(model, staged)
        schedule = None if scheduler is None else scheduler.state_dict()
        write_manifest(staged, Manifest("loop", step, schedule, tuple(parts), tied))
    return folder


def load_checkpoint(
    folder: str | Path,
    model: nn.Module,
    *,
    optimizer: Stateful | None = None,
    scheduler: SparsityScheduler | None = None,
    lr_scheduler: Stateful | None = None,
) -> Checkpoint:
    """Load a checkpoint after every file of it was verified and everything in it found to fit.

    Given all that was saved, the run goes on exactly, random numbers included. Given the model
    alone, it has the weights, the scores and the density it was saved with; a model that is not
    prepared is prepared with the saved configuration first. A folder of `PruningTrainer` can be
    loaded into a model alone.

    Args:
        folder: as given to `save_checkpoint`, or a `checkpoint-...` of the Trainer.
        model: built as the saved one.
        optimizer: over the parameters of `model`, in the same groups.
        scheduler: with the same `total_steps`.
        lr_scheduler: of the same kind.

    Returns:
        The step, and what was saved as `extra`, its tensors on the CPU.

    Raises:
        ValueError: a file is missing, cut short, corrupted or foreign; the model, its configuration
            or a part does not fit; or parts were saved and only some of them are given. Model and
            parts are then as they were.
    """
    folder, model = settled(Path(folder)), without_wrappers(model)
    manifest = verify_checkpoint(folder)
    given = {"optimizer": optimizer, "lr_scheduler": lr_scheduler}
    parts = {name: part for name, part in given.items() if part is not None}
    resuming = bool(parts) or scheduler is not None
    if resuming:
        _check_parts({*parts, *(("scheduler",) if scheduler else ())}, manifest, folder)
    config = read_config(folder, manifest)
    if find_state(model) is not None:
        check_config(model, config, folder)
    elif config is not None:
        read_state(model, folder, manifest, dense=True)
        prepare(model, config)
    state = read_state(model, folder, manifest)
    training = _read_training(folder, manifest)
    for name, part in parts.items():
        _check_fits(name, part.state_dict(), training[name], folder)
    if manifest.schedule is not None:
        if scheduler is None:
            plan = manifest.schedule
            scheduler = SparsityScheduler(model, plan["total_steps"], keep=bool(plan.get("keep")))
        scheduler.load_state_dict(manifest.schedule)  # refuses what does not fit, changing nothing
    for name, part in parts.items():
        part.load_state_dict(training[name])
    model.load_state_dict(state)
    take_labels(model, folder)
    if resuming:
        restore_random_states(training["random"])
    return Checkpoint(manifest.step, training.get("extra"))


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint with the highest step in `folder`, verified.

    Checkpoints are the subfolders whose name ends in a number. Hidden ones, which a killed save
    leaves, are none.

    Args:
        folder: that holds checkpoints; it need not exist.

    Returns:
        The path, or None where there is no checkpoint.

    Raises:
        ValueError: the newest is damaged. An older one is never taken in its place without your
            knowing: delete the damaged folder for that.
    """
    folder = Path(folder)
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        place = place_of(path)
        match = _NUMBERED.fullmatch(place.name)
        if path.is_dir() and match and not place.name.startswith("."):
            found[int(match[1])] = place
    if not found:
        return None
    newest = found[max(found)]
    verify_checkpoint(newest)
    return newest


def _save_training(folder: Path, content: Mapping[str, Any]) -> None:
    """Write what is no weight, and read it back as it will be read: by no code of its own."""
    torch.save(dict(content), folder / TRAINING)
    try:
        torch.load(folder / TRAINING, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        reason = re.search(r"(?<=GLOBAL )[\w.]+|(?<=class )[\w.]+", str(error))
        raise TypeError(
            "extra, or the state of optimizer or lr_scheduler, holds something other than plain "
            f"data and tensors: {reason[0] if reason else error}. "
            "Save its state_dict() or its values instead."
        ) from None


def _read_training(folder: Path, manifest: Manifest) -> dict[str, Any]:
    if manifest.writer != "loop":
        return {}
    check_stored_plainly(folder / TRAINING)
    try:
        return torch.load(folder / TRAINING, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        first = (str(error).splitlines() or ["it is empty"])[0]
        raise ValueError(
            f"{folder / TRAINING} holds something other than training states: {first}. {ADVICE}"
        ) from error


def _check_parts(given: set[str], manifest: Manifest, folder: Path) -> None:
    """Make sure that what is resumed is all that was saved, neither less nor more."""
    if manifest.writer != "loop":
        raise ValueError(
            f"{folder} was saved by transformers' Trainer, which resumes it: "
            f"trainer.train(resume_from_checkpoint={str(folder)!r}). Here it can be loaded into a "
            "model alone."
        )
    saved = {*manifest.parts, *(("scheduler",) if manifest.schedule is not None else ())}
    for name in sorted(given - saved):
        raise ValueError(
            f"{folder} was saved without {name}=, so it cannot go on. "
            "Leave it out here, or load the model alone."
        )
    for name in sorted(saved - given):
        raise ValueError(
            f"{folder} was saved with {name}=, and the run would not go on exactly without it. "
            "Pass it here too, or load the model alone."
        )


def _check_fits(name: str, own: Mapping[str, Any], saved: Mapping[str, Any], folder: Path) -> None:
    """Make sure that a part can take the saved state."""
    if set(own) != set(saved):
        raise ValueError(
            f"the {name} in {folder} has the state {', '.join(sorted(saved))}, and this one "
            f"{', '.join(sorted(own))}. Build it as it was when saved."
        )
    if name == "optimizer":
        found, needed = (
            [len(group["params"]) for group in state["param_groups"]] for state in (own, saved)
        )
        if found != needed:
            raise ValueError(
                f"the optimizer has groups of {found} parameters, and the one in {folder} of "
                f"{needed}. Build it as it was when saved, after mvpfx.prepare."
            )
