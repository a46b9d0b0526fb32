"""Weights in the order in which native kernels read them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from ctypes import byref, c_void_p
from dataclasses import dataclass
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mvpfx.kernels.changes import fingerprint
from mvpfx.kernels.changes import looks as looks_counter
from mvpfx.kernels.library import LIBRARY, tile_tokens
from mvpfx.native_linear import NativeLinear
from mvpfx.net import RefusedError
from mvpfx.sparse_matmul import block_of, check_sizes, to_dense


class Matrix(Protocol):
    """A sparse weight: see `mvpfx.storage.SparseLinear`."""

    in_features: int
    out_features: int
    crow_indices: Tensor
    col_indices: Tensor
    values: Any
    bias: Any


@dataclass(eq=False)
class HeldMatrix:
    """Tensors of a sparse weight, without a layer."""

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int


class PackedWeight:
    """The weight of one layer, or of several that read the same input, one below the other.

    Weights in bfloat16 are multiplied as such, with sums in float32, where the processor is faster
    at it; elsewhere as float32.

    Attributes:
        handle: the library's.
        rows: of all weights together.
        tile: tokens of the tiles that it is packed for.
        bias: `[rows]` float32, or None where no weight has one.

    Raises:
        ValueError: a tensor does not have the size that its layer has, or an index is outside.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        found = LIBRARY
        assert found is not None, "whoever packs has looked for the library"
        matrices = [_sparse(layer) for layer in layers]
        crow, col, values, block = joined(matrices)
        self.rows = sum(matrix.out_features for matrix in matrices)
        columns = matrices[0].in_features
        halves = values_of(layers[0]).dtype is torch.bfloat16 and found.mvpfx_halves()
        self.tile: int = found.mvpfx_tile()
        memory = [n for t in (crow, col, values) for n in (t.data_ptr(), t.numel())]
        handle = c_void_p()
        wrong = found.mvpfx_pack(self.rows, columns, block, halves, *memory, byref(handle))
        if wrong is not None:
            raise RefusedError(
                f"a weight of {self.rows} x {columns} cannot be packed: {wrong.decode()}. Its "
                "row starts, column indices and values do not make a matrix."
            )
        self.handle = handle.value
        self._finalizer = weakref.finalize(self, found.mvpfx_free, self.handle)
        self.bias = _biases(matrices)


def joined(matrices: Sequence[Matrix]) -> tuple[Tensor, Tensor, Tensor, int]:
    """`crow_indices`, `col_indices`, `values` as float32, and the block size, one below the other.

    Weights in blocks of different sizes are joined value by value.
    """
    for matrix in matrices:
        check_memory(matrix.crow_indices, matrix.col_indices, matrix.values, matrix.bias)
        sizes = (matrix.crow_indices, matrix.col_indices, matrix.values, matrix.bias)
        check_sizes(*sizes, matrix.out_features)
    blocks = {block_of(matrix.values) for matrix in matrices}
    if len(blocks) > 1:
        matrices, blocks = [_single(matrix) for matrix in matrices], {1}
    crows = [matrix.crow_indices.int() for matrix in matrices]
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


def _nothing() -> None:
    """Stands in for the reference to a bias that is not there."""


class Watch:
    """Remembers tensors, and tells whether they are what they were.

    Where that may have changed without being counted, their values are looked at. A model asks this
    of all its weights in each call, so what is remembered lies in lists.

    Args:
        values: whether values are remembered too; else tensors are taken for others wherever one
            would have to look at them.
    """

    def __init__(self, values: bool = False) -> None:
        self._looks_at_values = values
        self._values: list[int] = []
        self._looks = -1
        self._layers: list[int] = []
        self._tensors: list[int] = []
        self._known: list[Callable[[], Tensor | None]] = []
        self._states: list[tuple[int, int, int]] = []
        self._sure = True

    def see(self, arguments: Sequence[Any], layers: Iterable[int], tensors: Iterable[int]) -> None:
        """Watch the weights and biases of layers, and tensors, at these positions."""
        self._layers, self._tensors = list(layers), list(tensors)
        looks, now = looks_counter.count, self._look(arguments)
        self._sure = not any(tensor is not None and tensor.is_inference() for tensor in now)
        self._known = [_nothing if tensor is None else weakref.ref(tensor) for tensor in now]
        self._states = _states(now) if self._sure else []
        self._values = _fingerprints(now) if self._looks_at_values else []
        self._looks = looks

    def holds(self, arguments: Sequence[Any]) -> bool:
        """Whether all are what they were."""
        looks = looks_counter.count
        unseen = not self._sure or looks != self._looks
        if unseen and not self._looks_at_values:
            return False
        now = self._look(arguments)
        if not all(map(is_, now, [known() for known in self._known])):
            return False
        if self._sure and _states(now) != self._states:
            return False
        if unseen and _fingerprints(now) != self._values:
            return False
        self._looks = looks
        return True

    def _look(self, arguments: Sequence[Any]) -> list[Tensor | None]:
        layers = [arguments[i] for i in self._layers]
        biases = [_tensors_of(layer)["bias"] for layer in layers]
        return [*map(values_of, layers), *biases, *[arguments[i] for i in self._tensors]]


