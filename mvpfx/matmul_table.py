"""Where each kind of matmul takes its operands."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mvpfx.reduced_attention import reduced_attention_forward
from mvpfx.torch_private import grouped_mm, linear


@dataclass(frozen=True)
class Signature:
    """Where a kind of call takes its operands.

    Attributes:
        kind: name of the kind.
        left, right: positions of the two factors; a weight may be either.
        bias: position of the bias, None where the call takes none.
        out_dim_right, out_dim_left: the weight's dimension of output features in each place.
        keywords: keyword names of operands passed by name.
    """

    kind: str
    left: int
    right: int
    bias: int | None = None
    out_dim_right: int = 1
    out_dim_left: int = 0
    keywords: tuple[tuple[str, int], ...] = ()


_LINEAR = Signature(
    "linear", 0, 1, bias=2, out_dim_right=0, keywords=(("input", 0), ("weight", 1), ("bias", 2))
)
_MATMUL = Signature("matmul", 0, 1, keywords=(("input", 0), ("other", 1), ("mat2", 1)))
_RIGHT_MATMUL = Signature("matmul", 1, 0)
_ADDMM = Signature(
    "addmm", 1, 2, bias=0, keywords=(("input", 0), ("mat1", 1), ("mat2", 2), ("batch2", 2))
)
_CONVOLUTION = Signature(
    "convolution", 0, 1, 2, 0, keywords=(("input", 0), ("weight", 1), ("bias", 2))
)
_TRANSPOSED = Signature(
    "convolution", 0, 1, 2, 1, keywords=(("input", 0), ("weight", 1), ("bias", 2))
)
_GROUPED = Signature("grouped", 0, 1, keywords=(("input", 0), ("mat2", 1)))

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED_CONVOLUTIONS = (
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
SIGNATURES: dict[Any, Signature] = {
    **dict.fromkeys(_CONVOLUTIONS, _CONVOLUTION),
    **dict.fromkeys(_TRANSPOSED_CONVOLUTIONS, _TRANSPOSED),
    linear: _LINEAR,
    F.linear: _LINEAR,
    torch.matmul: _MATMUL,
    torch.mm: _MATMUL,
    torch.bmm: _MATMUL,
    operator.matmul: _MATMUL,
    torch.addmm: _ADDMM,
    torch.baddbmm: _ADDMM,
    grouped_mm: _GROUPED,
    "matmul": _MATMUL,
    "__matmul__": _MATMUL,
    "__rmatmul__": _RIGHT_MATMUL,
    "mm": _MATMUL,
    "bmm": _MATMUL,
    "addmm": _ADDMM,
    "baddbmm": _ADDMM,
}
"""Target of a call -> its operands."""

ATTENTIONS = (F.multi_head_attention_forward, reduced_attention_forward)
"""Functions that attend with weights of their own."""
_ATTENTION = (
    (5, "in_proj_weight"),
    (11, "out_proj_weight"),
    (-1, "q_proj_weight"),
    (-1, "k_proj_weight"),
    (-1, "v_proj_weight"),
)

SEVERAL_WEIGHTS: dict[Any, tuple[tuple[int, str], ...]] = {
    **dict.fromkeys(ATTENTIONS, _ATTENTION),
    **dict.fromkeys(
        (torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell),
        ((2, "w_ih"), (3, "w_hh")),
    ),
}
"""Target of a call with several weights, all `[out, in]` -> positions (-1: none) and names."""

LISTED_WEIGHTS = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
"""Targets of calls with a list of weights `[out, in]` among their arguments."""
