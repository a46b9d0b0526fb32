"""Operations that may come first in a block, or between its layers, however they are written.

Each is run by a model on native kernels, with the net under optimisations off.
"""

# pyright: reportUnknownLambdaType=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvpfx
from mvpfx.kernels.library import LIBRARY, MISSING
from tests.test_fuse_tiles import call, regions

pytestmark = pytest.mark.skipif(LIBRARY is None, reason=MISSING)
Operation = Callable[[Any, Tensor], Tensor]


def _with_zeros(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0
    return y


OPERATIONS: dict[str, Operation] = {
    "ones kw": lambda s, x: x * torch.ones(size=(2, 64))[0],
    "zeros kw": lambda s, x: x + torch.zeros(size=(1, 64)),
    "full kw": lambda s, x: x * torch.full(size=(64,), fill_value=2.0)[None],
    "arange": lambda s, x: x + torch.arange(x.shape[1])[:, None],
    "arange kw": lambda s, x: x + torch.arange(start=0, end=64, step=1),
    "linspace": lambda s, x: x + torch.linspace(start=0, end=1, steps=64)[..., :],
    "one_hot": lambda s, x: x + F.one_hot(torch.arange(x.shape[1]) % 64, num_classes=64).float(),
    "pos slice": lambda s, x: x + s.pos[: x.shape[1]],
    "pos int": lambda s, x: x + s.pos[0],
    "pos neg": lambda s, x: x + s.pos[-1],
    "pos tuple": lambda s, x: x + s.pos[None, : x.shape[1], :],
    "pos list": lambda s, x: x + s.pos[[0, 1]].sum(0),
    "pos mask": lambda s, x: x + s.pos[s.pos[:, 0].abs() > -1][: x.shape[1]],
    "pos ellipsis": lambda s, x: x + s.pos[..., :64][: x.shape[1]],
    "pos half": lambda s, x: (
        x + torch.cat((s.pos[: x.shape[1], 32:], s.pos[: x.shape[1], :32]), -1)
    ),
    "cat kw": lambda s, x: torch.cat(tensors=(x[..., 32:], x[..., :32]), dim=-1),
    "cat neg": lambda s, x: (
        x * s.table[0] + torch.cat((-x[..., 32:], x[..., :32]), -1) * s.table[1]
    ),
    "cat of x": lambda s, x: torch.cat([x[..., :32], x[..., 32:]], dim=-1),
    "stack": lambda s, x: torch.stack([x, x])[0],
    "stack kw": lambda s, x: torch.stack(tensors=[x, x], dim=0)[1],
    "unbind": lambda s, x: torch.stack(x.unbind(1), 1),
    "unbind param": lambda s, x: x + s.table.unbind()[1],
    "split param": lambda s, x: x + s.table.split(1)[0],
    "chunk": lambda s, x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "chunk kw": lambda s, x: torch.cat(torch.chunk(input=x, chunks=2, dim=-1), -1),
    "split kw": lambda s, x: torch.cat(
        torch.split(tensor=x, split_size_or_sections=[16, 48], dim=-1), -1
    ),
    "tensor": lambda s, x: x * torch.tensor([2.0]),
    "eye": lambda s, x: x @ torch.eye(64),
    "eye kw": lambda s, x: x @ torch.eye(n=64),
    "rand-like": lambda s, x: x + torch.zeros_like(input=x),
    "new_zeros": lambda s, x: x + x.new_zeros(size=(64,)),
    "plist": lambda s, x: x + s.plist[0] * s.plist[1],
    "emb": lambda s, x: x + s.emb(torch.arange(x.shape[1]) % 7),
    "emb weight": lambda s, x: x + s.emb.weight[1],
    "sum kw": lambda s, x: torch.add(input=x, other=s.table[0]),
    "mul kw": lambda s, x: torch.mul(input=x, other=x),
    "relu kw": lambda s, x: F.relu(input=x),
    "gelu kw": lambda s, x: F.gelu(input=x, approximate="tanh"),
    "ln": lambda s, x: F.layer_norm(x, (64,)),
    "ln kw": lambda s, x: F.layer_norm(input=x, normalized_shape=[64], weight=s.table[0]),
    "ln pos": lambda s, x: F.layer_norm(x, (64,), s.table[0], s.table[1], 1e-3),
    "ln mod": lambda s, x: s.norm(x),
    "ln mod kw": lambda s, x: s.norm(input=x),
    "up kw": lambda s, x: s.down(input=s.up(input=x)),
    "transpose": lambda s, x: x.transpose(1, 2).transpose(dim0=1, dim1=2),
    "permute kw": lambda s, x: x.permute(dims=(0, 2, 1)).permute(0, 2, 1),
    "view": lambda s, x: (
        x.view(x.shape[0], -1, 4, 16).transpose(1, 2).transpose(1, 2).reshape(x.shape)
    ),
    "flatten": lambda s, x: x.flatten(0, 1).unflatten(0, (x.shape[0], x.shape[1])),
    "unflatten last": lambda s, x: x.unflatten(-1, (4, 16)).flatten(-2),
    "einops-like": lambda s, x: torch.einsum("bsf,f->bsf", x, s.table[2]),
    "where": lambda s, x: torch.where(x > 0, x, 0.1 * x),
    "masked_fill": lambda s, x: x.masked_fill(x < 0, 0.0),
    "index_select": lambda s, x: x.index_select(-1, torch.arange(63, -1, -1)),
    "index tensor": lambda s, x: x[:, torch.arange(x.shape[1])],
    "x first": lambda s, x: x + x[0],
    "x last tok": lambda s, x: x + x[:, -1:],
    "x first tok": lambda s, x: x + x[:, 0].unsqueeze(1),
    "x none": lambda s, x: x[None][0],
    "x ellipsis": lambda s, x: x[...],
    "x rev": lambda s, x: x.flip(-1),
    "roll": lambda s, x: torch.roll(input=x, shifts=1, dims=1),
    "pad": lambda s, x: F.pad(x, (0, 0, 1, 0))[:, 1:],
    "repeat": lambda s, x: x.repeat(1, 1, 2)[..., :64],
    "mean": lambda s, x: x - x.mean(-1, keepdim=True),
    "mean kw": lambda s, x: x - x.mean(dim=-1, keepdim=True),
    "rms": lambda s, x: s.table[0] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "rms kw": lambda s, x: (
        s.table[0] * (x * torch.rsqrt(torch.pow(input=x, exponent=2).mean(-1, keepdim=True) + 1e-6))
    ),
    "rmsnorm f": lambda s, x: F.rms_norm(input=x, normalized_shape=(64,)),
    "sdpa": lambda s, x: (
        F.scaled_dot_product_attention(*(x.view(*x.shape[:2], 4, 16).transpose(1, 2),) * 3)
        .transpose(1, 2)
        .reshape(x.shape)
    ),
    "sdpa kw": lambda s, x: F.scaled_dot_product_attention(query=x, key=x, value=x),
    "dropout": lambda s, x: F.dropout(x, 0.5, False),
    "dropout kw": lambda s, x: F.dropout(input=x, p=0.5, training=False),
    "to": lambda s, x: x.to(torch.float32),
    "to kw": lambda s, x: x.to(dtype=torch.float32),
    "double": lambda s, x: x.double().float(),
    "type_as": lambda s, x: x.type_as(s.table),
    "clone": lambda s, x: torch.clone(input=x),
    "inplace add": lambda s, x: (x * 1).add_(1.0),
    "inplace mul t": lambda s, x: (x * 1).mul_(s.table[0]),
    "setitem": lambda s, x: _with_zeros(x),
    "sigmoid gate": lambda s, x: x * torch.sigmoid(1.702 * x),
    "silu": lambda s, x: x * torch.sigmoid(input=x),
    "tanh gelu": lambda s, x: (
        0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x.pow(3))))
    ),
    "softmax": lambda s, x: torch.softmax(x, dim=-1),
    "cumsum": lambda s, x: x.cumsum(1),
    "size mul": lambda s, x: x * x.shape[1],
    "sqrt size": lambda s, x: x * (x.size(-1) ** -0.5),
    "scalar add": lambda s, x: 1 + x,
    "rsub": lambda s, x: 1 - x,
    "neg": lambda s, x: -x,
    "broadcast": lambda s, x: torch.broadcast_tensors(x, s.table[0])[0],
    "meshgrid": lambda s, x: (
        x + torch.meshgrid(torch.arange(x.shape[1]), torch.arange(64), indexing="ij")[1]
    ),
    "outer": lambda s, x: x + torch.outer(torch.arange(x.shape[1]).float(), s.table[0]),
    "bucketize": lambda s, x: x + torch.bucketize(x, torch.tensor([0.0])).float(),
    "topk": lambda s, x: x + torch.topk(input=x, k=1)[0],
    "max": lambda s, x: x + x.max(dim=-1, keepdim=True)[0],
    "max val": lambda s, x: x + x.max(-1, True).values,
    "sort": lambda s, x: torch.sort(x)[0],
    "swapaxes": lambda s, x: x.swapaxes(1, 2).swapaxes(1, 2),
    "T": lambda s, x: x.mT.mT,
    "0d": lambda s, x: x * torch.tensor(2.0)[...],
    "0d chunk": lambda s, x: x * s.table.sum().unsqueeze(0).chunk(1)[0],
}
GROUPS = [list(OPERATIONS)[start::8] for start in range(8)]


