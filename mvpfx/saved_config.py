"""The pruning configuration of a checkpoint: a JSON file that people and `prepare` can read."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from torch import nn

from mvpfx.config import PruningConfig
from mvpfx.manifest import Manifest, settled, verify_checkpoint
from mvpfx.state import find_state

CONFIG = "pruning_config.json"


def pruning_config(folder: str | Path) -> PruningConfig:
    """The configuration that the model of a checkpoint was prepared with.

    Args:
        folder: of a checkpoint.

    Raises:
        ValueError: the checkpoint is damaged, or its model was not prepared.
    """
    folder = settled(Path(folder))
    config = read_config(folder, verify_checkpoint(folder))
    if config is None:
        raise ValueError(f"{folder} has no {CONFIG}: its model was not prepared.")
    return config


def read_config(folder: Path, manifest: Manifest) -> PruningConfig | None:
    """The configuration in a verified checkpoint; None where its model was not prepared."""
    if CONFIG not in manifest.files:
        return None
    try:
        return PruningConfig.from_json((folder / CONFIG).read_text(encoding="utf-8"))
    except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{folder / CONFIG} does not hold a configuration: {error}") from error


def save_config(model: nn.Module, folder: Path) -> None:
    """Write the configuration of a prepared model to `pruning_config.json`."""
    state = find_state(model)
    if state is not None and state.config is not None:
        (folder / CONFIG).write_text(state.config.to_json() + "\n", encoding="utf-8")


def check_config(model: nn.Module, saved: PruningConfig | None, folder: Path) -> None:
    """Make sure that a prepared model was prepared as the saved one.

    Raises:
        ValueError: a field differs; the text names it.
    """
    state = find_state(model)
    own = None if state is None else state.config
    kind = type(model).__name__
    if own is None:
        raise ValueError(
            f"{kind} was made by mvpfx.convert, and {folder} is of a model in training. Load it "
            "into the model that mvpfx.convert was given."
        )
    if saved is None:
        raise ValueError(
            f"{kind} is prepared, and the model in {folder} was not. "
            "Load it into a model that is not prepared."
        )
    for field in fields(PruningConfig):
        found, needed = getattr(own, field.name), getattr(saved, field.name)
        if found != needed:
            raise ValueError(
                f"{kind} was prepared with {field.name}={found!r}, and the model in {folder} with "
                f"{needed!r}. Prepare it with mvpfx.pruning_config({str(folder)!r})."
            )
