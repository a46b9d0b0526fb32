"""Data sets: of the hub, or files of the same columns in a folder."""

# datasets annotates itself in part only.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.recipes.task import Task

READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


def read(task: Task, folder: str | None) -> dict[str, Any]:
    """The splits of a task, split -> `datasets.Dataset`, each found to have what it needs.

    Raises:
        FileNotFoundError: the folder lacks the file of a split; the text says what is there.
        ValueError: there are several files for one, a column is missing, or one holds something
            else.
    """
    from datasets import load_dataset

    found: dict[str, Any] = {}
    for split in ("train", *task.validations):
        if folder is None:
            source = f"{split} of {task.hub}"
            found[split] = load_dataset(task.hub, task.subset, split=split)
        else:
            files = split_files(task, Path(folder), split)
            source = " ".join(map(str, files))
            found[split] = read_files(files, split)
        check_columns(task, found[split], source)
    return found


def split_files(task: Task, folder: Path, split: str) -> list[Path]:
    """The file of a split, or its parts named as on the hub, such as train-00000-of-00002.parquet.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is there in several formats.
    """
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in there if is_part(path, split)]
    if not files:
        splits = ", ".join(("train", *task.validations))
        names = ", ".join(path.name for path in there) or "nothing"
        raise FileNotFoundError(
            f"{folder} has no file of the split {split}; found {names}. The task {task.name} needs "
            f"one file each of {splits}, as {', '.join(READERS)}, such as {split}.parquet. Put "
            f"them there, or leave --data out to read {task.hub} from the hub."
        )
    if len({path.suffix for path in files}) > 1 or len({path.stem == split for path in files}) > 1:
        raise ValueError(
            f"{folder} has several files of the split {split}: "
            f"{', '.join(path.name for path in files)}. Leave one there."
        )
    return files


def is_part(path: Path, split: str) -> bool:
    """Whether a file holds a split, or a part of it."""
    name = path.stem
    return path.suffix in READERS and (name == split or path.match(f"{split}-*-of-*"))


def read_files(files: list[Path], split: str) -> Any:
    """Files of one format as one data set."""
    from datasets import load_dataset

    reader = READERS[files[0].suffix]
    # "NA" and "null" are words that people write.
    options: dict[str, Any] = {"keep_default_na": False} if reader == "csv" else {}
    names = {split: [str(path) for path in files]}
    return load_dataset(reader, data_files=names, split=split, **options)


def check_columns(task: Task, rows: Any, source: str) -> None:
    """Make sure that a split can be used.

    Raises:
        ValueError: it has no rows, lacks a column, or a column holds something else.
    """
    missing = [name for name in task.columns if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"{source} has no column {missing[0]}; found {', '.join(rows.column_names)}. The task "
            f"{task.name} needs the columns {', '.join(task.columns)}, as {task.hub} has them."
        )
    if not len(rows):
        raise ValueError(f"{source} has no rows.")
    task.check(rows, source)


def check_texts(rows: Any, columns: tuple[str, ...], source: str) -> None:
    """Make sure that columns hold text in each row.

    Raises:
        ValueError: naming the first row that has none.
    """
    for column in columns:
        for number, text in _numbered(rows, column):
            if not isinstance(text, str):
                raise ValueError(
                    f"row {number} of {source} has {text!r} as {column}, which must be text."
                )


def _numbered(rows: Any, column: str) -> Iterator[tuple[int, Any]]:
    return enumerate(rows[column])
