"""Tiling: which nodes of a graph are computed in tiles, and the steps that do it.

Reading order: `Tiling.drafts` (the whole way), `_look` (forward: which nodes can be), `_wanted`
(backward: what is needed, in tiles or as a tensor), `_steps` (the steps).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from mvpfx.dims.rearrangement import NAMES
from mvpfx.kernels.forms import HEADS, OF_PARTS, ROWS, SPLIT, changed_form
from mvpfx.kernels.plan import Draft, Value
from mvpfx.kernels.recognition import Found, recognise, shape_text, value_of
from mvpfx.nodes import name_of, writes_shared
from mvpfx.variant import resolve

OF_HEADS = ("attend", "rotate", "normalize")
"""Steps that take heads as they lie in tiles."""


@dataclass(frozen=True)
class _Tiled:
    """How a node's value is known in tiles."""

    form: str
    value: Value
    maker: fx.Node
    """The node whose step makes the value; others look at it in another form."""


class Tiling:
    """The tiled part of one graph.

    Args:
        module: the region that the graph's targets belong to.
        graph: of one kind of call of it.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self._module = module
        self._graph = graph
        self._readers = {
            str(node.target): node for node in graph.nodes if node.op in ("call_module", "get_attr")
        }
        self._found: dict[fx.Node, Found] = {}
        self._tiled: dict[fx.Node, _Tiled] = {}
        self._entered: dict[fx.Node, Value] = {}
        self._count = 0

    def drafts(self) -> list[Draft]:
        """All that the graph computes: steps in tiles, and nodes as they were."""
        for node in self._graph.nodes:
            found = recognise(node, self._module_of) if node.op != "output" else None
            if found is not None and self._fits(node, found):
                self._found[node] = found
        tensors, makers = self._wanted()
        return list(self._steps(tensors, makers))

    def obstacle(self) -> str | None:
        """Why no part can be in tiles: what changes a tensor would not change its tiles."""
        order = {node: at for at, node in enumerate(self._graph.nodes)}
        for node in self._graph.nodes:
            module = self._module_of(str(node.target)) if node.op == "call_module" else None
            if writes_shared(node, module, order, NAMES):
                return f"{name_of(node)} changes a tensor that is read elsewhere"
        return None

    def _module_of(self, target: str) -> Any:
        holder, key = resolve(self._module, self._readers[target])
        return holder[key]

    def _new(self, width: int) -> Value:
        self._count += 1
        return Value(self._count, 0, width)

    def _fits(self, node: fx.Node, found: Found) -> bool:
        """Whether a node that can be computed in tiles has what it takes; notes its form."""
        known = [self._tiled.get(read) for read in found.reads]
        first = known[0] if known else None
        if found.kind == "multiply":
            return self._put(node, ROWS, self._new(found.options["rows"]), node)
        if found.kind == "attend":
            return self._fits_attention(node, found, known)
        if found.kind == "combine" and "pair" in found.options:
            rows = any(one is not None and one.form == ROWS for one in known)
            plain = all(one is None or one.form == ROWS for one in known)
            if not rows or not plain:
                return False
            width = next(one.value.width for one in known if one is not None)
            return self._put(node, ROWS, self._new(width), node)
        if first is None:
            return False
        same = shape_text(node) == shape_text(found.reads[0])
        if found.kind == "normalize":
            return same and self._by_head(node, found, first)
        if found.kind == "combine":
            rows = same and first.form == ROWS
            return rows and self._put(node, ROWS, self._new(first.value.width), node)
        if found.kind == "rotate":
            return self._fits_rotation(node, found, first)
        if found.kind in ("same", "first"):
            return self._put(node, first.form, first.value, first.maker)
        if found.kind in ("features", "part"):
            return self._fits_piece(node, found, first)
        before, after = value_of(found.reads[0]), value_of(node)
        form = None if after is None else changed_form(found.kind, first.form, before, after)
        return form is not None and self._put(node, form, first.value, first.maker)

    def _put(self, node: fx.Node, form: str, value: Value, maker: fx.Node) -> bool:
        self._tiled[node] = _Tiled(form, value, maker)
        return True

    def _fits_piece(self, node: fx.Node, found: Found, first: _Tiled) -> bool:
        """Whether some neighbouring features are taken, which lie side by side in tiles too."""
        options, whole = found.options, first.value
        if found.kind == "features":
            width, start = value_of(node).shape[-1], options["first"]
            form = ROWS if first.form == ROWS and type(width) is int else None
        else:
            form = OF_PARTS.get((first.form, options["dimension"]))
            count = value_of(found.reads[0]).shape[options["dimension"]]
            width = whole.width // count if type(count) is int else 0
            start = options["index"] * width
        if form is None or not width:
            return False
        return self._put(node, form, Value(whole.number, whole.first + start, width), first.maker)

    def _fits_attention(self, node: fx.Node, found: Found, known: list[_Tiled | None]) -> bool:
        """Whether queries, keys and values are of the same tokens, and all in heads."""
        if any(one is None or one.form != HEADS for one in known):
            return False
        shapes = [value_of(read).shape for read in found.reads]
        sizes = [tuple(map(str, (shape[0], shape[2]))) for shape in shapes]
        numbers = [(shape[1], shape[3]) for shape in shapes]
        if len(set(sizes)) != 1 or not all(type(n) is int for pair in numbers for n in pair):
            return False
        (heads, width), (groups, key_width), (value_groups, out_width) = numbers
        if width != key_width or groups != value_groups or heads % groups:
            return False
        # The function of transformers hands on [B, S, H, D], torch's own [B, H, S, D].
        form = HEADS if value_of(node) is not None else SPLIT
        self._tiled[node] = _Tiled(form, self._new(heads * out_width), node)
        found.options.update(heads=heads, groups=groups)
        return True

    def _by_head(self, node: fx.Node, found: Found, first: _Tiled) -> bool:
        """Whether a step does the same with each head of what it reads, of which rows are one."""
        width = value_of(node).shape[-1]
        if type(width) is not int:
            return False
        found.options["heads"] = first.value.width // width
        return self._put(node, first.form, self._new(first.value.width), node)

    def _fits_rotation(self, node: fx.Node, found: Found, first: _Tiled) -> bool:
        """Whether heads are rotated, by tables of the same tokens, or of one sequence for all."""
        x = value_of(found.reads[0])
        tables = [value_of(found.options[name]) for name in ("cosine", "sine")]
        if first.form != HEADS or shape_text(node) != shape_text(found.reads[0]):
            return False
        batch, _, *rest = map(str, x.shape)
        for table in tables:
            if table is None or table.dtype is not x.dtype:
                return False
            sequences, *size = map(str, table.shape)
            if size != rest or sequences not in (batch, "1"):
                return False
        return self._by_head(node, found, first)

    def _wanted(self) -> tuple[set[fx.Node], set[fx.Node]]:
        """The nodes that are needed as tensors, and those whose steps are needed."""
        tensors: set[fx.Node] = set()
        makers: set[fx.Node] = set()
        (output,) = self._graph.find_nodes(op="output")
        stack: list[tuple[fx.Node, bool]] = [(node, False) for node in output.all_input_nodes]
        stack += [(node, False) for node in self._graph.find_nodes(op="placeholder")]
        while stack:
            node, in_tiles = stack.pop()
            tiled = self._tiled.get(node)
            if in_tiles and tiled is not None:
                maker = tiled.maker
                if maker not in makers:
                    makers.add(maker)
                    found = self._found[maker]
                    stack += [(read, self._reads_tiles(found, read)) for read in found.reads]
                    stack += [(other, False) for other in self._besides(maker)]
            elif node not in tensors:
                tensors.add(node)
                leaves = tiled is not None and tiled.form == ROWS
                stack += [(node, True)] if leaves else [(n, False) for n in node.all_input_nodes]
        return tensors, makers

    def _reads_tiles(self, found: Found, read: fx.Node) -> bool:
        """Whether a step takes what it reads in tiles; else it enters."""
        tiled = self._tiled.get(read)
        return tiled is not None and (tiled.form == ROWS or found.kind in OF_HEADS)

    def _besides(self, maker: fx.Node) -> list[fx.Node]:
        """Tensors that a step reads beside activations: masks, weights of norms, tables."""
        options = self._found[maker].options
        found = (options.get(name) for name in ("mask", "weight", "bias", "cosine", "sine"))
        return [value for value in found if isinstance(value, fx.Node)]

    def _steps(self, tensors: set[fx.Node], makers: set[fx.Node]) -> Iterator[Draft]:
        for node in self._graph.nodes:
            tiled = self._tiled.get(node)
            if node in makers:
                found = self._found[node]
                reads: list[Value] = []
                for read in found.reads:
                    if self._reads_tiles(found, read):
                        reads.append(self._tiled[read].value)
                        continue
                    width = found.options.get("columns") or self._tiled[node].value.width
                    yield from self._enter(read, width, _front(read))
                    reads.append(self._entered[read])
                if found.kind == "rotate":
                    width = self._tiled[node].value.width // found.options["heads"]
                    front = self._front_in_heads(found.reads[0])
                    for table in (found.options.pop("cosine"), found.options.pop("sine")):
                        yield from self._enter(table, width, front, beside=True)
                        reads.append(self._entered[table])
                yield self._step(node, found, reads)
            if node in tensors and node.op != "output":
                if tiled is not None and tiled.form == ROWS:
                    yield Draft("leave", (tiled.value,), None, _front(node), node=node)
                else:
                    yield Draft("node", (), None, "", node=node)

    def _front_in_heads(self, node: fx.Node) -> str:
        """The leading sizes of what a node has in heads, as they were before it was split."""
        maker = self._tiled[node].maker
        if self._tiled[maker].form == ROWS:
            return _front(maker)
        return self._front_in_heads(self._found[maker].reads[0])

    def _enter(
        self, node: fx.Node, width: int, front: str, beside: bool = False
    ) -> Iterator[Draft]:
        """Let a tensor enter, once."""
        if node not in self._entered:
            self._entered[node] = made = self._new(width)
            yield Draft("enter", (), made, front, node=node, options={"beside": beside})

    def _step(self, node: fx.Node, found: Found, reads: list[Value]) -> Draft:
        made, options = self._tiled[node].value, dict(found.options)
        front = _front(found.reads[0])
        if self._tiled[node].form != ROWS:
            front = self._front_in_heads(found.reads[0])
        if found.kind in ("attend", "rotate"):
            return Draft(found.kind, tuple(reads), made, front, options=options)
        if found.kind == "multiply":
            return Draft("multiply", tuple(reads), made, front, layers=(str(node.target),))
        pair = options.pop("pair", None)
        if pair is not None:
            factor, addend = (reads[1], None) if pair == "factor" else (None, reads[1])
            x = (reads[0],)
            return Draft("combine", x, made, front, factor=factor, addend=addend, options=options)
        if options.pop("module", False):
            module = self._module_of(str(node.target))
            held = (name for name in ("weight", "bias") if getattr(module, name, None) is not None)
            options |= {name: f"{node.target}.{name}" for name in held}
        return Draft(found.kind, (reads[0],), made, front, options=options)


def _front(node: fx.Node) -> str:
    """The leading sizes of a node's value, to compare: steps of one chain have the same tokens."""
    value = value_of(node)
    return "" if value is None else str(tuple(map(str, value.shape[:-1])))
