"""Training steps that are compared: models of a shape with random weights, dense and pruned."""

from __future__ import annotations

import gc
import itertools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForSequenceClassification

import mvpfx
from benchmarks.measure import synchronize
from benchmarks.naive_movement import NaiveLinear, prune_naively
from benchmarks.workloads import Batch

DENSITY = 0.15
STEPS, DONE = 10_000, 3_000
"""Of a run, and where in it the timed steps are: the density falls, and masks move in each."""
BLOCK = (32, 32)


@dataclass(frozen=True)
class Shape:
    """Of an encoder."""

    name: str
    hidden: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int = 30522

    def model(self, device: torch.device) -> nn.Module:
        """A classifier with random weights, the same each time."""
        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.ffn,
            vocab_size=self.vocabulary,
        )
        return nn.Module.to(BertForSequenceClassification(config), device)

    def batch(self, tokens: int, device: torch.device) -> Batch:
        """Up to 32 sequences of `tokens` in all."""
        count = min(32, tokens)
        ids = torch.randint(self.vocabulary, (count, tokens // count))
        return {"input_ids": ids.to(device), "labels": torch.arange(count, device=device) % 2}

    @property
    def prunable(self) -> int:
        """Weights of the encoder's linear layers."""
        return self.layers * self.hidden * (4 * self.hidden + 2 * self.ffn)


SHAPES = {
    "MiniLM-L6": Shape("MiniLM-L6", 384, 6, 12, 1536),
    "BERT-base": Shape("BERT-base", 768, 12, 12, 3072),
}


@dataclass(frozen=True)
class Case:
    """One way of training.

    Attributes:
        name: for people.
        fields: of the `PruningConfig`; None for what is not ours.
        naive: block of the naive module; None where it is not that.
    """

    name: str
    fields: dict[str, Any] | None = None
    naive: tuple[int, int] | None = None


def _ours(name: str, **fields: Any) -> Case:
    return Case(name, {"density": DENSITY, **fields})


DENSE = Case("dense")
MOVEMENT = _ours("movement", score_init="magnitude")
ACCUMULATING = _ours(
    "movement, accumulate", score_init="magnitude", criterion_options={"accumulate": 1}
)
BLOCKS = _ours("movement, 32 x 32", score_init="magnitude", granularity=BLOCK)
GLOBAL = _ours("movement, global", score_init="magnitude", scope="global")
NAIVE = Case("naive movement", naive=(1, 1))
OURS = (DENSE, MOVEMENT, ACCUMULATING, BLOCKS, GLOBAL)
MAIN = (*OURS, NAIVE)
COMPILED = (DENSE, MOVEMENT, BLOCKS, NAIVE)
ALL = (
    *MAIN,
    Case("naive movement, 32 x 32", naive=BLOCK),
    _ours("movement, 32 x 32, global", score_init="magnitude", granularity=BLOCK, scope="global"),
    *(
        _ours(f"{criterion}{', 32 x 32' if blocks else ''}", criterion=criterion, **blocks)
        for criterion, blocks in itertools.product(
            ("soft_movement", "magnitude", "l0", "saliency", "ema_magnitude", "platon", "random"),
            ({}, {"granularity": BLOCK}),
        )
    ),
    *(
        _ours(f"{criterion}, global", criterion=criterion, scope="global")
        for criterion in ("magnitude", "saliency", "ema_magnitude", "platon")
    ),
)
SECOND_ORDER = (DENSE, _ours("second_order", criterion="second_order"))
"""Apart from the others: its Fisher matrices are 50 numbers a weight."""


@dataclass
class Step:
    """A model, its optimizer and schedule, ready for one training step after the other."""

    model: nn.Module
    call: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    batch: Batch
    scheduler: mvpfx.SparsityScheduler | None = None
    naive: list[NaiveLinear] = field(default_factory=list[NaiveLinear])

    def __call__(self) -> float:
        """One step; milliseconds."""
        synchronize()
        start = time.perf_counter()
        loss = self.call(**self.batch).loss
        if self.scheduler is not None:
            loss = loss + mvpfx.penalty(self.model)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        synchronize()
        return 1000 * (time.perf_counter() - start)


def make_step(
    case: Case, shape: Shape, tokens: int, device: torch.device, compiled: bool = False
) -> Step:
    """A case in training mode, in the middle of its run, with fused AdamW."""
    model = shape.model(device).train()
    scheduler = None
    if case.naive is not None:
        prune_naively(model, DENSITY, case.naive)
    if case.fields is not None:
        mvpfx.prepare(model, mvpfx.PruningConfig(**case.fields))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a run of random data is too short for anything
            scheduler = mvpfx.SparsityScheduler(model, STEPS)
        groups = mvpfx.parameter_groups(model, lr=1e-5)
        state = scheduler.state_dict()
        scheduler.load_state_dict({**state, "step_count": DONE})
    else:
        groups = [{"params": list(model.parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True)
    call = torch.compile(model) if compiled else model
    return Step(model, call, optimizer, shape.batch(tokens, device), scheduler)


def peak_bytes(make: Callable[[], Step], device: torch.device, steps: int = 3) -> int:
    """Most bytes of tensors that are alive at once in a step, parameters and optimizer included.

    On a CPU torch's allocations are added up, as its profiler sees them; what else the process
    holds, and what a C library keeps for later, does not count. What lay in reference cycles
    before is freed first: freed on the way it would count as memory given back.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        step = make()
        for number in range(steps):
            if number == steps - 1:
                torch.cuda.reset_peak_memory_stats(device)
            step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = make()
        for _ in range(steps - 1):
            step()
        with torch.profiler.record_function("last step"):
            step()
    return peak_of(profiler, "last step")


def peak_of(profiler: Any, label: str) -> int:
    """Most bytes alive at once within a labelled range, of all that was allocated since the start
    of the profile.
    """
    events: Any = profiler.profiler.kineto_results.events()
    marks = [event for event in events if event.name() == label]
    start, end = marks[0].start_ns(), marks[0].end_ns()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    held = most = 0
    for at, change in changes:
        if at > start:
            most = max(most, held)
        if at > end:
            break
        held += change
    return most
