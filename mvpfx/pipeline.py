"""Passes, decisions, and the runner that makes a pipeline of passes safe to use.

A pass is a frozen dataclass whose fields are its options. It names the facts it needs and the
facts it makes true, changes the copy of the program it is given, and yields one `Decision` for
everything it did or declined. The runner does the rest, so a pass cannot forget it: the order is
checked before any graph is touched, the input stays as it was, graphs are linted, the facts are
checked on the result, and whether anything changed is derived by comparing.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mvpfx.facts import fact, find_fact
from mvpfx.program import Program, graph_text

__all__ = ["Decision", "Pass", "Record", "check_order", "fact", "record_text", "run"]


@dataclass(frozen=True)
class Decision:
    """One thing a pass did at a site, or declined to do, and why."""

    site: str
    action: str
    applied: bool
    reason: str

    def __str__(self) -> str:
        sign = "+" if self.applied else "-"
        return f"{sign} {self.site}: {self.action}: {self.reason}"


@dataclass(frozen=True)
class Pass(ABC):
    """One step of a pipeline: `apply` changes the program it is given and yields decisions."""

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    ensures: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def apply(self, program: Program) -> Iterator[Decision]:
        """Change `program` (a copy) and yield what was decided."""


@dataclass(frozen=True)
class Record:
    """What one pass did: its graphs before and after as text, its decisions and its time."""

    name: str
    before: Mapping[str, str]
    after: Mapping[str, str]
    decisions: tuple[Decision, ...]
    seconds: float
    modified: bool


def run(
    passes: Sequence[Pass],
    program: Program,
    print_between: Callable[[str], object] | bool = False,
) -> tuple[Program, list[Record]]:
    """Run `passes` in order; return the resulting program and one record a pass.

    Args:
        passes: the pipeline.
        program: left as it is.
        print_between: True prints the graphs after every pass; a callable is given the text.

    Raises:
        ValueError: a pass requires a fact that no earlier pass ensures and that does not hold;
            raised before any pass runs.
        RuntimeError: a pass left a broken graph, or does not ensure what it declares. The
            message names the pass and those that ran before it.
    """
    check_order(passes, program)
    records: list[Record] = []
    for step in passes:
        program, record = _run_one(step, program, [r.name for r in records])
        records.append(record)
        if print_between:
            show = print_between if callable(print_between) else print
            show(record_text(record))
    return program, records


def check_order(passes: Sequence[Pass], program: Program) -> None:
    """Raise ValueError where a pass requires what neither holds nor is ensured before it."""
    ensured: set[str] = set()
    for index, step in enumerate(passes):
        for needed in step.requires:
            if needed in ensured:
                continue
            reason = find_fact(needed)(program)
            if reason is not None:
                before = ", ".join(p.name for p in passes[:index]) or "nothing"
                raise ValueError(
                    f"pass {step.name} requires {needed!r}, which does not hold: {reason}. "
                    f"Before it: {before}. Put a pass that ensures {needed!r} earlier."
                )
        ensured.update(step.ensures)


def record_text(record: Record) -> str:
    """Return a record as text: the decisions, then each graph that changed."""
    lines = [f"== {record.name} ({record.seconds * 1e3:.0f} ms)"]
    lines += [str(d) for d in record.decisions]
    for region, text in record.after.items():
        if record.before.get(region) != text:
            lines += [f"-- {region or '(root)'}", text]
    return "\n".join(lines)


def _run_one(step: Pass, program: Program, ran: list[str]) -> tuple[Program, Record]:
    where = f"pass {step.name} (after {', '.join(ran) or 'no other pass'})"
    before, old = _texts(program), program
    program = program.copy()
    start = time.perf_counter()
    decisions = tuple(step.apply(program))
    seconds = time.perf_counter() - start
    for region, graph in program.graphs.items():
        try:
            graph.lint()
        except RuntimeError as error:
            raise RuntimeError(f"{where} left a broken graph in {region!r}: {error}") from error
    for name in step.ensures:
        reason = find_fact(name)(program)
        if reason is not None:
            raise RuntimeError(f"{where} declares that it ensures {name!r}, but {reason}")
    after = _texts(program)
    modified = before != after or _overlay(old) != _overlay(program)
    return program, Record(step.name, before, after, decisions, seconds, modified)


def _texts(program: Program) -> dict[str, str]:
    return {region: graph_text(graph) for region, graph in program.graphs.items()}


def _overlay(program: Program) -> tuple[object, ...]:
    """What a pass can change besides graphs, comparable: tensors and modules by identity."""
    return (
        id(program.model),
        {name: id(value) for name, value in program.parameters.items()},
        {name: id(module) for name, module in program.modules.items()},
        program.attributes,
        program.regions,
        program.sites,
        list(program.rules),
        program.storages,
        program.layouts,
        program.unfolded,
    )
