"""Folders of pruned models that were written by transformers 4 and nn_pruning.

There, removed heads were listed in `config.json` as `pruned_heads`, and the tensors were as small
as they say. transformers 5 neither reads the list nor loads the tensors.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from mvpfx.absent_units import fill_absent
from mvpfx.bounded_build import bounded
from mvpfx.file_limits import FileLimits, bytes_of, check_stored_plainly
from mvpfx.skeleton import build_empty, transformers_class

CONFIG = "config.json"
SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
_HEADS = "pruned_heads"


def load_pruned(folder: str | Path, kind: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """A plain model from a folder in which heads or hidden units are absent; zeros stand for them.

    The model has the shapes of its class and computes what the pruned one computed;
    `mvpfx.convert` makes it small again. Serves whatever class has attentions that the names of
    its modules and the numbers in its configuration show: BERT, RoBERTa, ELECTRA, DistilBERT,
    ALBERT, XLM, GPT-2 and their like. Nothing in the folder is run.

    Args:
        folder: with `config.json`, and `model.safetensors` or `pytorch_model.bin`. Names of tensors
            are those of the class today.
        kind: the model's class; None to take the first of `architectures`.

    Returns:
        The model in eval mode, with its weights in the type they are stored in.

    Raises:
        ValueError: a file is missing or holds something else, a head is out of range, shapes do
            not follow, or a tensor is missing or left over; the text says which.
    """
    folder = Path(folder)
    try:
        return _load(folder, kind)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error


def _load(folder: Path, kind: Any) -> PreTrainedModel:
    body = _configuration(folder)
    pruned = _pruned_heads(body.pop(_HEADS, None))
    kind = _class(body) if kind is None else kind
    tensors = _tensors(folder)
    path = folder / (SAFE if (folder / SAFE).is_file() else PICKLED)
    limits = FileLimits.of(path, [tensor.shape for tensor in tensors.values()])
    full = build_empty(kind, body, limits)
    # Zeros will stand for what is absent, of which the file has nothing.
    limits.room.take(f"a {kind.__name__} in full", bytes_of(full.parameters()))
    filled = fill_absent(full, tensors, pruned)
    try:
        with bounded(limits):
            model, found = kind.from_pretrained(
                None, config=full.config, state_dict=filled, output_loading_info=True
            )
    except Exception as error:
        raise ValueError(f"{kind.__name__} does not take its tensors: {error}") from error
    buffers = {name for name, _ in model.named_buffers()}
    missing, unexpected = found["missing_keys"], set(found["unexpected_keys"]) - buffers
    for names, problem in ((missing, "are missing"), (unexpected, "belong to no parameter of it")):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(
                f"tensors of {kind.__name__} {problem}: {len(names)}, {listed}. Pass the class "
                "whose tensors these are: kind=..."
            )
    return model.eval()


def _configuration(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"it has no {CONFIG}. Needed: a folder that save_pretrained wrote.")
    try:
        body = json.loads(path.read_bytes())
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ValueError(f"{CONFIG} holds no JSON object. Needed: what save_pretrained wrote.")
    body = cast("dict[str, Any]", body)
    norm = body.pop("layer_norm_type", None)
    if norm not in (None, "layer_norm"):
        raise ValueError(
            f"it was trained with layer_norm_type {norm!r}, and the class in transformers has "
            "nn.LayerNorm there. Needed: a model that was pruned with its norms as they were."
        )
    return body


def _pruned_heads(given: object) -> dict[int, tuple[int, ...]]:
    """Layer -> its absent heads, checked to be counts from 0."""
    found: dict[int, tuple[int, ...]] = {}
    listed = cast("Mapping[object, object]", given) if isinstance(given, dict) else {}
    for layer, heads in listed.items():
        numbers = cast("list[object]", heads) if isinstance(heads, list) else [None]
        if not str(layer).isdecimal() or any(type(n) is not int or n < 0 for n in numbers):
            found.clear()
            break
        found[int(str(layer))] = tuple(sorted(cast("set[int]", set(numbers))))
    if len(found) != len(listed) or (given is not None and not isinstance(given, dict)):
        raise ValueError(
            f"{_HEADS} in {CONFIG} is {given!r}. Needed: layers with lists of heads, counted from "
            '0, such as {"0": [1, 3]}.'
        )
    return found


def _class(body: Mapping[str, Any]) -> Any:
    names = body.get("architectures")
    if not isinstance(names, list) or not names:
        raise ValueError(f"{CONFIG} names no class in architectures. Pass it: kind=...")
    return transformers_class(str(cast("list[object]", names)[0]))


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder; of a pickled file nothing but tensors is made."""
    try:
        if (folder / SAFE).is_file():
            return load_file(folder / SAFE)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{SAFE} is no safetensors file: {error}.") from error
    path = folder / PICKLED
    if not path.is_file():
        raise ValueError(f"it has neither {SAFE} nor {PICKLED}, in one file each.")
    try:
        check_stored_plainly(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        first = (str(error).splitlines() or ["it is empty"])[0]
        raise ValueError(f"{PICKLED} is damaged or holds more than tensors: {first}") from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor)
        for name, value in cast("dict[object, object]", found).items()
    ):
        raise ValueError(f"{PICKLED} holds no state dict. Needed: tensors by their names.")
    return cast("dict[str, Tensor]", dict(found))
