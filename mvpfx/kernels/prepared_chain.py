"""A chain with all pointers in place, for calls of one size in one thread.

What a call brings along is written into the steps; all else is looked at again only where a weight
has changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import byref, c_int64
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from mvpfx.kernels.library import DTYPES, LIBRARY, CSlice, CStep, isa, tile_tokens
from mvpfx.kernels.step import Part, Step
from mvpfx.kernels.tiles import Tiles, geometry_of, padded_tokens, workspace
from mvpfx.kernels.weight import PackedWeight, Watch, check_memory, values_of
from mvpfx.net import RefusedError, RefusedTypeError

if TYPE_CHECKING:
    from mvpfx.kernels.chain import Chain

ACTIVATIONS = {
    None: 0,
    "gelu": 1,
    "gelu_tanh": 2,
    "relu": 3,
    "silu": 4,
    "tanh": 5,
    "sigmoid": 6,
    "gelu_quick": 7,
}
"""Name -> the library's number."""
_KINDS = ("enter", "leave", "multiply", "normalize", "combine", "attend", "rotate")
"""In the order of the library's numbers."""
_NOTHING = CSlice(None, -1, 0, 0)


class PreparedChain:
    """The steps of a chain as the library takes them.

    Args:
        chain: whose steps they are.
        like: the tensor or tiles that tell how many tokens there are.
        arguments: of a call.
        packed: the weight of each "multiply"; None for other steps.
    """

    def __init__(
        self,
        chain: Chain,
        like: Tiles | Tensor,
        arguments: Sequence[Any],
        packed: Sequence[PackedWeight | None],
    ) -> None:
        self._chain = chain
        tiled = isinstance(like, Tiles)
        self.front = like.front if tiled else tuple(like.shape[:-1])
        self.dtype = like.dtype
        self.geometry = like.geometry if tiled else geometry_of(like)
        self._check_dtypes(arguments)
        self._watch = Watch()
        self._tiles = [
            (place.argument, arguments[place.argument].data.data_ptr())
            for place in chain.places
            if place.argument is not None
        ]
        self._held = self._values(arguments)
        self._results = tuple(self._held[value] for value in chain.results)
        ends = (p.offset + p.features for p in chain.places if p.offset is not None)
        self._scratch = self.geometry.tile * max(ends, default=0)
        self._alive: list[Any] = list(packed)
        self._calls = (CStep * len(chain.steps))()
        self._entering: list[tuple[CStep, int]] = []
        self._leaving: list[tuple[CStep, int]] = []
        self._masked: list[tuple[CStep, int, int]] = []
        for call, step, weight in zip(self._calls, chain.steps, packed, strict=True):
            self._fill(call, step, weight, arguments)
        kinds = ("multiply", "normalize")
        layers, norms = ([i for s in chain.steps if s.kind == k for i in s.sources] for k in kinds)
        self._watch.see(arguments, layers, [i for i in norms if i >= 0])

    def _check_dtypes(self, arguments: Sequence[Any]) -> None:
        found = {self.dtype}
        for step in self._chain.steps:
            if step.kind == "enter":
                found.add(arguments[step.sources[0]].dtype)
            elif step.kind == "multiply":
                found |= {values_of(arguments[source]).dtype for source in step.sources}
        if found - set(DTYPES) or len(found) > 1:
            kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
            raise RefusedTypeError(
                f"native kernels met {kinds}, and take float32 or bfloat16, alike for activations "
                "and weights. Convert the whole model with .to(dtype)."
            )

    def serves(self, arguments: Sequence[Any]) -> bool:
        """Whether a call of these sizes has these tiles and these weights."""
        same = all(arguments[i].data.data_ptr() == pointer for i, pointer in self._tiles)
        return same and self.geometry.tile == tile_tokens() and self._watch.holds(arguments)

    def run(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Run the steps: tiles that are handed on, then tensors that leave."""
        entered = [self._enter(call, arguments[source]) for call, source in self._entering]
        masks: dict[tuple[int, int], tuple[Tensor, Any]] = {}
        for call, source, heads in self._masked:
            self._mask(call, arguments[source], masks, (source, heads))
        left: list[Tensor] = []
        for call, width in self._leaving:
            out = torch.empty(*self.front, width, dtype=self.dtype)
            call.tensor, call.tensor_count = out.data_ptr(), out.numel()
            left.append(out)
        assert LIBRARY is not None, "whoever makes chains has looked for the library"
        threads = torch.get_num_threads()
        wrong = LIBRARY.mvpfx_run(
            byref(self.geometry), self._calls, len(self._calls), self._scratch, threads
        )
        if wrong is not None:
            self._refuse(wrong.decode())
        del entered, masks  # which had to live until now
        return (*self._results, *left)

    def _refuse(self, wrong: str) -> NoReturn:
        if self.geometry.tile != tile_tokens():
            raise RuntimeError(
                f"activations came in tiles of {self.geometry.tile} tokens, which is not what "
                f"{isa()} computes in. Choose the instruction set before the model is called."
            )
        raise RefusedError(
            f"{self._chain} cannot run on activations {list(self.front)}: {wrong}. A weight, a "
            "bias or a norm's weight does not have the size of its layer: assign one that has."
        )

    def _values(self, arguments: Sequence[Any]) -> dict[int, Tiles]:
        """The values that lie outside of the tiles' own memory."""
        held: dict[int, Tiles] = {}
        for number, place in enumerate(self._chain.places):
            if place.argument is not None:
                held[number] = arguments[place.argument]
            elif place.slot is not None:
                width, most = place.features, self._chain.slots[place.slot]
                data = workspace.room(place.slot, padded_tokens(self.geometry) * most)
                held[number] = Tiles(data, self.geometry, width, 0, width, self.front, self.dtype)
        return held

    def _fill(
        self, call: CStep, step: Step, packed: PackedWeight | None, arguments: Sequence[Any]
    ) -> None:
        call.kind = _KINDS.index(step.kind)
        call.epsilon = step.epsilon
        call.flag = self.dtype is torch.bfloat16
        part = step.out if step.x is None else step.x
        assert part is not None, "a step reads or makes something"
        call.features = part.width
        call.input = self._slice(step.x)
        call.output = self._slice(step.out)
        call.epilogue.activation = ACTIVATIONS[step.activation]
        call.epilogue.factor = self._slice(step.factor)
        call.epilogue.addend = self._slice(step.addend)
        if packed is not None:
            call.packed = packed.handle
            if packed.bias is not None:
                call.epilogue.bias = packed.bias.data_ptr()
                call.bias_count = packed.bias.numel()
        elif step.kind == "attend":
            assert step.out is not None, "an attention makes something"
            call.flag = step.causal + 2 * (self.dtype is torch.bfloat16)
            call.epsilon, call.out_features = step.scale, step.out.width
            call.heads, call.groups = step.heads, step.groups
            if step.sources[0] >= 0:
                self._masked.append((call, step.sources[0], step.heads))
        elif step.kind == "rotate":
            call.heads = step.heads
        elif step.kind == "normalize":
            call.flag, call.heads = step.centred, step.heads
            self._fill_norm(call, step, arguments)
        elif step.kind == "enter":
            self._entering.append((call, step.sources[0]))
        elif step.kind == "leave":
            call.sequence_stride = self.geometry.tokens * part.width
            call.token_stride = part.width
            self._leaving.append((call, part.width))

    def _fill_norm(self, call: CStep, step: Step, arguments: Sequence[Any]) -> None:
        for name, source in zip(("weight", "bias"), step.sources, strict=True):
            given = arguments[source] if source >= 0 else None
            if given is not None:
                check_memory(given)
                tensor = given.detach().float().contiguous()
                if name == "weight" and step.shift:
                    tensor = tensor + step.shift
                self._alive.append(tensor)
                setattr(call, name, tensor.data_ptr())
                setattr(call, f"{name}_count", tensor.numel())

    def _slice(self, part: Part | None) -> CSlice:
        if part is None:
            return _NOTHING
        offset = self._chain.places[part.value].offset
        if offset is not None:
            # A feature takes as many floats in the tile's own memory as it does elsewhere.
            return CSlice(None, 0, offset + part.first, 0)
        return self._held[part.value].part(part.first, part.width).slice()

    def _enter(self, call: CStep, x: Tensor) -> Tensor:
        """Point a step at the tensor that enters; returned, for it has to live on."""
        sequences, tokens = self.geometry.sequences, self.geometry.tokens
        if x.shape[-1] != call.features or x.dtype is not self.dtype:
            raise ValueError(
                f"a chain of {call.features} features in {self.dtype} met {x.shape[-1]} in "
                f"{x.dtype}"
            )
        if x.dim() == 3 and x.shape[0] == 1 < sequences:  # beside the others
            x = x.expand(sequences, -1, -1)
        if x.dim() != 3 or x.stride(2) != 1:
            x = x.reshape(sequences, tokens, x.shape[-1])
            x = x if x.stride(2) == 1 else x.contiguous()
        call.tensor = x.data_ptr()
        call.sequence_stride, call.token_stride, _ = x.stride()
        rows, columns, features = x.shape
        last = (rows - 1) * call.sequence_stride + (columns - 1) * call.token_stride
        call.tensor_count = last + features if rows and columns else 0
        return x

    def _mask(
        self,
        call: CStep,
        mask: Tensor,
        known: dict[tuple[int, int], tuple[Tensor, Any]],
        key: tuple[int, int],
    ) -> None:
        """Point an attention at its mask, as what is added to scores `[B, heads, S, S]`."""
        if key not in known:
            if mask.dtype is torch.bool:
                mask = torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)
            tokens = self.geometry.tokens
            mask = mask.float().expand(self.geometry.sequences, key[1], tokens, tokens)
            known[key] = mask, (c_int64 * 4)(*mask.stride())
        added, call.mask_strides = known[key]
        call.tensor = added.data_ptr()
        extent = [(n - 1) * s for n, s in zip(added.shape, added.stride(), strict=True)]
        call.tensor_count = sum(extent) + 1
