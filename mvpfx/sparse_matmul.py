"""The sparse matmul under `SparseLinear`: its kernel, its operator and its gradients.

Shapes: `N` output features, `K` input features, `T` tokens. A matrix is `crow_indices`,
`col_indices` and `values`, where `values` is `[nnz]` for CSR and `[blocks, b, b]` for BSR.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from mvpfx.net import RefusedError

WIDE_DTYPES = (torch.float32, torch.float64)
"""What torch multiplies in every storage and block size; others go by way of float32 on a CPU, and
in blocks on any device."""
BLOCKS_SERVE = torch.backends.mkl.is_available()
"""Whether torch multiplies BSR on a CPU; without MKL it does so only with CSR."""
TILE = 128
"""Tokens that are multiplied at once on a CPU, where there are more than twice as many."""
OPERATOR = "mvpfx::sparse_linear"
INDEX_DTYPE = torch.int32
"""MKL converts 64-bit indices in every call."""


def block_of(values: Tensor) -> int:
    """The block size of a matrix with these values; 1 for CSR."""
    return values.shape[-1] if values.dim() == 3 else 1


def check_sizes(crow: Tensor, col: Tensor, values: Tensor, bias: Tensor | None, rows: int) -> None:
    """Make sure that the tensors of a matrix are as long as one another and `rows` need: kernels do
    not look.

    Raises:
        ValueError: they are not.
    """
    block = block_of(values)
    if len(crow) * block != rows + block or len(values) != len(col):
        raise RefusedError(
            f"a sparse weight of {rows} rows has {len(crow)} row starts, {len(col)} column indices "
            f"and values of {list(values.shape)}. Needed: {rows // block + 1} row starts, and one "
            "column index for each value or block."
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise RefusedError(
            f"a sparse layer of {rows} output features has a bias of {list(bias.shape)}. "
            f"Assign one of [{rows}], or None."
        )


def check_indices(crow: Tensor, col: Tensor, rows: int, columns: int) -> None:
    """Make sure that indices stay within a matrix of `rows` x `columns` values or blocks, and name
    no place twice: kernels do not look.

    Raises:
        ValueError: they do not.
    """
    for indices in (crow, col):
        if indices.dim() != 1 or indices.dtype != INDEX_DTYPE:
            raise ValueError(f"the indices are {indices.dtype} {list(indices.shape)}")
    rising = len(crow) == rows + 1 and bool((crow.diff() >= 0).all())
    if not rising or int(crow[0]) != 0 or int(crow[-1]) != len(col):
        raise ValueError(f"the row starts do not divide its {len(col)} indices into {rows} rows")
    if not len(col):
        return
    if int(col.min()) < 0 or int(col.max()) >= columns:
        raise ValueError(f"a column index is out of its {columns} columns ({rows} rows)")
    row = torch.arange(rows).repeat_interleave(crow.diff().long())
    places = row * columns + col
    if not bool((places.diff() > 0).all()):  # out of order is fine
        places = places.sort().values
        if not bool((places.diff() > 0).all()):
            raise ValueError("a column index stands twice in its row")


def multiply(
    crow: Tensor, col: Tensor, values: Tensor, bias: Tensor | None, x_t: Tensor, rows: int
) -> Tensor:
    """`[N, K] @ [K, T] + [N, 1]` -> `[N, T]`.

    The sparse tensor is put together anew in each call (4 microseconds), so nothing can be stale
    after `.to()`, `load_state_dict`, `deepcopy` or an optimizer step.
    """
    check_sizes(crow, col, values, bias, rows)
    dtype = x_t.dtype
    if x_t.shape[1] == 0 or values.numel() == 0:
        out = x_t.new_zeros(rows, x_t.shape[1])
        return out if bias is None else out + bias[:, None]
    if dtype not in WIDE_DTYPES and (x_t.is_cpu or values.dim() == 3):
        values, x_t = values.float(), x_t.float()
        bias = None if bias is None else bias.float()
    size = (rows, x_t.shape[0])
    if values.dim() == 3 and x_t.is_cpu and not BLOCKS_SERVE:
        matrix = to_dense(crow, col, values, *size)
    else:
        make = torch.sparse_csr_tensor if values.dim() == 1 else torch.sparse_bsr_tensor
        matrix = make(crow, col, values, size, check_invariants=False)
    out = matrix @ x_t if bias is None else torch.addmm(bias[:, None], matrix, x_t)
    return out.to(dtype)


def multiply_tiled(
    crow: Tensor, col: Tensor, values: Tensor, bias: Tensor | None, x: Tensor, rows: int
) -> Tensor:
    """`[T, K]` -> `[T, N]` by tiles of tokens, whose feature-major rows stay in cache."""
    out = x.new_empty(len(x), rows)
    for start in range(0, len(x), TILE):
        tile = x[start : start + TILE].t().contiguous()
        out[start : start + TILE] = multiply(crow, col, values, bias, tile, rows).t()
    return out


def to_dense(crow: Tensor, col: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
    """Return the matrix as an ordinary tensor `[N, K]`; differentiable in `values`.

    In operations that ONNX has, with sizes that do not depend on data.
    """
    count, block = col.numel(), block_of(values)
    row = _row_indices(crow, count)
    place = (row * (columns // block) + col.long()).unsqueeze(1).expand(-1, block**2)
    grid = values.new_zeros(rows * columns // block**2, block**2)
    filled = grid.scatter(0, place, values.reshape(count, block**2))
    blocks = filled.reshape(rows // block, columns // block, block, block)
    return blocks.transpose(1, 2).reshape(rows, columns)


def _row_indices(crow: Tensor, count: int) -> Tensor:
    """The row of each entry: how many rows end at it or before."""
    ends = crow.new_zeros(count + 1, dtype=torch.long)
    ones = torch.ones_like(crow[1:], dtype=torch.long)
    return ends.scatter_add(0, crow[1:].long(), ones).cumsum(0)[:count]


class Transposes(threading.local):
    """The last input made feature-major, while it lives: query, key and value share theirs."""

    def __init__(self) -> None:
        self.source: weakref.ref[Tensor] | None = None
        self.state: tuple[int, int] = (0, 0)
        self.value: Tensor | None = None

    def of(self, x: Tensor, flat: Tensor) -> Tensor:
        """Return `flat` `[T, K]`, which views `x`, as contiguous `[K, T]`."""
        x_t = flat.t()
        if x_t.is_contiguous() or x.is_inference():  # inference tensors count no versions
            return x_t.contiguous()
        state = (x._version, x.data_ptr())
        known = self.source is not None and self.source() is x and self.state == state
        if self.value is None or not known:
            self.value = x_t.contiguous()
            self.source, self.state = weakref.ref(x, self.forget), state
        return self.value

    def forget(self, source: object) -> None:
        """Let go of the value when its input is gone."""
        if self.source is source:
            self.source = self.value = None


transposes = Transposes()


def _fake(
    crow: Tensor, col: Tensor, values: Tensor, bias: Tensor | None, x_t: Tensor, rows: int
) -> Tensor:
    return x_t.new_empty(rows, x_t.shape[1])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    crow, col, values, bias, x_t, _ = inputs
    ctx.save_for_backward(crow, col, values, x_t)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Dense gradients, picked at the stored places; `grad` is `[N, T]`."""
    crow, col, values, x_t = ctx.saved_tensors
    rows, columns = grad.shape[0], x_t.shape[0]
    grad_values = grad_x = grad_bias = None
    if ctx.needs_input_grad[2]:
        block = block_of(values)
        grid = (grad @ x_t.t()).reshape(rows // block, block, columns // block, block)
        picked = grid.transpose(1, 2)[_row_indices(crow, col.numel()), col.long()]
        grad_values = picked.reshape(values.shape)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        grad_bias = grad.sum(1)
    if ctx.needs_input_grad[4]:
        grad_x = to_dense(crow, col, values, rows, columns).t() @ grad
    return None, None, grad_values, grad_bias, grad_x, None


def _hear_beta_warning() -> None:
    """Let torch say now, once, that its sparse CSR support is in beta state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1))


_hear_beta_warning()
torch.library.define(
    OPERATOR,
    "(Tensor crow_indices, Tensor col_indices, Tensor values, Tensor? bias, Tensor x_t, "
    "int out_features) -> Tensor",
)
torch.library.impl(OPERATOR, ("cpu", "cuda"), multiply)
torch.library.register_fake(OPERATOR, _fake)
torch.library.register_autograd(OPERATOR, _backward, setup_context=_save_for_backward)
