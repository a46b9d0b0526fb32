"""Sparse storage of a linear layer's weight, and the layer that computes with it.

Shapes: `N` output features, `K` input features, `T` tokens (all leading dimensions together),
`nnz` stored values, `b` block size.

Activations are kept feature-major while they are multiplied: with `x_t` of `[K, T]` one weight
meets a contiguous run of tokens, which is 3 to 4 times faster than token-major. The result
`[N, T]` is handed on as a transposed view, so strides carry the layout: elementwise operations
keep it, and a sparse layer that follows finds its input already in place.
"""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from typing import Any, Literal

import torch
from torch import Tensor, nn

Layout = Literal["feature_major", "token_major"]
INDEX_DTYPE = torch.int32
"""MKL converts 64-bit indices in every call."""
CPU_DTYPES = (torch.float32, torch.float64)
TILE = 128
"""Tokens that are multiplied at once on a CPU, where there are more than twice as many."""
BLOCKS = (32, 16, 8, 4)
"""Block sizes of BSR, preferred first."""
OPERATOR = "mvpfx::sparse_linear"


class SparseLinear(nn.Module):
    """`y = x W^T + b` with `W` `[N, K]` stored as CSR, or as BSR with square blocks.

    `values` is a parameter and trains (zeros stay zeros); indices are buffers. The state dict
    holds exactly these tensors.

    Args:
        in_features, out_features: `K`, `N`.
        crow_indices: `[N + 1]`, or `[N / b + 1]` for BSR.
        col_indices: `[nnz]`, or `[nnz / b^2]` for BSR.
        values: `[nnz]` for CSR, `[nnz / b^2, b, b]` for BSR.
        bias: `[N]` or None.
        output_layout: "token_major" makes the output contiguous, as `nn.Linear` does.

    Raises:
        ValueError: if the tensors' shapes do not describe an `[N, K]` matrix.
    """

    crow_indices: Tensor
    col_indices: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        crow_indices: Tensor,
        col_indices: Tensor,
        values: Tensor,
        bias: Tensor | None = None,
        output_layout: Layout = "token_major",
    ) -> None:
        super().__init__()
        block = values.shape[-1] if values.dim() == 3 else 1
        if crow_indices.numel() * block != out_features + block:
            raise ValueError(
                f"crow_indices has {crow_indices.numel()} entries, and {out_features} output "
                f"features in blocks of {block} need {out_features // block + 1}."
            )
        if values.shape[0] != col_indices.numel():
            raise ValueError(
                f"values has {values.shape[0]} entries and col_indices {col_indices.numel()}; "
                "they need one column index a value (or a block)."
            )
        self.in_features = in_features
        self.out_features = out_features
        self.output_layout: Layout = output_layout
        self.register_buffer("crow_indices", crow_indices.to(INDEX_DTYPE))
        self.register_buffer("col_indices", col_indices.to(INDEX_DTYPE))
        trains = values.requires_grad
        self.values = nn.Parameter(values.detach(), requires_grad=trains)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), bias.requires_grad)

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        block: int = 1,
        output_layout: Layout = "token_major",
    ) -> SparseLinear:
        """Store the nonzeros of `weight` `[N, K]`; blocks of `block` x `block` where above 1.

        Raises:
            ValueError: if `block` does not divide both dimensions.
        """
        rows, columns = weight.shape
        if rows % block or columns % block:
            raise ValueError(
                f"a weight of {rows} x {columns} cannot be stored in {block} x {block} blocks. "
                "Use a block size that divides both, or 1."
            )
        trains = weight.requires_grad
        with torch.no_grad():
            dense = weight.detach()
            stored: Any = (
                dense.to_sparse_csr() if block == 1 else dense.to_sparse_bsr((block, block))
            )
            crow, col, values = stored.crow_indices(), stored.col_indices(), stored.values()
        values = values.clone().requires_grad_(trains)
        new_bias = None
        if bias is not None:
            new_bias = bias.detach().clone().requires_grad_(bias.requires_grad)
        return cls(columns, rows, crow, col, values, new_bias, output_layout)

    @property
    def storage(self) -> str:
        """Either csr or bsr."""
        return "csr" if self.values.dim() == 1 else "bsr"

    @property
    def block(self) -> int:
        """The block size of BSR; 1 for CSR."""
        return self.values.shape[-1] if self.values.dim() == 3 else 1

    @property
    def storage_bytes(self) -> int:
        """Bytes of values and indices, without the bias."""
        tensors = (self.crow_indices, self.col_indices, self.values)
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def weight(self) -> Tensor:
        """The dense weight `[N, K]`, built anew at each read, for code that looks at it."""
        return self.dense()

    def dense(self) -> Tensor:
        """Return the weight as an ordinary tensor `[N, K]`; differentiable in `values`."""
        return _dense(
            self.crow_indices, self.col_indices, self.values, self.out_features, self.in_features
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., K]` to `[..., N]`.

        The result's dtype is the input's, or autocast's where autocast is on.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"the input has {x.shape[-1]} features, and this layer takes {self.in_features}."
            )
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return self._compute(x)
        with torch.autocast(device, enabled=False):
            out = self._compute(x.to(self.values.dtype))
        return out.to(torch.get_autocast_dtype(device))

    def extra_repr(self) -> str:
        """Describe the layer as `print` shows it."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, storage={self.storage}, block={self.block}, "
            f"nonzero={self.values.numel()}, output_layout={self.output_layout}"
        )

    def _compute(self, x: Tensor) -> Tensor:
        *front, features = x.shape
        flat = x.reshape(math.prod(front), features)
        matrix = (self.crow_indices, self.col_indices, self.values)
        bias, rows = self.bias, self.out_features
        # The operator is what autograd, torch.compile, torch.export and fake tensors see; where
        # none of them looks, its kernel alone saves 10 microseconds a call.
        plain = type(x) is Tensor and not torch.compiler.is_compiling()
        if not plain or torch.is_grad_enabled():
            y = torch.ops.mvpfx.sparse_linear(*matrix, bias, flat.t().contiguous(), rows).t()
        elif len(flat) <= 2 * TILE or not x.is_cpu:
            y = _sparse_linear(*matrix, bias, _transposes.of(x, flat), rows).t()
        else:
            return _tiled(*matrix, bias, flat, rows).view(*front, rows)
        if self.output_layout == "token_major":
            y = y.contiguous()
        return y.view(*front, rows)


class _Transposes(threading.local):
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


_transposes = _Transposes()


def supports(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether torch multiplies sparse matrices of `dtype` on `device`.

    Where not, `SparseLinear` still answers, by way of float32.
    """
    if torch.device(device).type == "cpu":
        return dtype in CPU_DTYPES
    return dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def stored_fraction(weight: Tensor, block: int) -> float:
    """Return the fraction of a weight's values that storage in `block` x `block` blocks keeps."""
    if weight.numel() == 0:
        return 0.0
    rows, columns = weight.shape
    grid = (weight != 0).view(rows // block, block, columns // block, block)
    kept = grid.any(dim=3).any(dim=1)
    return int(kept.sum()) / kept.numel()


def find_block(weight: Tensor, waste: float = 1.25) -> int | None:
    """Return the largest block size whose blocks store at most `waste` times the nonzeros.

    With `waste` infinite: the one that stores fewest bytes. None where no size fits.
    """
    rows, columns = weight.shape
    nonzero = stored_fraction(weight.contiguous(), 1)
    sizes = [b for b in BLOCKS if rows % b == 0 and columns % b == 0]
    stored = {b: stored_fraction(weight.contiguous(), b) for b in sizes}
    fitting = [b for b in sizes if stored[b] <= waste * nonzero]
    if waste == math.inf and fitting:
        item = weight.element_size()
        return min(fitting, key=lambda b: stored[b] * (item + 4 / b**2))
    return fitting[0] if fitting else None


def _sparse_linear(
    crow: Tensor, col: Tensor, values: Tensor, bias: Tensor | None, x_t: Tensor, rows: int
) -> Tensor:
    """`[N, K] @ [K, T] + [N, 1]` -> `[N, T]`.

    The sparse tensor is put together anew in each call (4 microseconds), so nothing can be stale
    after `.to()`, `load_state_dict`, `deepcopy` or an optimizer step.
    """
    dtype = x_t.dtype
    if x_t.shape[1] == 0 or values.numel() == 0:
        out = x_t.new_zeros(rows, x_t.shape[1])
        return out if bias is None else out + bias[:, None]
    if x_t.is_cpu and dtype not in CPU_DTYPES:
        values, x_t = values.float(), x_t.float()
        bias = None if bias is None else bias.float()
    size = (rows, x_t.shape[0])
    make = torch.sparse_csr_tensor if values.dim() == 1 else torch.sparse_bsr_tensor
    matrix = make(crow, col, values, size, check_invariants=False)
    out = matrix @ x_t if bias is None else torch.addmm(bias[:, None], matrix, x_t)
    return out.to(dtype)


def _tiled(
    crow: Tensor, col: Tensor, values: Tensor, bias: Tensor | None, x: Tensor, rows: int
) -> Tensor:
    """`[T, K]` -> `[T, N]` by tiles of tokens, whose feature-major rows stay in cache."""
    out = x.new_empty(len(x), rows)
    for start in range(0, len(x), TILE):
        tile = x[start : start + TILE].t().contiguous()
        out[start : start + TILE] = _sparse_linear(crow, col, values, bias, tile, rows).t()
    return out


def _dense(crow: Tensor, col: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
    block = values.shape[-1] if values.dim() == 3 else 1
    blocks = values if values.dim() == 3 else values.reshape(-1, 1, 1)
    grid = values.new_zeros(rows // block, columns // block, block, block)
    index = (_row_indices(crow, col.numel()), col.long())
    return grid.index_put(index, blocks).transpose(1, 2).reshape(rows, columns)


def _row_indices(crow: Tensor, count: int) -> Tensor:
    rows = torch.arange(crow.numel() - 1, device=crow.device)
    return rows.repeat_interleave(crow.diff().long(), output_size=count)


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
        block = values.shape[-1] if values.dim() == 3 else 1
        grid = (grad @ x_t.t()).reshape(rows // block, block, columns // block, block)
        picked = grid.transpose(1, 2)[_row_indices(crow, col.numel()), col.long()]
        grad_values = picked.reshape(values.shape)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        grad_bias = grad.sum(1)
    if ctx.needs_input_grad[4]:
        grad_x = _dense(crow, col, values, rows, columns).t() @ grad
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
torch.library.impl(OPERATOR, ("cpu", "cuda"), _sparse_linear)
torch.library.register_fake(OPERATOR, _fake)
torch.library.register_autograd(OPERATOR, _backward, setup_context=_save_for_backward)
