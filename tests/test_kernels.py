"""Native kernels against float64, on every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_rate import entering, multiplying
from mvpfx.kernels.chain import Chain
from mvpfx.kernels.library import INSTRUCTIONS, LIBRARY, MISSING, isa, tile_tokens, use_isa
from mvpfx.kernels.step import Part, Place, Step
from mvpfx.storage import SparseLinear
from tests.kernels import largest

pytestmark = [
    pytest.mark.skipif(LIBRARY is None, reason=MISSING),
    pytest.mark.usefixtures("instructions", "fixed_inference"),
]

SHAPES = ((128, 64), (1, 7), (3, 77, 96), (2, 33, 130), (5, 16, 48), (1, 1, 5), (2, 3, 65, 31))
"""Of activations: whole tiles, single tokens, sequences that fill no chunk, odd features."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
}


def through(x: Tensor, *middle: Step, width: int, others: tuple[Tensor, ...] = ()) -> Tensor:
    """What steps between entering and leaving make of `x` (value 0) as value 1; other tensors enter
    as values 2, 3 and so on.
    """
    columns = x.shape[-1]
    places = [Place(columns, offset=0), Place(width, offset=columns)]
    steps = [Step("enter", None, Part(0, 0, columns), (0,))]
    for number, other in enumerate(others, 2):
        features = other.shape[-1]
        steps.append(Step("enter", None, Part(number, 0, features), (number,)))
        end = (places[-1].offset or 0) + places[-1].features
        places.append(Place(features, offset=end))
    steps += [*middle, Step("leave", Part(1, 0, width), None)]
    return Chain(steps, places, ())(x, *ARGUMENTS, *others)[0]


ARGUMENTS: list[object] = []
"""The sparse layer or norm weight that the steps refer to as argument 1."""


def multiplied(layer: SparseLinear, x: Tensor, **after: str | Tensor) -> Tensor:
    """The product; `activation`, `factor` and `addend` where they are given."""
    ARGUMENTS[:] = [layer]
    rows, others = layer.out_features, tuple(t for t in after.values() if isinstance(t, Tensor))
    activation = after.get("activation")
    factor, addend = (Part(2, 0, rows), Part(3, 0, rows)) if others else (None, None)
    step = Step(
        "multiply",
        Part(0, 0, x.shape[-1]),
        Part(1, 0, rows),
        (1,),
        activation if isinstance(activation, str) else None,
        factor,
        addend,
    )
    return through(x, step, width=rows, others=others)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activations_enter_and_leave_as_they_are(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    ARGUMENTS[:] = [None]
    copy = Step("combine", Part(0, 0, shape[-1]), Part(1, 0, shape[-1]))
    assert torch.equal(through(x, copy, width=shape[-1]), x)
    assert torch.equal(through(x.bfloat16(), copy, width=shape[-1]), x.bfloat16())
    wide = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    assert torch.equal(through(wide, copy, width=shape[-1]), wide)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_torch(name: str) -> None:
    x = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, 87.0, -200.0])))
    ARGUMENTS[:] = [None]
    step = Step("combine", Part(0, 0, 1), Part(1, 0, 1), activation=name)
    found = through(x[:, None], step, width=1)[:, 0]
    wanted = ACTIVATIONS[name](x.double())
    assert largest(found, wanted) <= 2e-6
    lost = through(torch.full((20, 1), float("nan")), step, width=1)
    assert lost.isnan().all()


def norm(width: int, centred: bool, heads: int = 1, shift: float = 0.0) -> Step:
    """A norm of value 0 as value 1, with the call's weight and, where it is centred, its bias."""
    return Step(
        "normalize",
        Part(0, 0, width),
        Part(1, 0, width),
        (1, 2 if centred else -1),
        epsilon=1e-5,
        centred=centred,
        heads=heads,
        shift=shift,
    )


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[-1] > 1], ids=str)
@pytest.mark.parametrize("centred", [True, False])
def test_norms(shape: tuple[int, ...], centred: bool) -> None:
    x, width = 3 + 5 * torch.randn(shape), shape[-1]
    weight, bias = torch.randn(width), torch.randn(width)
    ARGUMENTS[:] = [weight, bias]
    found = through(x, norm(width, centred), width=width)
    x, weight, bias = x.double(), weight.double(), bias.double()
    wanted = F.layer_norm(x, (width,), weight, bias) if centred else None
    wanted = F.rms_norm(x, (width,), weight, 1e-5) if wanted is None else wanted
    assert largest(found, wanted) <= 2e-5


