"""Folders damaged at random: refused with a ValueError, or read as what they are."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import mvpfx
from mvpfx.kernels.library import LIBRARY
from tests import pruned_folders
from tests.damaged_folders import GIB, SECONDS, Found, Trial

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 32,
}
BATCH = {"input_ids": torch.arange(24).view(2, 12)}


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES)).eval()


def folder(kind: str, root: Path) -> Path:
    """A good folder, with what reading it takes next to it."""
    good = root / kind / "good"
    good.mkdir(parents=True)
    torch.save(BATCH, good.parent / "batch.pt")
    if kind == "pruned":
        family = pruned_folders.families()["BERT"]
        pruned_folders.write_folder(good, family, {0: [1]}, {1: [2, 5]}, "model.safetensors")
        return good
    if kind == "checkpoint":
        model = bert()
        torch.save(model, good.parent / "model.pt")
        mvpfx.prepare(model, mvpfx.PruningConfig(density=0.5))
        scheduler = mvpfx.SparsityScheduler(model, 10)
        return mvpfx.save_checkpoint(good, model, scheduler=scheduler)
    model = bert()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "encoder.layer" in name:
                weight *= torch.rand_like(weight) < 0.2
                weight[:3] = 0
    lowering = "csr" if LIBRARY is None else "native"
    small = mvpfx.convert(model, example_inputs=BATCH, lowering=lowering)
    return mvpfx.save(small, good, values="int8" if kind == "bytes" else "exact")


def check(found: Sequence[Found], good: Found) -> None:
    """Print what came out, and fail where something should not have."""
    loaded = [one for one in found if one.loaded]
    print(
        f"{len(found)} folders: {len(loaded)} loaded, {sum(one.called for one in loaded)} ran; "
        f"at most {max(one.seconds for one in found):.2f} s and "
        f"{max(one.grown for one in found) >> 20} MiB more"
    )
    for one in found:
        assert not one.wrong, f"number {one.number}: {one.wrong}"
        assert one.seconds <= SECONDS, f"number {one.number}: {one.seconds:.1f} s"
        assert one.grown <= good.grown + GIB, f"number {one.number}: {one.grown >> 20} MiB"
    assert 0 < len(loaded) < len(found)


@pytest.mark.parametrize("kind", ["tensors", "description", "bytes", "checkpoint", "pruned"])
def test_some_damaged_folders(kind: str, tmp_path: Path) -> None:
    trial = Trial(kind, folder(kind, tmp_path))
    check([trial.run(number) for number in range(24)], Found(-1, 0.0, 0))


COUNTS = {"tensors": 2000, "description": 2000, "bytes": 600, "checkpoint": 300, "pruned": 300}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(COUNTS))
def test_many_damaged_folders(kind: str, tmp_path: Path) -> None:
    """In processes of their own, two at a time: a crash or a hang is one folder's."""
    good, count = folder(kind, tmp_path), COUNTS[kind]
    half = count // 2
    with ThreadPoolExecutor(2) as pool:
        parts = [pool.submit(in_processes, good, kind, first, half) for first in (0, half)]
        found = [one for part in parts for one in part.result()]
    assert [one.number for one in found] == list(range(count))
    check(found, Found(-1, 0.0, 0))


def in_processes(good: Path, kind: str, first: int, count: int) -> list[Found]:
    """What came of these folders; a process that ends or hangs is followed by another one."""
    found: list[Found] = []
    while len(found) < count:
        start, left = first + len(found), count - len(found)
        before = len(found)
        found += until_it_ends(good, kind, start, left)
        assert len(found) > before, "a process died before its first folder"
    return found


def until_it_ends(good: Path, kind: str, first: int, count: int) -> list[Found]:
    command = [sys.executable, "-m", "tests.damaged_folders", str(good), kind, str(first)]
    found: list[Found] = []
    with subprocess.Popen(
        [*command, str(count)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        number, line = -1, ""
        for line in lines(process):
            if line.startswith("{"):
                found.append(Found(**json.loads(line)))
                number = -1
            else:
                number = int(line)
    if number >= 0:
        found.append(Found(number, 0.0, 0, wrong=f"ended with {process.returncode}"))
    return found


def lines(process: subprocess.Popen[str]) -> Any:
    """Lines as they come; the process is ended where the next one takes too long."""
    assert process.stdout is not None
    while True:
        patience = threading.Timer(120.0, process.kill)  # the first line comes after the imports
        patience.start()
        line = process.stdout.readline()
        patience.cancel()
        if not line:
            return
        yield line
