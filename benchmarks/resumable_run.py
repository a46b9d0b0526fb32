"""A short run that goes on from its last checkpoint, and may be told where to be killed.

    python -m benchmarks.resumable_run loop FOLDER --kill-step 7 --kill-call 3

Writes a line of `record.jsonl` for each step: the loss, to the bit, and a digest of all masks.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import mvpfx
from mvpfx.scheduler import masks_of

STEPS, SAVE_EVERY, BATCH, ROWS = 24, 5, 4, 28
KINDS = ("loop", "trainer")
CONFIG = mvpfx.PruningConfig(density=0.2, schedule=mvpfx.CubicSchedule(0.1, 0.1))


class Killer:
    """Ends this process by SIGKILL: after a step, or at a call that writes in the save after it.

    Args:
        step: after which to end; None for never.
        call: 0 ends at once, else the process ends at that call in the next save; a file that is
            being written then is left half written.
    """

    def __init__(self, step: int | None = None, call: int = 0) -> None:
        self.step, self.call = step, call
        self.armed, self.calls = False, 0

    def after(self, step: int) -> None:
        """One step was taken and recorded."""
        if self.step is not None and step >= self.step:
            if not self.call:
                end()
            self.armed = True

    def watch(self, owner: Any, name: str) -> None:
        """Count the calls of a function; one of them may be the last."""
        function: Callable[..., Any] = getattr(owner, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            self.calls += self.armed
            last = self.armed and self.calls == self.call
            if last and name == "save":
                function(*args, **kwargs)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            if last:
                end()
            return function(*args, **kwargs)

        setattr(owner, name, called)


def end() -> None:
    """End this process, at once."""
    os.kill(os.getpid(), signal.SIGKILL)


class Record:
    """What happened, a line a step, appended so that a kill loses nothing."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "record.jsonl"

    def add(self, step: int, loss: float, model: nn.Module) -> None:
        """Write one step."""
        digest = hashlib.sha256()
        for mask in masks_of(model):
            digest.update(mask.kept().numpy().tobytes())
        line = {"step": step, "loss": loss.hex(), "masks": digest.hexdigest()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All steps, in the order they were taken."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        return [json.loads(line) for line in lines]


def build(seed: int) -> nn.Module:
    """A tiny BERT with dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=99,
        max_position_embeddings=16,
    )
    return BertForSequenceClassification(config)


def data() -> tuple[Tensor, Tensor]:
    """Token ids and labels, the same each time."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (ROWS, 8), generator=generator)
    return ids, torch.randint(0, 2, (ROWS,), generator=generator)


def run_loop(folder: Path, killer: Killer) -> None:
    """A plain torch loop, as docs/training.md has it."""
    record, rows = Record(folder), TensorDataset(*data())
    model = mvpfx.prepare(build(seed=0), CONFIG)
    scheduler = mvpfx.SparsityScheduler(model, STEPS)
    optimizer = torch.optim.AdamW(mvpfx.parameter_groups(model, lr=1e-3))
    lr_scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    parts: Any = {"optimizer": optimizer, "scheduler": scheduler, "lr_scheduler": lr_scheduler}
    torch.manual_seed(1)
    newest = mvpfx.latest_checkpoint(folder)
    if newest is not None:
        mvpfx.load_checkpoint(newest, model, **parts)
    per_epoch = ROWS // BATCH
    while scheduler.step_count < STEPS:
        epoch, done = divmod(scheduler.step_count, per_epoch)
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch)).tolist()
        left = Subset(rows, order[done * BATCH :])
        for ids, labels in DataLoader(left, BATCH, generator=torch.Generator()):
            if scheduler.step_count == STEPS:
                break
            loss = model(input_ids=ids, labels=labels).loss + mvpfx.penalty(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            lr_scheduler.step()
            scheduler.step()
            step = scheduler.step_count
            record.add(step, loss.item(), model)
            killer.after(step)
            if step % SAVE_EVERY == 0:
                mvpfx.save_checkpoint(folder / f"checkpoint-{step}", model, **parts)


def run_trainer(folder: Path, killer: Killer) -> None:
    """The same with transformers' Trainer."""
    from transformers import TrainerCallback, TrainingArguments

    record = Record(folder)

    class Recording(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "loss" in kwargs["logs"]:
                record.add(state.global_step, kwargs["logs"]["loss"], kwargs["model"])
                killer.after(state.global_step)

    ids, labels = data()
    rows: Any = [{"input_ids": i, "labels": k} for i, k in zip(ids, labels, strict=True)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        save_steps=SAVE_EVERY,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_total_limit=2,
    )
    trainer = mvpfx.hf.PruningTrainer(
        build(seed=0), arguments, train_dataset=rows, callbacks=[Recording()], config=CONFIG
    )
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))


def run(kind: str, folder: Path, killer: Killer | None = None) -> None:
    """Run until the end, or until killed."""
    (run_loop if kind == "loop" else run_trainer)(folder, killer or Killer())


def main() -> None:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-step", type=int)
    parser.add_argument("--kill-call", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    killer = Killer(options.kill_step, options.kill_call)
    for owner, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree"), (torch, "save")):
        killer.watch(owner, name)
    run(options.kind, options.folder, killer)


if __name__ == "__main__":
    main()
