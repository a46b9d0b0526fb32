import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvpfx
from mvpfx.facts import is_mask_node
from mvpfx.mask import Mask
from mvpfx.passes.fold_masks import FoldMasks
from mvpfx.passes.insert_masks import InsertMasks
from mvpfx.pipeline import run
from mvpfx.program import Program, graph_text
from mvpfx.rule import Rule
from mvpfx.site import Site
from mvpfx.weights import layer_sites
from tests.graphs import applied, apply, built, declined, mlp, outputs, program_of

X = torch.linspace(-2, 2, 20).view(5, 4)
RULE = Rule(density=0.5)


def masked(program: Program) -> Program:
    """The program with a mask of density 0.5 on every site."""
    program.rules = dict.fromkeys(program.sites, RULE)
    result, _ = run((InsertMasks(),), program)
    for module in result.modules.values():
        assert isinstance(module, Mask)
        module.density = 0.5
    return result


def test_the_weight_becomes_what_the_matmul_sees() -> None:
    program = masked(program_of(mlp(nn.ReLU()), X))
    raw = program.model.get_parameter("0.weight").clone()
    assert any(is_mask_node(node) for _, node in program.nodes())
    folded, decisions = apply(FoldMasks(), program)
    assert applied(decisions) == ["0.weight: density 0.5000", "2.weight: density 0.5000"]
    assert graph_text(folded.graphs[""]).splitlines()[1:4] == [
        "%_0_weight = get_attr[0.weight]",
        "%_0_bias = get_attr[0.bias]",
        "%linear = linear(%a0, %_0_weight, %_0_bias)",
    ]
    mask = program.module("0.weight_mask")
    value = folded.parameter("0.weight")
    assert isinstance(mask, Mask)
    assert value is not None
    assert torch.equal(value, raw * mask.mask())
    assert torch.equal(program.model.get_parameter("0.weight"), raw)


def test_a_model_without_masks_has_nothing_to_fold() -> None:
    program, decisions = apply(FoldMasks(), program_of(mlp(nn.ReLU()), X))
    assert decisions == ()
    assert program.parameters == {}


class Tied(nn.Module):
    """A language model in small: the output layer's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def test_a_tied_lookup_keeps_the_raw_weight() -> None:
    ids = torch.arange(6)
    program = program_of(Tied(), ids)
    weight = program.model.get_parameter("embed.weight")
    (site,) = layer_sites(program.model)
    assert site == Site("head.weight", (6, 4), 0, ("embed.weight",))
    folded, decisions = apply(FoldMasks(), masked(program))
    assert applied(decisions) == [
        "head.weight: density 0.5000; embed.weight keeps the raw weight and is no longer tied"
    ]
    small = built(folded)
    assert torch.equal(small.get_parameter("embed.weight"), weight)
    expected = F.linear(F.embedding(ids, weight), small.get_parameter("head.weight"))
    assert torch.equal(outputs(small, ids), expected)


def test_a_weight_read_raw_and_masked_under_one_name_is_declined() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 4))

        def forward(self, ids: Tensor) -> Tensor:
            return F.embedding(ids, self.table) @ self.table.t()

    program = program_of(Both(), torch.arange(6), sites=[Site("table", (6, 4))])
    folded, decisions = apply(FoldMasks(), masked(program))
    assert declined(decisions) == ["table: table is read with its mask and, elsewhere, without it"]
    assert folded.unfolded == {"table"}
    assert folded.parameters == {}


def test_a_prepared_model_folds_to_the_same_outputs() -> None:
    model, config = mlp(nn.GELU()), mvpfx.PruningConfig(density=0.25)
    mvpfx.prepare(model, config)
    mvpfx.SparsityScheduler(model, total_steps=2).step()
    model.eval()
    small = mvpfx.convert(model, example_inputs=X, lowering="dense")
    torch.testing.assert_close(outputs(small, X), outputs(model, X))
    assert not any(isinstance(m, Mask) for m in small.modules())