@pytest.mark.parametrize("shape", [(2, 3, 32), (1, 64, 48), (3, 100, 80)], ids=str)
@pytest.mark.parametrize("centred", [True, False])
def test_norms_of_heads(shape: tuple[int, ...], centred: bool) -> None:
    """Each head by itself, with one weight for all, to which a number is added."""
    x, width, heads = 3 + 5 * torch.randn(shape), shape[-1], 4
    weight, bias = torch.randn(width // heads), torch.randn(width // heads)
    ARGUMENTS[:] = [weight, bias]
    found = through(x, norm(width, centred, heads, shift=1.0), width=width)
    x, weight, bias = x.double().unflatten(-1, (heads, -1)), weight.double() + 1, bias.double()
    size = x.shape[-1:]
    wanted = F.layer_norm(x, size, weight, bias) if centred else F.rms_norm(x, size, weight, 1e-5)
    assert largest(found, wanted.flatten(-2)) <= 2e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.03, 0.2, 1.0])
def test_sparse_weights(shape: tuple[int, ...], density: float) -> None:
    x, columns = torch.randn(shape), shape[-1]
    for rows in (1, 33, 768):
        weight = torch.randn(rows, columns) * (torch.rand(rows, columns) < density)
        layer = SparseLinear.from_dense(weight, torch.randn(rows))
        assert layer.bias is not None
        wanted = F.linear(x.double(), weight.double(), layer.bias.double())
        bound = 1e-6 * (1 + columns)
        assert largest(multiplied(layer, x), wanted) <= bound
        factor, addend = torch.randn(*shape[:-1], rows), torch.randn(*shape[:-1], rows)
        found = multiplied(layer, x, activation="gelu", factor=factor, addend=addend)
        assert largest(found, F.gelu(wanted) * factor + addend) <= 10 * bound


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (32, 32)], ids=str)
def test_bfloat16_is_summed_in_float32(shape: tuple[int, ...], block: tuple[int, int]) -> None:
    """One large sum, which bfloat16 alone would lose what is small of."""
    columns = shape[-1]
    for rows in (3, 800):
        grid = torch.rand(-(-rows // block[0]), -(-columns // block[1])) < 0.4
        mask = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :columns]
        weight = (torch.randn(rows, columns) * mask).bfloat16()
        x, bias = torch.randn(shape).bfloat16(), torch.randn(rows).bfloat16()
        wanted = F.linear(x.double(), weight.double(), bias.double())
        found = multiplied(SparseLinear.from_dense(weight, bias), x)
        assert found.dtype is torch.bfloat16
        assert ((found - wanted).abs() <= 2**-8 * wanted.abs() + 1e-5).all()


@pytest.mark.parametrize("block", [1, 4, 32])
@pytest.mark.parametrize("density", [0.03, 0.1, 1.0])
def test_bfloat16_in_many_columns(block: int, density: float) -> None:
    """Columns that lie side by side and columns that do not, in groups that are full or are not."""
    kept = torch.rand(-(-789 // block), -(-1203 // block)) < density
    mask = kept.repeat_interleave(block, 0).repeat_interleave(block, 1)[:789, :1203]
    weight = (torch.randn(789, 1203) * mask).bfloat16()
    x, bias = torch.randn(2, 83, 1203).bfloat16(), torch.randn(789).bfloat16()
    wanted = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    found = multiplied(SparseLinear.from_dense(weight, bias), x, activation="gelu")
    assert ((found - wanted).abs() <= 2**-8 * wanted.abs() + 1e-4).all()


@pytest.mark.parametrize("density", [0.03, 0.5])
@pytest.mark.parametrize("first", INSTRUCTIONS)
def test_what_was_packed_for_one_instruction_set_runs_on_another(
    first: str, density: float, instructions: str
) -> None:
    weight = (torch.randn(40, 900) * (torch.rand(40, 900) < density)).bfloat16()
    x = torch.randn(70, 900).bfloat16()
    try:
        use_isa(first)
    except ValueError as error:
        pytest.skip(str(error))
    layer = SparseLinear.from_dense(weight, output_layout="tiled")
    wanted = layer(x)
    use_isa(instructions)
    assert ((layer(x) - wanted).abs() <= 2**-7 * wanted.abs() + 1e-5).all()


@pytest.mark.parametrize("block", [(1, 4), (4, 1), (4, 4), (1, 16), (16, 16), (32, 32)], ids=str)
@pytest.mark.parametrize("density", [0.02, 0.1, 0.3])
def test_blocks_and_column_blocks(block: tuple[int, int], density: float) -> None:
    """More columns than are taken at once, more rows than a panel has, empty rows."""
    rows, columns = 800, 1216
    kept = torch.rand(rows // block[0], columns // block[1]) < density
    kept[:3] = False
    mask = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    weight = torch.randn(rows, columns) * mask
    x = torch.randn(2, 70, columns)
    wanted = F.linear(x.double(), weight.double())
    assert largest(multiplied(SparseLinear.from_dense(weight), x), wanted) <= 1e-4
    if block[0] == block[1]:
        stored = SparseLinear.from_dense(weight, block=block[0])
        assert largest(multiplied(stored, x), wanted) <= 1e-4


@pytest.mark.parametrize("blocks", [(4, 4), (4, 1), (1, 8, 4)], ids=str)
def test_weights_in_blocks_of_any_size_share_an_input(blocks: tuple[int, ...]) -> None:
    """As query, key and value do: rows of several weights, one below the other."""
    layers, wanted, x = list[SparseLinear](), list[Tensor](), torch.randn(2, 70, 96)
    for size, block in enumerate(blocks, 1):
        kept = torch.rand(size * 32 // block, 96 // block) < 0.2
        mask = kept.repeat_interleave(block, 0).repeat_interleave(block, 1)
        weight, bias = torch.randn(size * 32, 96) * mask, torch.randn(size * 32)
        layers.append(SparseLinear.from_dense(weight, bias, block))
        wanted.append(F.linear(x.double(), weight.double(), bias.double()))
    width = sum(layer.out_features for layer in layers)
    sources = tuple(range(1, 1 + len(layers)))
    ARGUMENTS[:] = layers
    found = through(x, Step("multiply", Part(0, 0, 96), Part(1, 0, width), sources), width=width)
    assert largest(found, torch.cat(wanted, -1)) <= 1e-4


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 1000, 2049])
def test_any_number_of_tokens(tokens: int) -> None:
    weight = torch.randn(48, 40) * (torch.rand(48, 40) < 0.3)
    layer, x = SparseLinear.from_dense(weight), torch.randn(tokens, 40)
    assert largest(multiplied(layer, x), F.linear(x.double(), weight.double())) <= 1e-4


def test_threads_share_the_work(instructions: str) -> None:
    weight = torch.randn(1600, 96) * (torch.rand(1600, 96) < 0.2)
    layer = SparseLinear.from_dense(weight)
    one = {t: multiplied(layer, torch.ones(t, 96)) for t in (16, 64, 300)}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for tokens, wanted in one.items():
            assert torch.equal(multiplied(layer, torch.ones(tokens, 96)), wanted)
    finally:
        torch.set_num_threads(before)


def test_an_unknown_instruction_set() -> None:
    message = f'^instruction set "mmx" cannot be used: this processor\'s is {isa()}.$'
    with pytest.raises(ValueError, match=message):
        use_isa("mmx")


def test_tiles_of_another_instruction_set(instructions: str) -> None:
    """Their tokens lie otherwise where it sums more of them at once, or fewer."""
    layer = SparseLinear.from_dense(torch.eye(16))
    (tiles,) = entering(16)(torch.randn(70, 16))
    before = tile_tokens()
    use_isa("plain")
    if tile_tokens() == before:
        assert instructions == "plain"
        return
    wanted = f"^activations came in tiles of {before} tokens, which is not what plain computes in"
    with pytest.raises(RuntimeError, match=wanted):
        multiplying(16, 16)(tiles, layer)
