"""Recomputing: masked weights that autograd saves as what they are made from.

A matmul saves its weight for the backward pass. Where that is `W * M` it would be a copy of the
weight, alive from the forward of the first layer to the backward of it. Inside of `Recomputing` the
parameter and the bool mask, which are there anyway, are saved in its place, and the product is made
again when the backward pass asks for it. All other tensors are saved as without.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mvpfx.torch_private import (
    StorageWeakRef,
    may_hook_saved_tensors,
    saved_tensor_hooks,
    storage_address,
    transforms_active,
)
from mvpfx.training_kernels import library

_thread = threading.local()


def product(weight: Tensor, mask: Tensor) -> Tensor:
    """`weight * mask`, without history, in shape and dtype of `weight`.

    Args:
        weight: floating point, any shape.
        mask: bool, of the same shape; True = kept.
    """
    if library.serves(weight, mask):
        return library.multiply(weight, mask)
    with torch.no_grad():
        return weight * mask


@dataclass(frozen=True)
class _Made:
    """A masked weight that this forward made.

    Attributes:
        storage: of the masked weight, without keeping it alive.
        version: how often the masked weight was written to.
        weight, mask: what it is the product of.
        weight_version: how often the parameter was written to.
    """

    storage: StorageWeakRef
    version: int
    weight: Tensor
    mask: Tensor
    weight_version: int

    def is_in(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the masked weight or a view of it, as it was made."""
        alive = not self.storage.expired()
        return alive and tensor._version == self.version and tensor.dtype == self.weight.dtype


@dataclass(frozen=True)
class _Recipe:
    """How to make a masked weight again, or a view of it."""

    made: _Made
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def make(self) -> Tensor:
        """The tensor that was saved.

        Raises:
            RuntimeError: the weight was written to since the forward.
        """
        weight = self.made.weight
        _check_version(weight, self.made.weight_version)
        whole = product(weight.detach(), self.made.mask)
        if (self.size, self.stride) == (whole.shape, whole.stride()):
            return whole
        return whole.as_strided(self.size, self.stride, self.offset)


class Saver:
    """What packs and unpacks the tensors that autograd saves in one region of a forward.

    Args:
        outer: (pack, unpack) of whoever saves tensors around the region, such as activation
            checkpointing; None where nobody does.
    """

    def __init__(self, outer: Any) -> None:
        self.outer = outer
        self.made: dict[int, _Made] = {}

    def pack(self, tensor: Tensor) -> Any:
        """A recipe for a masked weight; all else as it would be saved without."""
        if type(tensor) is Tensor and tensor.layout is torch.strided and self.made:
            made = self.made.get(storage_address(tensor))
            if made is not None and made.is_in(tensor):
                return _Recipe(made, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        if self.outer is not None:
            return self.outer[0](tensor)
        return tensor, tensor._version

    def unpack(self, saved: Any) -> Tensor:
        """The way back of `pack`.

        Raises:
            RuntimeError: it was written to since it was saved.
        """
        if isinstance(saved, _Recipe):
            return saved.make()
        if self.outer is not None:
            return self.outer[1](saved)
        tensor, version = saved
        _check_version(tensor, version)
        return tensor


class Recomputing:
    """While entered, autograd saves masked weights that are made meanwhile as recipes.

    Does nothing where no gradients are recorded, where tensors may not be saved by hooks (within
    transforms of torch.func), and inside of another one.
    """

    def __enter__(self) -> Self:
        self._hooks: Any = None
        if not torch.is_grad_enabled() or not may_hook_saved_tensors() or transforms_active():
            return self
        outer = saved_tensor_hooks()
        if outer is not None and isinstance(getattr(outer[0], "__self__", None), Saver):
            return self
        saver = Saver(outer)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(saver.pack, saver.unpack)
        self._hooks.__enter__()
        self._before = getattr(_thread, "saver", None)
        _thread.saver = saver
        return self

    def __exit__(self, *error: object) -> None:
        if self._hooks is not None:
            _thread.saver.made.clear()
            _thread.saver = self._before
            self._hooks.__exit__(*error)


def remember(masked: Tensor, weight: Tensor, mask: Tensor) -> None:
    """Tell the `Recomputing` around, if there is one, what a masked weight is the product of."""
    saver: Saver | None = getattr(_thread, "saver", None)
    if saver is not None:
        storage = StorageWeakRef(masked.untyped_storage())
        made = _Made(storage, masked._version, weight, mask, weight._version)
        saver.made[storage_address(masked)] = made


def _check_version(tensor: Tensor, version: int) -> None:
    """As autograd does for tensors that it saves itself."""
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: [{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; "
            f"expected version {version} instead."
        )
