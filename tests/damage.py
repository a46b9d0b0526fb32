"""Damage done at random to folders, with digests that fit again, as somebody hostile would."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mvpfx.manifest import MANIFEST, digest_of, measured
from mvpfx.saved_config import CONFIG
from mvpfx.store import DESCRIPTION, TENSORS

NUMBERS = (0, 1, -1, 2, 3, 7, 255, 4096, 10**6, 1 << 24, 10**9, 1 << 31, 1 << 63, 10**30)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    *(0.5, -1e30, 1e9, math.inf, math.nan, True, False, None, "", "x", "../../x", "os.system"),
    *([], {}, [[]], [10**9], {"a": 1}, [None] * 50),
)
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the description; its digest and those of the files fit again."""
    path = folder / DESCRIPTION
    body = json.loads(path.read_text())
    body.pop("digest")
    change(body)
    if isinstance(body.get("files"), dict) and TENSORS in body["files"]:
        body["files"][TENSORS] = measured(folder / TENSORS)
    path.write_text(json.dumps({**body, "digest": digest_of(body)}))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each value within plain data."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: list[tuple[Any, ...]] = []
    for key, inner in items:
        found.append((*path, key))
        if isinstance(inner, (dict, list)):
            found += places(inner, (*path, key))
    return found


def disturb(body: Any, dice: random.Random) -> None:
    """Change one value somewhere in plain data, remove it, or put another next to it."""
    # Branches first, so that a part is as likely as another whatever its length.
    branch = dice.choice(sorted(body, key=str))
    deep = isinstance(body[branch], (dict, list)) and len(body[branch]) and dice.random() < 0.97
    path = (branch, *dice.choice(places(body[branch]))) if deep else (branch,)
    owner = body
    for key in path[:-1]:
        owner = owner[key]
    held, way = owner[path[-1]], dice.random()
    if way < 0.08:
        del owner[path[-1]]
    elif way < 0.14 and isinstance(owner, dict):
        owner[dice.choice(("more", "0", "auto_map", "attn_implementation"))] = held
    elif way < 0.2:
        other = body
        for key in dice.choice(places(body)):
            other = other[key]
        owner[path[-1]] = copy.deepcopy(other)
    elif way < 0.55 and type(held) is int:
        owner[path[-1]] = dice.choice((held + 1, held - 1, -held, *NUMBERS))
    else:
        owner[path[-1]] = dice.choice(VALUES)


