"""The tensors of a model on their way to a file and back: tied ones once, and all or none."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from mvpfx.distributed import is_sharded
from mvpfx.manifest import ADVICE, Manifest
from mvpfx.swap import original_class
from mvpfx.transformers_types import is_pretrained

WEIGHTS = "model.safetensors"
SCORES = "pruning_scores.safetensors"
"""What masks store, apart from the weights: transformers renames some weights when it saves."""
_SCORES = re.compile(r".*_mask\.(\w*scores|frozen_kept|remembered_weight|progress|places)")


def without_wrappers(model: nn.Module) -> nn.Module:
    """`model` without DDP, DataParallel and `torch.compile` around it: names are its own then."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def save_state(model: nn.Module, folder: Path) -> dict[str, str]:
    """Write the model's state to `model.safetensors`, tensors that share memory once.

    Returns:
        Tied names -> the name their tensor is stored under.

    Raises:
        TypeError: the state holds something other than tensors.
        ValueError: a tensor is sharded over ranks.
    """
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} in the state of {type(model).__name__} is a {type(value).__name__}, and a "
                "checkpoint stores tensors. Keep it in extra= of save_checkpoint."
            )
        if is_sharded(value):
            raise ValueError(
                f"{name} is sharded over ranks, and a checkpoint folder holds whole tensors. Use "
                "torch.distributed.checkpoint, which saves every rank's part."
            )
        key = _memory(value)
        if key in first:
            tied[name] = first[key]
            continue
        if value.numel():
            first[key] = name
        # A view of a part of another tensor gets memory of its own: the format allows no other.
        stored[name] = value.detach().to("cpu", copy=True).contiguous()
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    return tied


def split_scores(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A state without the scores, and the scores."""
    scores = {name: value for name, value in state.items() if _SCORES.fullmatch(name)}
    return {name: value for name, value in state.items() if name not in scores}, scores


def save_scores(scores: Mapping[str, Tensor], folder: Path) -> None:
    """Write scores to `pruning_scores.safetensors`; no file where there are none."""
    stored = {name: value.detach().to("cpu").contiguous() for name, value in scores.items()}
    if stored:
        save_file(stored, folder / SCORES, metadata={"format": "pt"})


def read_scores(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The scores in a verified checkpoint of the Trainer, as `model` needs them.

    Raises:
        ValueError: a name is missing or unknown, or a shape differs.
    """
    _, own = split_scores(model.state_dict())
    found = _with_progress(own, _read_file(folder / SCORES)) if own else {}
    check_state(own, found, type(model).__name__, folder)
    return found


def read_state(
    model: nn.Module, folder: Path, manifest: Manifest, dense: bool = False
) -> dict[str, Tensor]:
    """The state of `model` as a checkpoint has it, checked, under all of its names.

    A folder of the Trainer may hold shards, leave tied names out, or name weights as the hub does;
    transformers itself undoes the last.

    Args:
        model: that the state is for; it is not changed.
        folder: of a verified checkpoint.
        manifest: of `folder`.
        dense: leave scores out: the model is not prepared yet.

    Raises:
        ValueError: a name is missing or unknown, or a shape or dtype differs.
    """
    found = _read_files(folder, manifest)
    for name, source in manifest.tied.items():
        if source not in found:
            raise ValueError(f"{folder} has {name} stored under {source}, which is not there.")
        found[name] = found[source]
    if dense:
        found, _ = split_scores(found)
    own = {n: v for n, v in model.state_dict().items() if isinstance(v, Tensor)}
    found = _with_progress(own, found)
    lacking = [name for name in _absent(own, found) if not _SCORES.fullmatch(name)]
    if lacking and manifest.writer != "loop" and is_pretrained(model):
        found = _converted(model, folder, found)
    present = {_memory(own[name]): value for name, value in found.items() if name in own}
    found |= {
        n: present[_memory(own[n])] for n in _absent(own, found) if _memory(own[n]) in present
    }
    check_state(own, found, type(model).__name__, folder)
    return found


def check_state(
    own: Mapping[str, Tensor], found: Mapping[str, Tensor], kind: str, folder: Path
) -> None:
    """Make sure that the state in `found` can replace `own` without a remainder.

    Raises:
        ValueError: a name is missing or unknown, or a shape or dtype differs.
    """
    for name in _absent(own, found):
        raise ValueError(f"{folder} has no {name}, which {kind} needs. {_other(name)}")
    for name in _absent(found, own):
        raise ValueError(f"{folder} holds {name}, which {kind} does not have. {_other(name)}")
    for name, value in own.items():
        saved = found[name]
        if saved.shape != value.shape:
            raise ValueError(
                f"{name} is {list(saved.shape)} in {folder} and {list(value.shape)} in {kind}. "
                f"{_other(name)}"
            )
        if saved.dtype != value.dtype:
            saved_type, own_type = (str(t.dtype).removeprefix("torch.") for t in (saved, value))
            raise ValueError(
                f"{name} is {saved_type} in {folder} and {own_type} in {kind}, so the run would "
                f"not continue exactly. Build the model in {saved_type}."
            )


def _other(name: str) -> str:
    if _SCORES.fullmatch(name):
        return (
            "Prepare the model as it was when saved: "
            "mvpfx.prepare(model, mvpfx.pruning_config(folder)), with example_inputs= if it was "
            "given then."
        )
    return "Build the model as it was when saved."


def _absent(wanted: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """The names that are not there, scores before what else a mask holds."""
    absent = [name for name in wanted if name not in there]
    return sorted(absent, key=lambda name: name.endswith("_mask.progress"))


def _with_progress(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`found`, and of a checkpoint that is older than `progress` the own one: there the state of
    the scheduler says it.
    """
    older = {name: value for name, value in own.items() if name.endswith("_mask.progress")}
    return {**older, **found} if not older.keys() & found.keys() else dict(found)


def _memory(value: Tensor) -> Any:
    """The same for two names of one tensor; on the meta device and where empty, never."""
    if value.device.type == "meta" or not value.numel():
        return id(value), value.shape
    start = value.untyped_storage().data_ptr()
    return start, value.storage_offset(), value.shape, value.stride(), value.dtype, value.device


def _read_files(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    names = [n for n in manifest.files if n.startswith("model") and n.endswith(".safetensors")]
    index = folder / f"{WEIGHTS}.index.json"
    if index.name in manifest.files:
        names = _shards(index, manifest)
    if not names:
        raise ValueError(
            f"{folder} has no {WEIGHTS}, so it cannot be loaded here. Resume it with what saved it."
        )
    names += [SCORES] if SCORES in manifest.files else []
    found: dict[str, Tensor] = {}
    for name in names:
        found |= _read_file(folder / name)
    return found


def _shards(index: Path, manifest: Manifest) -> list[str]:
    """The files that an index names, each of which was verified.

    Raises:
        ValueError: it is damaged, or names another file.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} names no files: {error}. {ADVICE}") from error
    for name in names:
        if name not in manifest.files:
            raise ValueError(
                f"{index} names {name!r}, which the checkpoint does not list. {ADVICE}"
            )
    return names


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}. {ADVICE}") from error


def _converted(model: nn.Module, folder: Path, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """What transformers makes of its own files; scores are not its business and stay."""
    plain: Any = original_class(model)
    held: Any = model
    with torch.random.fork_rng():
        fresh = plain.from_pretrained(folder, config=held.config, dtype=held.dtype)
    return {**fresh.state_dict(), **split_scores(found)[1]}
