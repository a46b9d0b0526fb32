import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx, nn

from mvpfx.pipeline import Decision, Pass, fact, run
from mvpfx.program import Program, copy_graph, full_name, graph_text


@fact("test_doubled")
def is_doubled(program: Program) -> str | None:
    return None if "0.weight" in program.parameters else "0.weight is as it was"


@dataclass(frozen=True)
class Double(Pass):
    name: ClassVar[str] = "double"
    ensures: ClassVar[tuple[str, ...]] = ("test_doubled",)
    lazy: bool = False

    def apply(self, program: Program) -> Iterator[Decision]:
        weight = program.parameter("0.weight")
        if weight is not None and not self.lazy:
            program.parameters["0.weight"] = weight * 2
            yield Decision("0.weight", "double", True, "asked for")


@dataclass(frozen=True)
class Look(Pass):
    name: ClassVar[str] = "look"
    requires: ClassVar[tuple[str, ...]] = ("test_doubled",)
    breaks: bool = False

    def apply(self, program: Program) -> Iterator[Decision]:
        if self.breaks:
            graph = program.graphs[""]
            first, second, *_ = graph.nodes
            second.args = ()
            graph.call_function(torch.neg, (first,))
            second.prepend(next(n for n in graph.nodes if n.op == "output"))
        yield Decision("0.weight", "look", False, "nothing to see")


def small_program() -> Program:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(2, 4)
    graph.output(graph.call_function(torch.relu, (x,)))
    return Program(nn.Sequential(nn.Linear(4, 4)), {"": graph})


def test_a_pass_changes_a_copy_and_its_record_says_what() -> None:
    program = small_program()
    result, records = run((Double(), Look()), program)
    assert program.parameters == {}
    raw, doubled = program.parameter("0.weight"), result.parameter("0.weight")
    assert raw is not None
    assert doubled is not None
    assert torch.equal(doubled, 2 * raw)
    assert [(r.name, r.modified, len(r.decisions)) for r in records] == [
        ("double", True, 1),
        ("look", False, 1),
    ]


def test_the_order_is_checked_before_anything_runs() -> None:
    shown: list[str] = []
    message = (
        "pass look requires 'test_doubled', which does not hold: 0.weight is as it was. "
        "Before it: nothing. Put a pass that ensures 'test_doubled' earlier."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run((Look(), Double()), small_program(), print_between=shown.append)
    assert shown == []


def test_ensures_is_checked_on_the_result() -> None:
    message = (
        "pass double (after double) declares that it ensures 'test_doubled', "
        "but 0.weight is as it was"
    )
    program = small_program()
    with pytest.raises(RuntimeError, match="after no other pass"):
        run((Double(lazy=True),), program)

    @dataclass(frozen=True)
    class Undo(Double):
        def apply(self, program: Program) -> Iterator[Decision]:
            program.parameters.clear()
            yield from ()

    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        run((Double(), Undo()), program)


def test_a_broken_graph_names_the_pass() -> None:
    with pytest.raises(
        RuntimeError, match=r"^pass look \(after double\) left a broken graph in ''"
    ):
        run((Double(), Look(breaks=True)), small_program())


def test_an_unknown_fact_is_an_error() -> None:
    @dataclass(frozen=True)
    class Odd(Look):
        requires: ClassVar[tuple[str, ...]] = ("no_such_fact",)

    with pytest.raises(ValueError, match=r"^unknown fact 'no_such_fact'; known facts: "):
        run((Odd(),), small_program())


def test_print_between_shows_decisions() -> None:
    shown: list[str] = []
    run((Double(),), small_program(), print_between=shown.append)
    assert shown[0].splitlines()[1:] == ["+ 0.weight: double: asked for"]


def test_copied_graphs_keep_names_and_metadata() -> None:
    graph = small_program().graphs[""]
    copied = copy_graph(graph)
    assert graph_text(copied) == "%x = placeholder\n%relu = relu(%x)\nreturn %relu"
    assert next(iter(copied.nodes)).meta["val"].shape == (2, 4)


def test_build_keeps_ties_and_requires_grad() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
            self.two.weight = self.one.weight

    model, value = Tied(), torch.ones(2, 2)
    model.one.weight.requires_grad_(False)
    program = Program(Tied())
    program.parameters = {"one.weight": value, "two.weight": value, "two.bias": torch.ones(2)}
    program.attributes["one", "out_features"] = 7
    program.build(model)
    assert model.one.weight is model.two.weight
    assert not model.one.weight.requires_grad
    assert model.two.bias.tolist() == [1, 1]
    assert model.one.out_features == 7


def test_program_reads_the_overlay_first() -> None:
    program = small_program()
    assert program.parameter("0.weight") is program.model.get_parameter("0.weight")
    program.parameters["0.weight"] = torch.zeros(1)
    assert program.density("0.weight") == 0.0
    assert program.parameter("9.weight") is None
    assert full_name("", "a.b") == "a.b"
