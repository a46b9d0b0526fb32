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
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvpfx.kernels import operators
from mvpfx.kernels.changes import LooksAgain
from mvpfx.sparse_matmul import (
    INDEX_DTYPE,
    TILE,
    block_of,
    check_indices,
    multiply,
    multiply_tiled,
    to_dense,
    transposes,
)
from mvpfx.torch_private import is_jit_tracing, transforms_active
from mvpfx.traces import dispatch_modes_active, is_traced, untraced

Layout = Literal["feature_major", "token_major", "tiled"]
BLOCKS = (32, 16, 8, 4)
"""Block sizes of BSR, preferred first."""


class SparseLinear(LooksAgain):
    """`y = x W^T + b` with `W` `[N, K]` stored as CSR, or as BSR with square blocks.

    `values` is a parameter and trains (zeros stay zeros); indices are buffers. The state dict
    holds exactly these tensors.

    Args:
        in_features, out_features: `K`, `N`.
        crow_indices: `[N + 1]`, or `[N / b + 1]` for BSR.
        col_indices: `[nnz]`, or `[nnz / b^2]` for BSR.
        values: `[nnz]` for CSR, `[nnz / b^2, b, b]` for BSR.
        bias: `[N]` or None.
        output_layout: "token_major" makes the output contiguous, as `nn.Linear` does; "tiled" does
            so too, and computes with the native kernels where they can be used: on a CPU, in
            float32 or bfloat16, without gradients.

    Raises:
        ValueError: if the tensors' shapes do not describe an `[N, K]` matrix.
    """

    crow_indices: Tensor
    col_indices: Tensor
    bias: nn.Parameter | None

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
        block = block_of(values)
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
        kept = None if bias is None else nn.Parameter(bias.detach(), bias.requires_grad)
        self.register_parameter("bias", kept)

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
        """One of csr, bsr and native."""
        if self.output_layout == "tiled":
            return "native"
        return "csr" if self.values.dim() == 1 else "bsr"

    @property
    def block(self) -> int:
        """The block size of BSR; 1 for CSR."""
        return block_of(self.values)

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
        return to_dense(
            self.crow_indices, self.col_indices, self.values, self.out_features, self.in_features
        )

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., K]` to `[..., N]`.

        The result's dtype is the input's, or autocast's where autocast is on.
        """
        odd = input.layout is not torch.strided or input.is_nested
        if odd or is_traced() or transforms_active():
            # Plain operations: every trace, transform and ONNX knows them, torch for such inputs.
            return F.linear(input, self._plain_weight(), self.bias)
        if input.shape[-1] != self.in_features:
            raise ValueError(
                f"the input has {input.shape[-1]} features, and this layer takes "
                f"{self.in_features}."
            )
        device = input.device.type
        if not torch.is_autocast_enabled(device):
            return self._compute(input)
        with torch.autocast(device, enabled=False):
            out = self._compute(input.to(self.values.dtype))
        return out.to(torch.get_autocast_dtype(device))

    def extra_repr(self) -> str:
        """Describe the layer as `print` shows it."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, storage={self.storage}, block={self.block}, "
            f"nonzero={self.values.numel()}, output_layout={self.output_layout}"
        )

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load as every module does, but no indices that lead out of the matrix."""
        given = [state_dict.get(f"{prefix}{name}") for name in ("crow_indices", "col_indices")]
        own = (self.crow_indices, self.col_indices)
        crow, col = (held if new is None else new for new, held in zip(given, own, strict=True))
        if crow.shape == own[0].shape and col.shape == own[1].shape and not crow.is_meta:
            try:
                check_indices(crow, col, len(crow) - 1, self.in_features // self.block)
            except ValueError as error:
                error_msgs.append(f"of the sparse layer {prefix.rstrip('.')}, {error}.")
                return
        names = (missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *names)

    def _compute(self, x: Tensor) -> Tensor:
        *front, features = x.shape
        flat = x.reshape(math.prod(front), features)
        matrix = (self.crow_indices, self.col_indices, self.values)
        bias, rows = self.bias, self.out_features
        # The operator is what autograd, torch.compile, torch.export and fake tensors see; where
        # none of them looks, its kernel alone saves 10 microseconds a call.
        plain = type(x) is Tensor and not torch.compiler.is_compiling()
        plain = plain and not dispatch_modes_active()
        if not plain and torch.onnx.is_in_onnx_export():  # which has no sparse matmul
            return F.linear(x, self.dense(), bias)
        gradient = torch.is_grad_enabled() and self._needs_gradient(x)
        if self.output_layout == "tiled" and not gradient and operators.serves(x, self.values):
            if plain and not operators.as_operator.entered:
                return operators.run(self, x)
            y = torch.ops.mvpfx.tiled_linear(*matrix, bias, flat, rows)
            return y.view(*front, rows)
        if not plain or gradient:
            y = torch.ops.mvpfx.sparse_linear(*matrix, bias, flat.t().contiguous(), rows).t()
        elif len(flat) <= 2 * TILE or not x.is_cpu:
            y = multiply(*matrix, bias, transposes.of(x, flat), rows).t()
        else:
            return multiply_tiled(*matrix, bias, flat, rows).view(*front, rows)
        if self.output_layout != "feature_major":
            y = y.contiguous()
        return y.view(*front, rows)

    def _plain_weight(self) -> Tensor:
        """The dense weight; in a trace of TorchScript a constant, which other runtimes want."""
        if not is_jit_tracing() or self.values.requires_grad:
            return self.dense()
        with untraced(), torch.no_grad():
            return self.dense()

    def _needs_gradient(self, x: Tensor) -> bool:
        bias = self.bias
        trains = self.values.requires_grad or (bias is not None and bias.requires_grad)
        return trains or x.requires_grad


def stored_fraction(weight: Tensor, block: int) -> float:
    """Return the fraction of a weight's values that storage in `block` x `block` blocks keeps."""
    if weight.numel() == 0:
        return 0.0
    rows, columns = weight.shape
    grid = (weight != 0).reshape(rows // block, block, columns // block, block)
    kept = grid.any(dim=3).any(dim=1)
    return int(kept.sum()) / kept.numel()


def find_block(weight: Tensor, waste: float = 1.25) -> int | None:
    """Return the largest block size whose blocks store at most `waste` times the nonzeros.

    With `waste` infinite: the one that stores fewest bytes. None where no size fits.
    """
    rows, columns = weight.shape
    limit = waste * (int(torch.count_nonzero(weight)) / max(1, weight.numel()))
    stored: dict[int, float] = {}
    # Each block lies in one of the next larger size, which so stores no less, and divides no more.
    for block in reversed(BLOCKS):
        if rows % block or columns % block:
            break
        fraction = stored_fraction(weight, block)
        if not fraction <= limit:  # infinite waste of nothing is no number
            break
        stored[block] = fraction
    if waste == math.inf and stored:
        item = weight.element_size()
        return min(stored, key=lambda b: stored[b] * (item + 4 / b**2))
    return max(stored, default=None)
