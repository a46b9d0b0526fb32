"""One sparse layer on native kernels: as a call, and as the operator that torch.compile sees."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from mvpfx.kernels.chain import Chain
from mvpfx.kernels.library import DTYPES, LIBRARY
from mvpfx.kernels.step import Part, Place, Step
from mvpfx.kernels.weight import HeldMatrix, Matrix
from mvpfx.net import caught
from mvpfx.sparse_matmul import multiply

OPERATOR = "mvpfx::tiled_linear"
WHAT = "a layer on native kernels"


class AsOperator(threading.local):
    """While entered, this thread calls the operator: what counts operators sees it."""

    entered = False

    def __enter__(self) -> None:
        self.entered = True

    def __exit__(self, *error: object) -> None:
        self.entered = False


as_operator = AsOperator()


def serves(x: Tensor, values: Tensor) -> bool:
    """Whether native kernels can compute with these, where no gradient is asked for: on a CPU."""
    return (
        x.is_cpu
        and x.dtype in DTYPES
        and x.dim() > 1
        and values.dtype is x.dtype
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
_faults: weakref.WeakKeyDictionary[Any, dict[str, int]] = weakref.WeakKeyDictionary()


def faults(layer: Any) -> dict[str, int]:
    """Why native kernels were not used for calls of a layer, and how often."""
    return _faults.get(layer, {})


def run(layer: Matrix, x: Tensor) -> Tensor:
    """`x W^T + b` for `x` `[..., K]`, where `serves` says so."""
    try:
        chain = _chains.get(layer)
        if chain is None:
            chain = _chains[layer] = layer_chain(layer)
        return chain(x, layer)[0]
    except Exception as error:  # noqa: BLE001  the net
        reason = caught(error, WHAT)
    known = _faults.setdefault(layer, {})
    known[reason] = known.get(reason, 0) + 1
    return _by_torch(layer, x.reshape(-1, layer.in_features)).view(*x.shape[:-1], -1)


def _by_torch(layer: Matrix, flat: Tensor) -> Tensor:
    """The same for `[T, K]` by `torch.sparse`."""
    matrix = (layer.crow_indices, layer.col_indices, layer.values, layer.bias)
    return multiply(*matrix, flat.t().contiguous(), layer.out_features).t().contiguous()


_known: dict[int, tuple[weakref.ref[Tensor], Chain]] = {}


def tiled_linear(
    crow: Tensor, col: Tensor, values: Tensor, bias: Tensor | None, x: Tensor, rows: int
) -> Tensor:
    """`x W^T + b` for `x` `[T, K]`; what is packed of a weight is kept as long as its values."""
    key = id(values)
    held = HeldMatrix(crow, col, values, bias, x.shape[1], rows)
    try:
        known, chain = _known.get(key, (None, None))
        if chain is None or known is None or known() is not values:
            chain = layer_chain(held)
            _known[key] = weakref.ref(values, lambda _: _known.pop(key, None)), chain
        return chain(x, held)[0]
    except Exception as error:  # noqa: BLE001  the net
        caught(error, WHAT)
    return _by_torch(held, x)


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
