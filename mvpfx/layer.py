"""A linear layer as the program has it: a matmul in a graph, its parameters, and their owner.

Shapes: `N` output features, `K` input features. Weights are seen as `[N, K]` whatever their
storage, and written back the way they came (HF `Conv1D` keeps `[K, N]`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn

from mvpfx.matmul import Matmul, find_matmuls
from mvpfx.program import Program, full_name, parent_name
from mvpfx.swap import original_class
from mvpfx.transformers_types import is_conv1d
from mvpfx.weights import parameter_names

_WEIGHT_POSITION = {"linear": 1, "addmm": 2, "matmul": 1}
"""Kind -> the argument that must be the weight, for its output features to come last."""


Obstacle = Callable[[str], str | None]
"""Parameter name -> why its shape may not change, or None."""


@dataclass(frozen=True)
class Layer:
    """One use of one weight: `node` computes `x W^T + b` on the last dimension."""

    region: str
    node: fx.Node
    input_position: int
    """Which argument of the node holds the activations."""
    weight_name: str
    bias_name: str | None
    out_dim: int

    @property
    def input(self) -> fx.Node:
        """The activations, as the graph has them now."""
        node = self.node.args[self.input_position]
        assert isinstance(node, fx.Node)
        return node

    @property
    def owner(self) -> str:
        """Full name of the module that holds the weight."""
        return parent_name(self.weight_name)

    def weight(self, program: Program) -> Tensor:
        """Return the weight as `[N, K]`, detached."""
        value = program.parameter(self.weight_name)
        assert value is not None
        return value.detach() if self.out_dim == 0 else value.detach().t()

    def bias(self, program: Program) -> Tensor | None:
        """Return the bias `[N]`, detached, or None."""
        value = program.parameter(self.bias_name) if self.bias_name else None
        return None if value is None else value.detach()


def find_layers(program: Program) -> dict[str, dict[fx.Node, Layer]]:
    """Return the linear layers of every graph by region and node."""
    found: dict[str, dict[fx.Node, Layer]] = {}
    for region, graph in program.graphs.items():
        layers: dict[fx.Node, Layer] = {}
        for matmul in find_matmuls(graph, program.weight_shapes(region)):
            layer = _layer(program, region, matmul)
            if layer is not None:
                layers[matmul.node] = layer
        found[region] = layers
    return found


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return parameter name -> another name of the same tensor, for all that have several."""
    known = parameter_names(model)
    return {name: names[names[0] == name] for name, names in known.items() if len(names) > 1}


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module computes what `nn.Linear` does, subclass or not."""
    return isinstance(module, nn.Linear) and original_class(module).forward is nn.Linear.forward


def is_own_call(layer: Layer) -> bool:
    """Whether the matmul runs inside the forward of the module that holds the weight."""
    return full_name(layer.region, layer.node.meta.get("module", "")) == layer.owner


def is_conv1d_view(
    program: Program, node: fx.Node, consumer: Layer, layers: Mapping[fx.Node, Layer]
) -> bool:
    """Whether a node is a view in HF Conv1D's forward.

    Its literal follows `nf`, or the size of its input.
    """
    if node.op != "call_method" or node.target not in ("view", "reshape"):
        return False
    source = node.args[0]
    near = consumer if consumer.input is node else None
    if near is None and isinstance(source, fx.Node):
        near = layers.get(source)
    owner = program.module(near.owner) if near is not None else None
    if near is None or owner is None or not is_conv1d(owner):
        return False
    return node.meta.get("module") == near.node.meta.get("module") and is_own_call(near)


def resize(node: fx.Node, dim: int, size: int) -> None:
    """Make the metadata of `node` say `size` at `dim`."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        shape = list(value.shape)
        shape[dim] = size
        node.meta["val"] = value.new_empty(shape)


def _layer(program: Program, region: str, matmul: Matmul) -> Layer | None:
    position = _WEIGHT_POSITION.get(matmul.kind)
    place = 1 if matmul.kind == "addmm" else 0
    node, weight_name = matmul.node, full_name(region, matmul.weight.target)
    weight = program.parameter(weight_name)
    if position is None or matmul.input is None or weight is None or weight.dim() != 2:
        return None
    if len(node.args) <= position or node.args[position] is not matmul.operand:
        return None
    if node.args[place] is not matmul.input:
        return None
    bias = {"linear": node.args[2:3] or (node.kwargs.get("bias"),), "addmm": node.args[:1]}
    given = bias.get(matmul.kind, (None,))[0]
    if given is not matmul.bias or set(node.kwargs) - {"bias"}:
        return None
    bias_name = full_name(region, matmul.bias.target) if matmul.bias is not None else None
    return Layer(region, node, place, weight_name, bias_name, matmul.out_dim)


def find_obstacles(program: Program) -> Obstacle:
    """Return what tells of a parameter why its shape may not change."""
    tied = tied_names(program.model)
    readers: dict[str, set[str]] = defaultdict(set)
    for region, node in program.nodes():
        if node.op == "get_attr" and node.users:
            readers[full_name(region, node.target)].add(region)
        elif node.op == "call_module":
            owner = full_name(region, node.target)
            module = program.module(owner)
            held = () if module is None else (*module._parameters, *module._buffers)
            for name in (owner, *(f"{owner}.{leaf}" for leaf in held)):
                readers[name].add(region)

    def obstacle(name: str) -> str | None:
        if name in tied:
            return f"{name} is tied to {tied[name]}"
        where = sorted(readers[name]) if name in readers else []
        return f"{name} is read in {' and '.join(where)}" if len(where) > 1 else None

    return obstacle
