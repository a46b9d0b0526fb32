"""Attention as one node: heads may go, whole, with their queries, keys and values.

Shapes: `H` query heads, `G` key-value heads (`H = G` without grouped queries), `D` head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from mvpfx.dims.contraction import along
from mvpfx.dims.rule import Step, alike, all_dims, stay
from mvpfx.dims.value import Known, Value, any_slice, compact, slices

WIDTH = "heads share their width"
GROUP = "query heads share keys and values with heads that are needed"
UNATTENDED = "a query that may attend to nothing gets 0, not their constant values"


@dataclass(frozen=True)
class Attention:
    """Softmax attention over `[B, H, S, D]`, `[B, G, T, D]`, `[B, G, T, D]`.

    Attributes:
        out_heads: the dimension of heads in the result: 1, or 2 in `[B, S, H, D]`.
    """

    out_heads: int

    def forward(self, step: Step) -> None:
        """A head whose value is the same at all places yields it: rows of a softmax sum to one.

        A query that may attend to nothing, since a mask hides all, gets 0 instead.
        """
        query, _, value, _ = self.parts(step)
        out = step.outputs[0]
        constant, found = along(value, 2)
        if not step.attends:
            constant = constant & (found == 0)
        if not bool(constant.any()):
            return
        share = query.shape[1] // value.shape[1]
        if constant.shape[1] > 1 and share > 1:
            constant = constant.repeat_interleave(share, dim=1)
        if found.shape[1] > 1 and share > 1:
            found = found.repeat_interleave(share, dim=1)
        if self.out_heads == 2:
            constant, found = constant.transpose(1, 2), found.transpose(1, 2)
        out.known = Known(compact(constant), compact(found))

    def backward(self, step: Step) -> None:
        """A head is needed where its result is and is not constant."""
        query, key, value, others = self.parts(step)
        out = step.outputs[0]
        weights = [o for o in step.outputs[1:] if bool(o.needed.any())]
        heads = query.shape[1]
        moving = any_slice(out.needed & ~out.known.constant, self.out_heads, heads)
        for extra in weights:
            moving |= any_slice(extra.needed, 1, heads)
        for extra in step.outputs[1:]:
            extra.need(moving.view(1, -1, 1, 1))  # computed along with what is needed
        read = any_slice(out.needed, self.out_heads, heads)
        query.need(moving.view(1, -1, 1, 1))
        key.need(_groups(moving, key.shape[1]).view(1, -1, 1, 1))
        value.need(_groups(read, value.shape[1]).view(1, -1, 1, 1))
        for other in others:
            by_head = len(other.shape) > 2 and other.shape[-3] == heads
            other.need(moving.view(-1, 1, 1) if by_head else moving.any())

    def agree(self, step: Step) -> Iterator[Value]:
        """Query heads go with their result, key and value heads with their whole group."""
        query, key, value, others = self.parts(step)
        out, *weights = step.outputs
        heads = query.shape[1]
        yield from self._unattended(step)
        by_head = [(query, 1), (out, self.out_heads), *((w, 1) for w in weights)]
        by_head += [
            (o, len(o.shape) - 3) for o in others if len(o.shape) > 2 and o.shape[-3] == heads
        ]
        yield from alike(by_head)
        yield from alike([(key, 1), (value, 1)])
        yield from self._group(step, query, key, value)
        heads_of = {*by_head, (key, 1), (value, 1)}
        rest = all_dims(query, key, value, out, *weights, *others)
        yield from stay((place for place in rest if place not in heads_of), WIDTH)

    def _unattended(self, step: Step) -> Iterator[Value]:
        """Keep heads whose values are constant and whose result is not."""
        query, _, value, _ = self.parts(step)
        constant, found = along(value, 2)
        if step.attends or not bool((constant & (found != 0)).any()):
            return
        out, heads = step.outputs[0], value.shape[1]
        gone = out.removed[self.out_heads].view(heads, query.shape[1] // heads).all(dim=1)
        if value.allow(1, gone | ~slices(constant, 1, heads), UNATTENDED):
            yield value

    def _group(self, step: Step, query: Value, key: Value, value: Value) -> Iterator[Value]:
        """Let groups go whole, and as many heads from each group that stays."""
        heads, groups = query.shape[1], key.shape[1]
        gone = query.removed[1].view(groups, heads // groups)
        whole = key.removed[1] & gone.all(dim=1)
        for tensor in (key, value):
            if tensor.allow(1, whole, GROUP):
                yield tensor
        share = gone & whole[:, None]
        left = gone[~whole]
        if len(left) and not step.whole_groups:
            fewest = int(left.sum(dim=1).min())
            fewest = min(fewest, heads // groups - 1)
            first = gone & (gone.cumsum(dim=1) <= fewest)
            share = share | (first & ~whole[:, None])
        if query.allow(1, share.reshape(-1), GROUP):
            yield query

    def parts(self, step: Step) -> tuple[Value, Value, Value, list[Value]]:
        """Query, key, value, and what else is read."""
        query, key, value, *others = step.values.values()
        return query, key, value, others


def _groups(heads: Tensor, groups: int) -> Tensor:
    return heads.view(groups, -1).any(dim=1)


class CacheUpdate:
    """A cache that takes keys and values `[B, G, S, D]` and yields all it has seen of them.

    What it holds was computed by the same layer, so a constant is one there too.
    """

    def forward(self, step: Step) -> None:
        """Constants that are the same at all places stay."""
        for output, value in zip(step.outputs, step.inputs, strict=True):
            constant, found = along(value, 2)
            output.known = Known(compact(constant), compact(found))

    def backward(self, step: Step) -> None:
        """A head is needed where it is read again."""
        for output, value in zip(step.outputs, step.inputs, strict=True):
            value.need(output.needed.any(dim=2, keepdim=True))

    def agree(self, step: Step) -> Iterator[Value]:
        """Heads go from all or none."""
        for output, value in zip(step.outputs, step.inputs, strict=True):
            yield from alike([(output, 1), (value, 1)])
            yield from stay(((t, dim) for t in (output, value) for dim in (0, 2, 3)), WIDTH)