def reshaped(tensor: Tensor, dice: random.Random) -> Tensor:
    """The tensor in another shape."""
    if not tensor.dim() or dice.random() < 0.15:
        return tensor.reshape(-1)[:1].clone() if dice.random() < 0.5 else tensor[None].clone()
    dim = dice.randrange(tensor.dim())
    size = tensor.shape[dim]
    wanted = dice.choice((0, 1, size // 2, max(size - 1, 0), size + 1, 2 * size))
    if wanted <= size:
        return tensor.narrow(dim, 0, wanted).clone()
    return torch.cat([tensor, tensor, tensor], dim).narrow(dim, 0, min(wanted, 3 * size)).clone()


def refilled(tensor: Tensor, dice: random.Random) -> Tensor:
    """The tensor with some values that are at the edge of its type."""
    tensor, flat = tensor.clone(), tensor.numel()
    if not flat:
        return tensor
    view = tensor.view(-1)
    extremes: tuple[float, ...] = (0.0, math.nan, math.inf, 1e30)
    if not tensor.is_floating_point():
        info = torch.iinfo(torch.uint8 if tensor.dtype == torch.bool else tensor.dtype)
        extremes = (info.min, info.max, 0, 1)
    for _ in range(dice.choice((1, 3, flat))):
        view[dice.randrange(flat)] = dice.choice(extremes)
    return tensor


def damage_tensors(folder: Path, dice: random.Random) -> None:
    """Change tensors, mostly so that the description fits."""
    tensors = load_file(folder / TENSORS)
    body = json.loads((folder / DESCRIPTION).read_text())
    for _ in range(dice.choice((1, 1, 1, 2))):
        name, way = dice.choice(sorted(tensors)), dice.random()
        held = tensors[name]
        if way < 0.08:
            del tensors[name]
        elif way < 0.14:
            tensors[dice.choice(("more", f"{name}.more"))] = held.clone()
        elif way < 0.2:
            other = dice.choice(sorted(tensors))
            tensors[name], tensors[other] = tensors[other].clone(), held.clone()
        elif way < 0.55:
            tensors[name] = reshaped(held, dice)
        elif way < 0.75:
            tensors[name] = held.to(dice.choice(DTYPES))
        else:
            tensors[name] = refilled(held, dice)
    save_file(tensors, folder / TENSORS)
    fit = dice.random() < 0.9
    rewrite(folder, lambda b: fit_description(b, body, tensors) if fit else None)


def fit_description(body: dict[str, Any], good: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Let the description say what the tensors are, as far as it does."""
    listed = body["blueprint"]["tensors"]
    for name, tensor in tensors.items():
        leaf = name.removesuffix(".packed")
        dtype = str(tensor.dtype).removeprefix("torch.")
        if name in listed:
            listed[name].update(shape=list(tensor.shape), dtype=dtype)
        elif leaf in listed and f"{leaf}.gaps" not in tensors:
            listed[leaf]["shape"] = body["packed"][leaf]["shape"] = list(tensor.shape)
    for name in list(listed):
        stored = {name, f"{name}.packed"} & set(tensors) or name.endswith("_indices")
        if not stored and name not in good["blueprint"]["tied"]:
            del listed[name]


def damage_description(folder: Path, dice: random.Random) -> None:
    """Change values of the description; half of the time of the configuration."""

    def change(body: dict[str, Any]) -> None:
        for _ in range(dice.choice((1, 1, 1, 2, 3))):
            try:
                part = dice.choice((body, body["blueprint"]))
                if dice.random() < 0.4:
                    part = body["blueprint"]["config"]
                disturb(part, dice)
            except (KeyError, TypeError, IndexError, AttributeError):
                return  # what an earlier change left is no longer there

    rewrite(folder, change)


def damage_bytes(folder: Path, dice: random.Random) -> None:
    """Change bytes of either file; those of tensors mostly so that digests fit."""
    path = folder / dice.choice((TENSORS, TENSORS, DESCRIPTION))
    data = bytearray(path.read_bytes())
    way, at = dice.random(), dice.randrange(len(data))
    if dice.random() < 0.5:
        at = dice.randrange(min(len(data), 6000))  # the header
    if way < 0.5:
        for _ in range(dice.choice((1, 2, 8))):
            data[(at + dice.randrange(64)) % len(data)] = dice.randrange(256)
    elif way < 0.7:
        del data[at:]
    elif way < 0.85:
        del data[at : at + dice.randrange(1, 9)]
    else:
        data[at:at] = bytes(dice.randrange(256) for _ in range(dice.randrange(1, 9)))
    path.write_bytes(bytes(data))
    if path.name == TENSORS and dice.random() < 0.9:
        rewrite(folder, lambda _: None)


def damage_checkpoint(folder: Path, dice: random.Random) -> None:
    """Change the manifest of a checkpoint, or a file of it, so that digests fit."""
    path = folder / MANIFEST
    body = json.loads(path.read_text())
    body.pop("digest")
    if dice.random() < 0.4:
        config = json.loads((folder / CONFIG).read_text())
        disturb(config, dice)
        (folder / CONFIG).write_text(json.dumps(config))
    elif dice.random() < 0.5:
        tensors = load_file(folder / TENSORS)
        name = dice.choice(sorted(tensors))
        change = dice.choice((reshaped, refilled))
        tensors[name] = change(tensors[name], dice)
        save_file(tensors, folder / TENSORS)
    else:
        disturb(body, dice)
    if isinstance(body.get("files"), dict):
        for name, listed in body["files"].items():
            if isinstance(listed, dict) and "\0" not in name and (folder / name).is_file():
                listed.update(measured(folder / name))
    path.write_text(json.dumps({**body, "digest": digest_of(body)}))


def damage_pruned(folder: Path, dice: random.Random) -> None:
    """Change the configuration of a folder that transformers 4 wrote, or its tensors."""
    if dice.random() < 0.8:
        body = json.loads((folder / "config.json").read_text())
        for _ in range(dice.choice((1, 1, 2))):
            disturb(body, dice)
        (folder / "config.json").write_text(json.dumps(body))
        return
    tensors = load_file(folder / TENSORS)
    name = dice.choice(sorted(tensors))
    tensors[name] = dice.choice((reshaped, refilled))(tensors[name], dice)
    save_file(tensors, folder / TENSORS)


KINDS = {
    "tensors": damage_tensors,
    "description": damage_description,
    "bytes": damage_bytes,
    "checkpoint": damage_checkpoint,
    "pruned": damage_pruned,
}