def _states(tensors: Iterable[Tensor | None]) -> list[tuple[int, int, int]]:
    """Of each tensor that is there; a part of what it was begins where that began."""
    return [(t._version, t.data_ptr(), t.numel()) for t in tensors if t is not None]


def check_memory(*tensors: Tensor | None) -> None:
    """Make sure that tensors still have their memory: `untyped_storage().resize_` gives it back.

    Raises:
        ValueError: one does not.
    """
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            last = tensor.storage_offset() + sum((n - 1) * step for n, step in steps)
            held, needed = tensor.untyped_storage().nbytes(), (last + 1) * tensor.element_size()
            if held < needed:
                raise RefusedError(
                    f"a tensor of {list(tensor.shape)} needs {needed} bytes, and its memory has "
                    f"{held}. Assign a tensor that has its memory."
                )


def _fingerprints(tensors: Iterable[Tensor | None]) -> list[int]:
    return [fingerprint(tensor) for tensor in tensors if tensor is not None]


def values_of(layer: Any) -> Any:
    """The tensor that holds the values of a layer's weight: all of them, or the nonzeros."""
    tensors = _tensors_of(layer)
    return tensors["weight"] if isinstance(layer, NativeLinear) else tensors["values"]


def _sparse(layer: Any) -> Matrix:
    """The weight of a layer as a sparse one, in CSR where it is dense."""
    if not isinstance(layer, NativeLinear):
        return layer
    size = layer.out_features, layer.in_features
    if tuple(layer.weight.shape) != size:
        raise RefusedError(
            f"a layer of {size[0]} x {size[1]} has a weight of {list(layer.weight.shape)}. "
            "Assign a weight of the layer's size, or change in_features and out_features too."
        )
    check_memory(layer.weight)
    return _csr(layer.weight, layer)


def _single(matrix: Matrix) -> Matrix:
    """The same weight in CSR."""
    if block_of(matrix.values) == 1:
        return matrix
    held = (matrix.crow_indices, matrix.col_indices, matrix.values)
    return _csr(to_dense(*held, matrix.out_features, matrix.in_features), matrix)


def _csr(weight: Tensor, layer: Any) -> Matrix:
    stored: Any = weight.detach().to_sparse_csr()
    crow, col, values = stored.crow_indices(), stored.col_indices(), stored.values()
    return HeldMatrix(crow, col, values, layer.bias, layer.in_features, layer.out_features)


def _tensors_of(layer: Any) -> dict[str, Any]:
    return layer._parameters if isinstance(layer, nn.Module) else vars(layer)


class PackedCache:
    """The packed form of some layers, made again when one of their tensors has changed."""

    def __init__(self) -> None:
        self._watch = Watch(values=True)
        self._packed: PackedWeight | None = None

    def of(self, layers: Sequence[Any]) -> PackedWeight:
        """The packed form of `layers` as they are now."""
        packed = self._packed
        if packed is None or packed.tile != tile_tokens() or not self._watch.holds(layers):
            self._packed = None  # whatever fails now, the next call begins again
            self._watch.see(layers, range(len(layers)), ())  # before, lest a write be missed
            packed = PackedWeight(layers)
            self._packed = packed
        return packed
