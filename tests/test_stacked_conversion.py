"""Experts stored in one tensor through convert: what none of them uses goes, in any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mvpfx
from mvpfx.passes.shrink_dims import ShrinkDims
from mvpfx.program import Program
from tests.dead_units import unexplained
from tests.graphs import applied, apply, assert_same, declined, program_of
from tests.test_stacked import gpt_oss, mixtral

PREFIX = "model.layers.0.mlp.experts"


def batch_of(found: tuple[nn.Module, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    model, batch = found
    return model.eval(), {"input_ids": batch["input_ids"]}


def kill_columns(model: nn.Module, live: list[int], transposed: bool = False) -> None:
    """Let each expert read as many of its hidden units as `live` says, another choice each."""
    generator = torch.Generator().manual_seed(0)
    stack = model.get_parameter(f"{PREFIX}.down_proj")
    with torch.no_grad():
        for expert, count in zip(stack, live, strict=True):
            dead = torch.randperm(48, generator=generator)[count:]
            (expert.mT if not transposed else expert)[dead] = 0


def shape(program: Program, name: str) -> tuple[int, ...]:
    value = program.parameter(f"{PREFIX}.{name}")
    assert value is not None
    return tuple(value.shape)


def test_each_expert_keeps_its_own_units() -> None:
    model, batch = batch_of(mixtral("grouped_mm"))
    kill_columns(model, [9, 20, 13, 17])
    program, decisions = apply(ShrinkDims(), program_of(model, batch))
    assert applied(decisions) == [
        f"{PREFIX}.down_proj: experts keep 9 to 20 of 48 units, live ones first",
        f"{PREFIX}.gate_up_proj: 4 x 96 x 32 -> 4 x 40 x 32",
        f"{PREFIX}.down_proj: 4 x 32 x 48 -> 4 x 32 x 20",
    ]
    assert [text for text in declined(decisions) if "experts" in text] == [
        f"{PREFIX}.gate_up_proj: 42 slices of single experts are zero, but experts are stored in "
        "one tensor, and others need them",
        f"{PREFIX}.down_proj: 21 slices of single experts are zero, but experts are stored in one "
        "tensor, and others need them",
    ]
    small: Any = assert_same(program, batch, 1e-6)
    for implementation in ("eager", "batched_mm"):
        small.set_experts_implementation(implementation)
        with torch.no_grad():
            found, expected = small(**batch).logits, model(**batch).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_units_die_in_what_makes_them_too() -> None:
    model, batch = batch_of(mixtral("grouped_mm"))
    kill_columns(model, [48, 30, 30, 30])
    with torch.no_grad():
        model.get_parameter(f"{PREFIX}.gate_up_proj")[0, 5:40] = 0  # 35 gates, so their units
    program, decisions = apply(ShrinkDims(), program_of(model, batch))
    assert applied(decisions)[0] == (
        f"{PREFIX}.down_proj: experts keep 13 to 30 of 48 units, live ones first"
    )
    # 30 units would be rows of 120 bytes, and the kernel takes multiples of 16 alone.
    assert shape(program, "down_proj") == (4, 32, 32)
    assert_same(program, batch, 1e-6)


@pytest.mark.parametrize(("multiple", "kept"), [(1, 28), (8, 32), (16, 32)])
def test_sizes_are_multiples_of_what_kernel_and_user_ask_for(multiple: int, kept: int) -> None:
    model, batch = batch_of(mixtral("grouped_mm"))
    kill_columns(model, [25, 25, 25, 25])
    program, _ = apply(ShrinkDims(multiple_of=multiple), program_of(model, batch))
    assert shape(program, "gate_up_proj") == (4, 2 * kept, 32)
    assert shape(program, "down_proj") == (4, 32, kept)
    assert_same(program, batch, 1e-6)


def test_gates_that_alternate_with_biases_by_expert() -> None:
    model, batch = batch_of(gpt_oss())
    kill_columns(model, [10, 20, 15, 20], transposed=True)
    with torch.no_grad():
        model.get_parameter(f"{PREFIX}.gate_up_proj_bias").normal_()
        model.get_parameter(f"{PREFIX}.down_proj_bias").normal_()
    program, decisions = apply(ShrinkDims(), program_of(model, batch))
    assert applied(decisions) == [
        f"{PREFIX}.down_proj: experts keep 10 to 20 of 48 units, live ones first",
        f"{PREFIX}.gate_up_proj_bias: 4 x 96 -> 4 x 40",
        f"{PREFIX}.gate_up_proj: 4 x 32 x 96 -> 4 x 32 x 40",
        f"{PREFIX}.down_proj: 4 x 48 x 32 -> 4 x 20 x 32",
    ]
    assert_same(program, batch, 1e-6)


def test_units_that_no_expert_has_go_where_weights_are_chosen_by_token() -> None:
    model, batch = batch_of(mixtral("batched_mm"))
    with torch.no_grad():
        model.get_parameter(f"{PREFIX}.down_proj")[:, :, 4:24] = 0
    program, decisions = apply(ShrinkDims(), program_of(model, batch))
    assert applied(decisions) == [
        f"{PREFIX}.gate_up_proj: 4 x 96 x 32 -> 4 x 56 x 32",
        f"{PREFIX}.down_proj: 4 x 32 x 48 -> 4 x 32 x 28",
    ]
    assert_same(program, batch, 1e-6)


def test_a_dead_expert_stays_where_the_router_sends_tokens_to_it() -> None:
    model, batch = batch_of(mixtral("grouped_mm"))
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            model.get_parameter(f"{PREFIX}.{name}")[2] = 0
    _, decisions = apply(ShrinkDims(), program_of(model, batch))
    assert applied(decisions) == []
    assert declined(decisions) == [
        f"{PREFIX}.{name}: 1 of 4 experts are zero, but the router sends tokens to them"
        for name in ("gate_up_proj", "down_proj")
    ]


def test_a_loop_over_experts_is_in_no_graph() -> None:
    model, batch = batch_of(mixtral("eager"))
    kill_columns(model, [24] * 4)
    small = mvpfx.convert(model, example_inputs=batch, lowering="dense")
    reasons = [d.reason for d in mvpfx.report_of(small).decisions if d.site.endswith("down_proj")]
    assert "96 slices of single experts are zero, but no graph shows how it is used" in reasons
    assert unexplained(small) == []


class Scaled(nn.Module):
    """A scale for each hidden unit, the same in all experts."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def test_units_that_differ_between_the_stacks_are_not_reordered() -> None:
    model, batch = batch_of(mixtral("grouped_mm"))
    kill_columns(model, [9, 20, 13, 17])
    model.get_submodule(PREFIX).act_fn = Scaled(48)
    program, decisions = apply(ShrinkDims(), program_of(model, batch))
    assert not [text for text in applied(decisions) if "live ones first" in text]
    assert_same(program, batch, 1e-6)
