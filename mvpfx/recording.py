"""What recording a call yields, and the words it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mvpfx.outside import Outside
from mvpfx.sizes import SizeNodes
from mvpfx.torch_private import SymbolicShapes

SELF = "__self__"
"""The get_attr target that stands for the region module itself."""

CONSTANTS = (
    bool,
    int,
    float,
    complex,
    str,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Generator,
    type(None),
    type(...),
)
"""What may stand in a graph as it is."""


class CaptureError(Exception):
    """A call cannot become a graph; the message says why. The module's own forward serves."""


@dataclass
class Recording:
    """One recorded call.

    Attributes:
        graph: placeholders are the tensor and cache leaves of the call, in order; a tensor from
            outside the region is a get_attr node with the tensor in `meta["constant"]`.
        leaves: position of each placeholder among the flattened arguments.
        out_spec: how the flat outputs form the result.
        shapes, sizes: the symbols and where each is read from.
        fakes: the fake input of each placeholder (None for a cache).
        conditions: source over the flat arguments `L` -> the value it must have, of caches.
        outside: what else the forward may read; the graph holds while that does.
    """

    graph: fx.Graph
    leaves: list[int]
    out_spec: Any
    shapes: SymbolicShapes
    sizes: SizeNodes
    fakes: list[Tensor | None]
    conditions: dict[str, Any]
    outside: Outside
