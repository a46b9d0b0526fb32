"""What classes of a transformers model are called, which its config knows and no tensor does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from mvpfx.transformers_types import is_pretrained

FILE = "config.json"
FIELDS = ("id2label", "label2id", "problem_type")


def save_labels(model: nn.Module, folder: Path) -> None:
    """Write the config of a transformers model to `config.json`, as `save_pretrained` does."""
    if is_pretrained(model):
        config: Any = model.config
        config.to_json_file(folder / FILE)


def take_labels(model: nn.Module, folder: Path) -> None:
    """Give a model the labels and the kind of problem that a checkpoint was saved with.

    Args:
        model: of transformers; any other is left alone.
        folder: a verified checkpoint. Where it has no config, nothing is done.

    Raises:
        ValueError: the config in it holds something else.
    """
    path = folder / FILE
    if not is_pretrained(model) or not path.is_file():
        return
    own: Any = model.config
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        saved: Any = type(own)(**{name: found[name] for name in FIELDS if name in found})
        labels = {name: getattr(saved, name, None) for name in FIELDS}
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} does not hold labels of a model: {error}") from error
    if len(labels["id2label"] or {}) == len(own.id2label or {}):
        for name, value in labels.items():
            setattr(own, name, value)