class Block(nn.Module):
    """A sparse pair of layers with an operation before, between or behind them."""

    def __init__(self, first: Operation, where: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        self.first, self.where = first, where
        self.pos, self.table = nn.Parameter(torch.randn(32, 64)), nn.Buffer(torch.randn(3, 64))
        self.plist = nn.ParameterList([nn.Parameter(torch.randn(64)) for _ in range(2)])
        self.emb, self.norm = nn.Embedding(7, 64), nn.LayerNorm(64)

    def layers(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, (64,)) if self.where == "behind" else x
        if self.where == "before":
            return torch.tanh(x + self.layers(self.first(self, x)))
        x = self.first(self, self.layers(x))
        return torch.tanh(self.layers(x) if self.where == "between" else x)


class Net(nn.Module):
    def __init__(self, names: list[str], where: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(OPERATIONS[name], where) for name in names])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [block(x) for block in self.blocks]


@pytest.mark.parametrize(
    "where", ["before", *(pytest.param(w, marks=pytest.mark.slow) for w in ("between", "behind"))]
)
@pytest.mark.parametrize(
    "names",
    [*GROUPS[:3], *(pytest.param(names, marks=pytest.mark.slow) for names in GROUPS[3:])],
    ids=lambda names: names[0],
)
def test_any_operation_may_come_first(names: list[str], where: str) -> None:
    torch.manual_seed(0)
    model = Net(names, where).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "up." in name or "down." in name:
                parameter.mul_(torch.rand_like(parameter) < 0.3)
    x = torch.randn(2, 6, 64)
    small = mvpfx.convert(model, example_inputs=(x,), lowering="native")
    for batch in (x, torch.randn(1, 1, 64)):
        for name, wanted, found in zip(
            names, call(model, (batch,)), call(small, (batch,)), strict=True
        ):
            assert (found - wanted).abs().max() <= 1e-5, name
    ran = {name: region.calls for name, region in regions(small).items()}
    assert ran[""] == 2 or sum(map(bool, ran.values())) >= len(names) - 1, "whole, or but for one"
