import re

import pytest
import torch
from torch import Tensor, nn

from mvpfx import convert
from mvpfx.comparison import Comparison, compare_models
from mvpfx.cost import Quartiles
from mvpfx.kernels.library import LIBRARY
from mvpfx.passes.choose_storage import ChooseStorage
from mvpfx.passes.shrink_dims import ShrinkDims
from mvpfx.pipeline import run
from mvpfx.program import Program
from tests.graphs import applied, apply, declined, mlp, program_of, zero_

X = torch.linspace(-1, 1, 64 * 128).view(64, 128)
FASTEST = "csr" if LIBRARY is None else "native"
"""Of unstructured zeros at a low density."""


def sparse_model(density: float, size: int = 1024) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, size), nn.ReLU(), nn.Linear(size, size))
    with torch.no_grad():
        for name in ("0.weight", "2.weight"):
            weight = model.get_parameter(name)
            weight.mul_(torch.rand_like(weight) < density)
    return model


def untimed(model: nn.Module, batch: Tensor = X) -> Program:
    program = program_of(model, batch)
    program.tokens = {}
    return program


def test_without_token_counts_the_table_decides() -> None:
    program, decisions = apply(ChooseStorage(), untimed(sparse_model(0.02)))
    assert program.storages["2.weight"] == FASTEST
    text = applied(decisions)[1]
    assert text.startswith("2.weight: from the table at 128 tokens: csr density 0.020 < break-even")
    assert program.timings == {}


def test_a_dense_weight_stays_dense_unmeasured() -> None:
    program, decisions = apply(ChooseStorage(), program_of(sparse_model(0.9), X))
    assert set(program.storages.values()) == {"dense"}
    assert applied(decisions)[1] == "2.weight: density 0.90 is too high for sparse storage"


def test_with_token_counts_it_is_measured() -> None:
    program = program_of(sparse_model(0.01), X)
    program.tokens = {"2.weight": 64}
    program, decisions = apply(ChooseStorage(rounds=3), program)
    assert program.storages["2.weight"] == FASTEST
    pattern = (
        r"2\.weight: measured at 64 tokens, density 0\.01: dense \d+\.\d{3} ms, csr \d+\.\d{3} ms"
    )
    pattern += "" if LIBRARY is None else r", native \d+\.\d{3} ms"
    assert re.fullmatch(pattern, applied(decisions)[1])
    timing = program.timings["2.weight"]
    assert timing.tokens == 64
    assert timing.after_ms(program.storages["2.weight"]) < timing.before_ms


def test_a_shrunken_weight_is_reduced() -> None:
    model = mlp(nn.ReLU())
    zero_(model.get_parameter("0.weight")[:4])
    program, _ = run((ShrinkDims(), ChooseStorage("dense")), program_of(model, X[:, :4]))
    assert program.storages == {"0.weight": "reduced", "2.weight": "reduced"}


def test_a_forced_storage_is_declined_where_it_cannot_be() -> None:
    model = nn.Sequential(nn.Conv1d(64, 4, 1), nn.Flatten(), nn.Linear(512, 6), nn.Linear(6, 6))
    program, decisions = apply(ChooseStorage("bsr"), untimed(model, X.view(1, 64, 128)))
    assert program.storages == dict.fromkeys(program.sites, "dense")
    assert declined(decisions) == [
        "0.weight: a weight of 3 dimensions has no sparse storage; stays dense",
        "2.weight: no block size tiles 6 x 512; stays dense",
        "3.weight: no block size tiles 6 x 6; stays dense",
    ]


class Odd(nn.Module):
    """Linear layers that are used in other ways than by calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.peeked, self.hooked = (nn.Linear(4, 4) for _ in range(3))
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.plain.weight
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(self.plain(x)) + self.peeked.weight.sum()
        x = self.hooked(self.peeked(x))
        return self.attention(x, x, x, need_weights=False)[0]


def test_declines_say_why() -> None:
    model = Odd()
    program = untimed(model, torch.zeros(2, 3, 4))
    model.hooked.register_forward_hook(lambda module, args, out: None)
    _, decisions = apply(ChooseStorage("csr"), program)
    reasons = dict(text.split(": ", 1) for text in declined(decisions))
    assert reasons["plain.weight"] == "tied to tied.weight; stays dense"
    assert reasons["peeked.weight"] == "its weight is also read outside its module; stays dense"
    assert reasons["attention.in_proj_weight"] == (
        "held by MultiheadAttention, which is not a linear layer; stays dense"
    )
    assert reasons["attention.out_proj.weight"] == "no graph shows how it is used; stays dense"
    assert reasons["hooked.weight"] == "its module has hooks; stays dense"


def test_an_unknown_lowering_is_an_error() -> None:
    message = "unknown lowering 'coo'; needed one of: auto, dense, csr, bsr, native."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ChooseStorage("coo")


def test_a_named_storage_leaves_dense_sites_alone_where_told_to() -> None:
    model = sparse_model(0.02, size=64)
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(1)
    step = ChooseStorage("csr", highest_density=0.6, why="a test says so")
    program, decisions = apply(step, program_of(model, X))
    assert program.storages == {"0.weight": "dense", "2.weight": "csr"}
    reason = "0.weight: density 1.00 is too high for sparse storage; stays dense"
    assert declined(decisions) == [reason]
    assert applied(decisions) == ["2.weight: a test says so"]


@pytest.mark.skipif(LIBRARY is None, reason="without native kernels csr is what there is")
@pytest.mark.parametrize(("csr_ms", "tried"), [(1.1, True), (2.0, False)])
def test_csr_is_tried_for_a_whole_model_where_it_comes_near(
    csr_ms: float, tried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []

    def measure(*_: object) -> dict[str, Quartiles]:
        times = {"dense": 3.0, "csr": csr_ms, "native": 1.0}
        return {name: Quartiles(ms, ms, ms) for name, ms in times.items()}

    def compare(source: nn.Module, versions: dict[str, nn.Module], batch: Tensor) -> Comparison:
        compared.extend(versions)
        return compare_models(source, versions, batch)

    monkeypatch.setattr("mvpfx.passes.choose_storage.measure_storages", measure)
    monkeypatch.setattr("mvpfx.conversion.compare_models", compare)
    convert(sparse_model(0.1, 128), example_inputs=X)
    assert ("all csr" in compared) == tried and compared.count("dense") == 1
