"""One sparse layer on native kernels: as a call, and as the operator that torch.compile sees."""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from mvpfx.kernels.chain import Chain
from mvpfx.kernels.library import DTYPES, LIBRARY
from mvpfx.kernels.step import Part, Place, Step
from mvpfx.kernels.weight import HeldMatrix, Matrix

OPERATOR = "mvpfx::tiled_linear"


class AsOperator(threading.local):
    """While entered, this thread calls the operator: what counts operators sees it."""

    entered = False

    def __enter__(self) -> None:
        self.entered = True

    def __exit__(self, *error: object) -> None:
        self.entered = False


as_operator = AsOperator()


def serves(x: Tensor, values: Tensor) -> bool:
    """Whether native kernels can compute with these: on a CPU, without gradients."""
    return (
        x.is_cpu
        and x.dtype in DTYPES
        and x.dim() > 1
        and values.dtype is x.dtype
        and not torch.is_grad_enabled()
        and LIBRARY is not None
    )


def layer_chain(layer: Matrix) -> Chain:
    """Enter, multiply, leave."""
    columns, rows = layer.in_features, layer.out_features
    x, y = Part(0, 0, columns), Part(1, 0, rows)
    steps = (
        Step("enter", None, x, (0,)),
        Step("multiply", x, y, (1,)),
        Step("leave", y, None),
    )
    return Chain(steps, (Place(columns, offset=0), Place(rows, offset=columns)), ())


_chains: weakref.WeakKeyDictionary[Matrix, Chain] = weakref.WeakKeyDictionary()


def run(layer: Matrix, x: Tensor) -> Tensor:
    """`x W^T + b` for `x` `[..., K]`, where `serves` says so."""
    chain = _chains.get(layer)
    if chain is None:
        chain = _chains[layer] = layer_chain(layer)
    return chain(x, layer)[0]


_known: dict[int, tuple[weakref.ref[Tensor], Chain]] = {}


def tiled_linear(
    crow: Tensor, col: Tensor, values: Tensor, bias: Tensor | None, x: Tensor, rows: int
) -> Tensor:
    """`x W^T + b` for `x` `[T, K]`; what is packed of a weight is kept as long as its values."""
    key = id(values)
    known, chain = _known.get(key, (None, None))
    held = HeldMatrix(crow, col, values, bias, x.shape[1], rows)
    if chain is None or known is None or known() is not values:
        chain = layer_chain(held)
        _known[key] = weakref.ref(values, lambda _: _known.pop(key, None)), chain
    return chain(x, held)[0]


def _fake(
    crow: Tensor, col: Tensor, values: Tensor, bias: Tensor | None, x: Tensor, rows: int
) -> Tensor:
    return x.new_empty(x.shape[0], rows)


torch.library.define(
    OPERATOR,
    "(Tensor crow_indices, Tensor col_indices, Tensor values, Tensor? bias, Tensor x, "
    "int out_features) -> Tensor",
)
torch.library.impl(OPERATOR, "cpu", tiled_linear)
torch.library.register_fake(OPERATOR, _fake)
