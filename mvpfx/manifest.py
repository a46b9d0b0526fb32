"""Folders that are there whole or not at all, and manifests that tell whether they still are.

A checkpoint is written into a hidden sibling folder, flushed to disk and renamed. Its manifest
lists every file with its size and SHA-256, and its own digest, so whatever happened to the folder
since is found before anything is loaded from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, cast

MANIFEST = "checkpoint_manifest.json"
FORMAT = "mvpfx checkpoint"
VERSION = 1
ADVICE = "Restore it, or delete the folder and go back to an earlier checkpoint."
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        writer: "loop" (`save_checkpoint`), "trainer" or "callback".
        step: optimizer steps taken when it was saved.
        schedule: the state of the `SparsityScheduler`; None where none was saved.
        parts: what was saved beside the model: optimizer, scheduler, lr_scheduler.
        tied: names of the model's state -> the name their common tensor is stored under.
        files: name -> `bytes` and `sha256`; the manifest itself is not among them.
    """

    writer: str
    step: int
    schedule: dict[str, int] | None = None
    parts: tuple[str, ...] = ()
    tied: dict[str, str] = field(default_factory=dict[str, str])
    files: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])


def write_manifest(folder: Path, manifest: Manifest, patterns: Sequence[str] = ("**/*",)) -> None:
    """Measure the files in `folder` and write their manifest; all of it is on disk afterwards.

    Args:
        folder: to which nothing else is written any more.
        manifest: whose `files` are filled in.
        patterns: of the files that are listed.
    """
    files = {name: measured(folder / name) for name in _file_names(folder, patterns)}
    body = {**asdict(manifest), "files": files, "format": FORMAT, "version": VERSION}
    body["digest"] = digest_of(body)
    text = json.dumps(body, indent=2, sort_keys=True) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    for name in (*files, MANIFEST):
        flush(folder / name)
    for path in {(folder / name).parent for name in (*files, MANIFEST)}:
        flush(path)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; the files it lists are not looked at.

    Raises:
        ValueError: `folder` is no checkpoint, of a version this release cannot read, or its
            manifest is damaged.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder. Pass the folder of a checkpoint; "
            "mvpfx.latest_checkpoint finds the newest."
        )
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {MANIFEST}, so it is no checkpoint that was saved whole. Pass a "
            "folder that mvpfx.save_checkpoint, PruningTrainer or PruningCallback wrote."
        )
    try:
        body = json.loads(path.read_bytes())
        digest = body.pop("digest", None)
        kind, version = body.pop("format", None), body.pop("version", None)
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{path} is cut short or corrupted: it is no JSON. {ADVICE}") from None
    if kind != FORMAT:
        raise ValueError(
            f"{path} is of something else: its format is {kind!r}, and {FORMAT!r} is needed. "
            "Pass the folder of a checkpoint."
        )
    if digest != digest_of({**body, "format": kind, "version": version}):
        raise ValueError(f"{path} is corrupted: it does not match its own digest. {ADVICE}")
    if version != VERSION:
        raise ValueError(
            f"{path} has version {version}, and this release of mvpfx reads version {VERSION}. "
            "Load it with the release that saved it."
        )
    try:
        content: dict[str, Any] = {**body, "parts": tuple(body["parts"])}
        manifest = Manifest(**content)
        _check_fields(manifest)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} was not written by mvpfx: {error}. {ADVICE}") from error
    return manifest


def _check_fields(manifest: Manifest) -> None:
    """Make sure that a manifest holds what its fields say, and names files of its own folder."""
    numbers = [manifest.step]
    if manifest.schedule is not None:
        numbers.append(manifest.schedule["total_steps"])
    if any(type(number) is not int or not 0 <= number < 1 << 62 for number in numbers):
        raise ValueError(f"{numbers} are not numbers of steps")
    texts = [manifest.writer, *manifest.parts, *manifest.tied, *manifest.tied.values()]
    if not all(isinstance(text, str) for text in cast("list[object]", texts)):
        raise ValueError("a name is not a text")
    for name, listed in manifest.files.items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
            raise ValueError(f"{name!r} is not the name of a file in it")
        if set(listed) != {"bytes", "sha256"}:
            raise ValueError(f"{name} has {sorted(listed)}, and bytes and sha256 are needed")


def verify_checkpoint(folder: str | Path) -> Manifest:
    """Read every file of a checkpoint and compare it with the manifest.

    Files that the manifest does not list are left alone: nothing reads them.

    Args:
        folder: of a checkpoint.

    Returns:
        Its manifest.

    Raises:
        ValueError: a file is missing, cut short, corrupted or of another checkpoint; the text names
            the first such file.
    """
    folder = settled(Path(folder))
    manifest = read_manifest(folder)
    for name, listed in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; {listed['bytes']} bytes are needed. {ADVICE}")
        found = path.stat().st_size
        if found != listed["bytes"]:
            raise ValueError(
                f"{path} has {found} bytes and was saved with {listed['bytes']}: it is cut short "
                f"or of another checkpoint. {ADVICE}"
            )
        if measured(path) != listed:
            raise ValueError(
                f"{path} does not have the SHA-256 it was saved with: it is corrupted or of "
                f"another checkpoint. {ADVICE}"
            )
    return manifest


@contextmanager
def replacing(folder: Path) -> Generator[Path]:
    """A folder to write into, which becomes `folder` when all went well.

    What was at `folder` stays until then, under one name or the other: a process that is killed in
    between leaves the old content, which `settled` finds, or the new. After an error nothing is
    left of the new.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = staging(folder)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        yield staged
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    take_place(staged, folder)


def staging(folder: Path) -> Path:
    """Where `folder` is written before it is renamed; no checkpoint, whatever it holds."""
    return _sibling(folder, "saving")


def take_place(staged: Path, folder: Path) -> None:
    """Rename `staged` to `folder`, and delete what was there."""
    folder, replaced = _whole(folder), _replaced(folder)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(folder, replaced)
    os.replace(staged, folder)
    flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def settled(folder: Path) -> Path:
    """Where the content of `folder` is: elsewhere if a save was killed between its two renames."""
    replaced = _replaced(folder)
    return replaced if not folder.exists() and replaced.exists() else folder


def place_of(folder: Path) -> Path:
    """The folder that `folder` is or, if it was being replaced, the one it belongs to."""
    name = folder.name
    if name.startswith(".") and name.endswith(".replaced"):
        return folder.with_name(name.removeprefix(".").removesuffix(".replaced"))
    return folder


def _replaced(folder: Path) -> Path:
    return _sibling(folder, "replaced")


def _sibling(folder: Path, ending: str) -> Path:
    whole = _whole(folder)
    return whole.with_name(f".{whole.name}.{ending}")


def _whole(folder: Path) -> Path:
    """The path with a name of its own, also where "." was given; links are not followed."""
    return Path(os.path.abspath(folder))


def _file_names(folder: Path, patterns: Sequence[str]) -> list[str]:
    paths = (path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    names = {path.relative_to(folder).as_posix() for path in paths}
    return sorted(names - {MANIFEST})


def measured(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def digest_of(body: Mapping[str, Any]) -> str:
    """SHA-256 of plain data, whatever its order."""
    text = json.dumps(body, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to disk."""
    if path.is_dir() and os.name != "posix":
        return  # other systems do not open folders
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
