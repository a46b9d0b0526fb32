import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvpfx.passes.propagate_layout import PropagateLayout
from mvpfx.program import Program
from tests.graphs import applied, apply, mlp, program_of
from tests.models import build

X = torch.linspace(-2, 2, 20).view(5, 4)


def stored(model: nn.Module, batch: object, dense: tuple[str, ...] = ()) -> Program:
    """A program whose linear sites are csr, but for those named."""
    program = program_of(model, batch)
    program.storages = {name: "dense" if name in dense else "csr" for name in program.sites}
    return program


def test_no_transpose_between_sparse_layers() -> None:
    program, decisions = apply(PropagateLayout(), stored(mlp(nn.GELU()), X))
    assert program.layouts == {"0.weight": "feature_major", "2.weight": "token_major"}
    assert applied(decisions) == [
        "0.weight: read by elementwise operations and sparse layers only",
        "2.weight: read by the result of the region",
    ]


def test_a_dense_reader_is_an_edge() -> None:
    program, decisions = apply(PropagateLayout(), stored(mlp(nn.GELU()), X, ("2.weight",)))
    assert program.layouts == {"0.weight": "token_major"}
    assert applied(decisions) == ["0.weight: read by 2.weight, which is dense"]


class Gated(nn.Module):
    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.gate(x)) * self.up(x)
        return self.down(hidden + x if self.residual else hidden)


def test_a_gate_of_two_sparse_layers_keeps_the_layout() -> None:
    program, _ = apply(PropagateLayout(), stored(Gated(residual=False), X))
    assert program.layouts["up.weight"] == program.layouts["gate.weight"] == "feature_major"


def test_a_residual_is_an_edge() -> None:
    program, decisions = apply(PropagateLayout(), stored(Gated(residual=True), X))
    assert set(program.layouts.values()) == {"token_major"}
    assert "up.weight: add mixes it with other values" in applied(decisions)


def test_conv1d_of_gpt2_keeps_the_layout_through_its_views() -> None:
    model, batch = build("gpt2")
    program, _ = apply(PropagateLayout(), stored(model, batch, ("score.weight",)))
    assert program.layouts["transformer.h.0.mlp.c_fc.weight"] == "feature_major"
    assert program.layouts["transformer.h.0.attn.c_attn.weight"] == "token_major"
