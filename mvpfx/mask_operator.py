"""The operator that stands for a mask in compiled graphs.

Which weights stay is decided in Python, once an optimizer step, from scores, targets and sometimes
the scores of other sites. `torch.compile` sees one opaque operator, `mvpfx::mask`, that asks the
mask for its current decision: the graph stays whole, and is not compiled anew when the schedule
moves.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

OPERATOR = "mvpfx::mask"


class MaskSource(Protocol):
    """What the operator asks."""

    def mask(self) -> Tensor:
        """Which weights stay now, bool, of the weight's shape."""
        ...


_sources: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def register_source(source: MaskSource) -> Tensor:
    """A handle for `source`: an int64 scalar on the CPU, valid in this process while it lives.

    A tensor, not a number, so that a graph compiled for one block serves its siblings.
    """
    number = next(_numbers)
    _sources[number] = source
    return torch.tensor(number)


def current_mask(weight: Tensor, scores: Tensor | None, handle: Tensor) -> Tensor:
    """Which entries of `weight` stay now, bool, of its shape.

    Args:
        weight: the parameter; with `scores`, what the result depends on.
        scores: of the mask, where it stores any.
        handle: as `register_source` gave it.

    Raises:
        RuntimeError: the mask is gone, or the graph comes from another process.
    """
    source = _sources.get(int(handle))
    if source is None:
        raise RuntimeError(
            f"a compiled graph asks for mask {int(handle)}, which this process does not have. "
            "Compile the prepared model anew. For a file, convert it with mvpfx.convert first, or "
            "export it with torch.export.export(..., strict=False), which keeps the masks as data."
        )
    # A copy: the compiler may write values of its own over what an operator returned.
    return source.mask().clone()


def _fake(weight: Tensor, scores: Tensor | None, handle: Tensor) -> Tensor:
    return torch.empty(weight.shape, dtype=torch.bool, device=weight.device)


torch.library.define(
    OPERATOR,
    "(Tensor weight, Tensor? scores, Tensor handle) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)
torch.library.impl(OPERATOR, "CompositeExplicitAutograd", current_mask)
torch.library.register_fake(OPERATOR, _fake)
traced_mask: Any = torch.ops.mvpfx.mask
"""`current_mask` as one node of a traced graph; nothing is differentiated through it."""
