"""Sparse weights in the order in which native kernels read them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mvpfx.kernels.library import LIBRARY


class Matrix(Protocol):
    """What a sparse layer holds: see `mvpfx.storage.SparseLinear`."""

    in_features: int
    out_features: int
    crow_indices: Tensor
    col_indices: Tensor
    values: Any
    bias: Any


class PackedWeight:
    """One weight, or several that read the same input, one below the other.

    Weights in bfloat16 are multiplied as such, with sums in float32, where the processor is faster
    at it; elsewhere as float32.

    Attributes:
        handle: the library's.
        rows: of all weights together.
        bias: `[rows]` float32, or None where no weight has one.
    """

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        found = LIBRARY
        assert found is not None, "whoever packs has looked for the library"
        crow, col, values, block = joined(matrices)
        self.rows = sum(matrix.out_features for matrix in matrices)
        columns = matrices[0].in_features
        halves = matrices[0].values.dtype is torch.bfloat16 and found.mvpfx_halves()
        pointers = (crow.data_ptr(), col.data_ptr(), values.data_ptr())
        self.handle: int = found.mvpfx_pack(self.rows, columns, block, halves, *pointers)
        self.bias = _biases(matrices)
        self._finalizer = weakref.finalize(self, found.mvpfx_free, self.handle)


def joined(matrices: Sequence[Matrix]) -> tuple[Tensor, Tensor, Tensor, int]:
    """`crow_indices`, `col_indices`, `values` as float32, and the block size, one below the other.

    Weights in blocks of different sizes are not joined.
    """
    crows = [matrix.crow_indices.int() for matrix in matrices]
    blocks = {matrix.values.shape[-1] if matrix.values.dim() == 3 else 1 for matrix in matrices}
    assert len(blocks) == 1, "weights of one block size are joined"
    starts, held = [crows[0][:1]], 0
    for crow, matrix in zip(crows, matrices, strict=True):
        starts.append(crow[1:] + held)
        held += matrix.col_indices.numel()
    col = torch.cat([matrix.col_indices.int() for matrix in matrices])
    values = torch.cat([matrix.values.detach().float() for matrix in matrices])
    return torch.cat(starts).contiguous(), col.contiguous(), values.contiguous(), blocks.pop()


def _biases(matrices: Sequence[Matrix]) -> Tensor | None:
    if all(matrix.bias is None for matrix in matrices):
        return None
    parts = [
        torch.zeros(m.out_features) if m.bias is None else m.bias.detach().float() for m in matrices
    ]
    return torch.cat(parts)


_Seen = tuple["weakref.ref[Tensor] | None", int, int]


class Watch:
    """Remembers tensors, and tells whether they are what they were.

    Tensors that were made in inference mode do not tell when they change: those never are.
    """

    def __init__(self) -> None:
        self._layers: list[tuple[int, _Seen, _Seen]] = []
        self._tensors: list[tuple[int, _Seen]] = []
        self._sure = True

    def layer(self, position: int, layer: Any) -> None:
        """Watch the values and the bias of a sparse layer among the arguments."""
        held = _tensors_of(layer)
        self._layers.append((position, self._see(held["values"]), self._see(held["bias"])))

    def tensor(self, position: int, tensor: Tensor) -> None:
        """Watch a tensor among the arguments."""
        self._tensors.append((position, self._see(tensor)))

    def holds(self, arguments: Sequence[Any]) -> bool:
        """Whether all are what they were."""
        for position, values, bias in self._layers:
            held = _tensors_of(arguments[position])
            if not (_is_seen(held["values"], values) and _is_seen(held["bias"], bias)):
                return False
        for position, seen in self._tensors:
            if not _is_seen(arguments[position], seen):
                return False
        return self._sure

    def _see(self, tensor: Tensor | None) -> _Seen:
        if tensor is None:
            return None, 0, 0
        if tensor.is_inference():
            self._sure = False
            return weakref.ref(tensor), 0, 0
        return weakref.ref(tensor), tensor._version, tensor.data_ptr()


def _is_seen(tensor: Tensor | None, seen: _Seen) -> bool:
    known, version, pointer = seen
    if tensor is None or known is None:
        return tensor is known
    # What was made in inference mode has no version to ask for.
    return known() is tensor and (
        not pointer or (tensor._version == version and tensor.data_ptr() == pointer)
    )


def _tensors_of(layer: Any) -> dict[str, Any]:
    return layer._parameters if isinstance(layer, nn.Module) else vars(layer)


class PackedCache:
    """The packed form of some layers, made anew when one of their tensors has changed."""

    def __init__(self) -> None:
        self._watch = Watch()
        self._packed: PackedWeight | None = None

    def of(self, layers: Sequence[Any]) -> PackedWeight:
        """The packed form of `layers` as they are now."""
        if self._packed is None or not self._watch.holds(layers):
            self._packed = PackedWeight(layers)
            self._watch = Watch()
            for position, layer in enumerate(layers):
                self._watch.layer(position, layer)
        return self._packed
