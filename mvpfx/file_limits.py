"""What a model that is built from a file may take: no more than the file's tensors can fill.

A configuration is a few lines of text, and one number in it can ask for a thousand million layers.
So how many modules are made, how great its numbers are, and how long building takes, are bounded
by what came with it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor

COUNT = 1 << 24
"""Numbers up to this, token positions for instance, are taken whatever the tensors."""
ROOM = 1 << 28
"""Bytes that zeros may take which no byte of the file stands for."""
_ROOM_PER_BYTE = 64
_PLACES = ("attn_implementation", "experts_implementation")
_CODE = ("auto_map", "trust_remote_code")


@dataclass
class Room:
    """Bytes that are left for what no byte of a file stands for, such as zeros at the end."""

    left: int

    def take(self, name: str, size: int) -> None:
        """Use some bytes.

        Raises:
            ValueError: there are not so many.
        """
        if size > self.left:
            raise ValueError(
                f"{name} would take {size} bytes that the file has nothing for, and {self.left} "
                "are left"
            )
        self.left -= max(size, 0)


@dataclass(frozen=True)
class FileLimits:
    """Bounds for a model from a file.

    Attributes:
        modules: the most that may be put into others.
        number: the greatest whole number of a configuration that may count something.
        seconds: of the processor's time, for building without numbers.
        room: bytes for what is not in the file.
        grows: bytes that the process may grow by while it builds.
    """

    modules: int
    number: int
    seconds: float
    room: Room = field(default_factory=lambda: Room(ROOM))
    grows: int = 2 * ROOM

    @classmethod
    def of(
        cls, path: Path, shapes: Iterable[Iterable[int]], modules: int | None = None
    ) -> FileLimits:
        """The bounds of a file of tensors.

        Args:
            path: of the file.
            shapes: of its tensors.
            modules: of the model, where they are listed; else the tensors tell how many there are.
        """
        known = [tuple(shape) for shape in shapes]
        if modules is None:
            modules = 8 * len(known)
        size = path.stat().st_size
        return cls(
            modules=4 * modules + 256,
            number=max(COUNT, *(max(shape, default=0) for shape in known), 0),
            seconds=1.0 + 0.01 * (modules + len(known)),
            room=Room(ROOM + _ROOM_PER_BYTE * size),
            grows=2 * ROOM + size,
        )


def plain_config(config: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """A configuration that counts no further than `limit`, and names no code.

    Greater whole numbers become floats: a base of frequencies is the same as one, and what counts
    layers, labels or tokens refuses it.

    Raises:
        ValueError: an implementation is named that is not a plain name: those are loaded from the
            network.
    """
    kept = {key: value for key, value in config.items() if key not in _CODE}
    return {key: _plain(str(key), value, limit) for key, value in kept.items()}


def _plain(key: str, value: object, limit: int) -> Any:
    if key.endswith(_PLACES) or key.startswith(tuple(f"_{place}" for place in _PLACES)):
        check_implementation(key, value)
    if isinstance(value, dict):
        return plain_config(cast("dict[str, Any]", value), limit)
    if isinstance(value, list):
        return [_plain("", item, limit) for item in cast("list[object]", value)]
    if type(value) is int and abs(value) > limit:
        return float(value)
    return value


def check_implementation(key: str, value: object) -> None:
    """Make sure that what computes a part of a model is code of this installation.

    Raises:
        ValueError: it is something else.
    """
    named = cast("dict[str, object]", value).values() if isinstance(value, dict) else [value]
    for name in named:
        if isinstance(name, dict):
            check_implementation(key, cast("object", name))
        elif name is not None and not (isinstance(name, str) and name.isidentifier()):
            raise ValueError(
                f"{key} is {name!r}, and an implementation that is installed was needed, such as "
                "'sdpa': code is not loaded for a file"
            )


def check_stored_plainly(path: Path) -> None:
    """Make sure that what torch has saved takes no more bytes than its file: torch compresses
    nothing, and what was compressed may take a thousand times as much.

    Raises:
        ValueError: it does.
    """
    if not zipfile.is_zipfile(path):
        return  # as torch saved until version 1.6
    try:
        with zipfile.ZipFile(path) as archive:
            held = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
    if held > path.stat().st_size:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, and would take {held}")


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What tensors take, or would take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
