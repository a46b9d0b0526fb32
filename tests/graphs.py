"""Programs for the tests of passes: a module, a batch, and its recorded graphs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mvpfx.passes.capture import Capture
from mvpfx.pipeline import Decision, Pass, Record, run
from mvpfx.program import Program
from mvpfx.site import Site
from mvpfx.weights import layer_sites


def program_of(model: nn.Module, batch: Any, sites: list[Site] | None = None) -> Program:
    """The program of a model captured on a batch, with every known layer as a site."""
    found = list(layer_sites(model)) if sites is None else sites
    program = Program(model.eval(), sites={site.name: site for site in found})
    captured, _ = run((Capture(example_inputs=batch),), program)
    return captured


def apply(step: Pass, program: Program) -> tuple[Program, tuple[Decision, ...]]:
    """Run one pass; also checks that a second run of it decides and changes nothing new."""
    result, records = run((step,), program)
    _, again = run((step,), result)
    assert not again[0].modified, f"{step.name} is not idempotent: {again[0].decisions}"
    return result, records[0].decisions


def built(program: Program) -> nn.Module:
    """The model that a program describes."""
    return program.build(copy.deepcopy(program.model)).eval()


def outputs(model: nn.Module, batch: Any) -> Tensor:
    """What a model gives for a batch: logits, the last hidden state, or the tensor itself."""
    with torch.no_grad():
        result = model(**batch) if isinstance(batch, dict) else model(batch)
    for name in ("logits", "last_hidden_state"):
        if hasattr(result, name):
            return getattr(result, name)
    return result


def assert_same(program: Program, batch: Any, tolerance: float = 1e-5) -> nn.Module:
    """The built model computes what the program's model does; returns it."""
    model = built(program)
    difference = (outputs(model, batch) - outputs(program.model, batch)).abs().max()
    assert difference.item() <= tolerance
    return model


def applied(decisions: tuple[Decision, ...]) -> list[str]:
    return [f"{d.site}: {d.reason}" for d in decisions if d.applied]


def declined(decisions: tuple[Decision, ...]) -> list[str]:
    return [f"{d.site}: {d.reason}" for d in decisions if not d.applied]


def last(records: list[Record]) -> tuple[Decision, ...]:
    return records[-1].decisions


def mlp(activation: nn.Module, width: int = 8, bias: bool = True) -> nn.Sequential:
    """Linear, activation, linear: 4 -> width -> 3, seeded, with biases that are not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), activation, nn.Linear(width, 3, bias=bias))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def zero_(tensor: Tensor) -> None:
    """Set a (slice of a) parameter to zero."""
    with torch.no_grad():
        tensor.zero_()


def linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
