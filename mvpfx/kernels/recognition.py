"""Which nodes of a graph can be computed in tiles, and as what.

The table is closed, as that of elementwise nodes: what is not in it is computed as torch does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mvpfx.kernels.forms import find_features, find_part, form_change
from mvpfx.kernels.idioms import PRODUCTS, SUMS, find_gate, find_rms_norm, find_rotation
from mvpfx.kernels.library import DTYPES
from mvpfx.kernels.weight import values_of
from mvpfx.leaves import Leaf
from mvpfx.native_linear import NativeLinear
from mvpfx.nodes import name_of
from mvpfx.storage import SparseLinear

ModuleOf = Callable[[str], Any]
"""Target of a node -> the module, parameter or attribute that it reads."""

_ACTIVATIONS = {
    "relu": "relu",
    "relu_": "relu",
    "silu": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}
_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}
_SUMS = (*SUMS, "add_", "iadd")
_PRODUCTS = (*PRODUCTS, "mul_", "imul")
_SAME = ("contiguous", "clone", "detach")
_WITHOUT_MEANING = {
    "position_ids",
    "use_cache",
    "output_attentions",
    "cache_position",
    "deterministic",
    "sliding_window",  # masks have it already
}


@dataclass(frozen=True)
class Found:
    """What a node does, as far as tiles go.

    Attributes:
        kind: multiply, normalize, combine (element by element), rotate, same (hands on what it
            reads), view, transpose or stack (in another form), features or part (of what it
            reads), attend, or first (of an attention's results).
        reads: the activations that it reads, the one that has to be tiled first.
        options: what else `Step` or `attend` need.
    """

    kind: str
    reads: tuple[fx.Node, ...]
    options: dict[str, Any] = field(default_factory=dict[str, Any])


def recognise(node: fx.Node, module_of: ModuleOf) -> Found | None:
    """What a node can be computed as in tiles, by itself; None for what cannot be."""
    if node.op == "call_module":
        return _module(node, module_of(str(node.target)))
    if node.op not in ("call_function", "call_method"):
        return None
    name, x = name_of(node), _node(node, 0)
    if isinstance(node.target, Leaf):
        return _leaf(node, node.target, module_of)
    if node.target is F.scaled_dot_product_attention:
        return _attention(node)
    if x is not None and name in ("getitem", "__getitem__"):
        return _piece(node, x)
    idiom = _idiom(node, module_of)
    if idiom is not None or x is None or value_of(x) is None:
        return idiom
    return _elementwise(node, name, x) or _form(node, name, x)


def _piece(node: fx.Node, x: fx.Node) -> Found | None:
    """Some of what a node gives."""
    if isinstance(x.target, Leaf):
        return Found("first", (x,)) if node.args[1] == 0 else None
    if value_of(node) is None:
        return None
    features, part = find_features(node), find_part(node)
    if features is not None:
        return Found("features", features[:1], {"first": features[1]})
    if part is not None:
        return Found("part", part[:1], {"dimension": part[1], "index": part[2]})
    return None


def _idiom(node: fx.Node, module_of: ModuleOf) -> Found | None:
    """What is written out in several nodes, of which this is the last."""
    norm, rotation, gate = find_rms_norm(node), find_rotation(node), find_gate(node)
    if norm is not None and value_of(norm.x) is not None:
        if module_of(str(norm.weight.target)).shape != value_of(norm.x).shape[-1:]:
            return None
        options = {"epsilon": norm.epsilon, "centred": False, "weight": norm.weight}
        return Found("normalize", (norm.x,), {**options, "shift": norm.shift})
    if rotation is not None:
        return Found("rotate", (rotation.x,), {"cosine": rotation.cosine, "sine": rotation.sine})
    if gate is not None and value_of(gate.x) is not None:
        return Found("combine", (gate.x,), {"activation": gate.activation})
    return None


def _elementwise(node: fx.Node, name: str, x: fx.Node) -> Found | None:
    """What goes element by element, or over the features of one token."""
    if name in _ACTIVATIONS:
        return Found("combine", (x,), {"activation": _ACTIVATIONS[name]})
    if name == "gelu":
        tanh = (node.kwargs.get("approximate") or (*node.args, None)[1]) == "tanh"
        return Found("combine", (x,), {"activation": "gelu_tanh" if tanh else "gelu"})
    if name in _SUMS or name in _PRODUCTS:
        return _pair(node, x, "addend" if name in _SUMS else "factor")
    return _layer_norm(node, x) if name == "layer_norm" else None


def _form(node: fx.Node, name: str, x: fx.Node) -> Found | None:
    """What hands on what it reads, as it is or in another form."""
    if name in _SAME or (name == "dropout" and node.kwargs.get("training") is False):
        return Found("same", (x,))
    if name in ("to", "float", "type_as") and _dtype(node) is _dtype(x):
        return Found("same", (x,))
    change = form_change(node, name)
    return None if change is None else Found(change, (x,))


def value_of(node: fx.Node) -> Any:
    """The fake tensor that a node was recorded with; None for what is no activation in tiles."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype not in DTYPES or value.device.type != "cpu":
        return None
    return value


def shape_text(node: fx.Node) -> str:
    """A node's shape, to compare without asking symbols whether they are equal."""
    value = value_of(node)
    return "" if value is None else f"{value.dtype} {tuple(map(str, value.shape))}"


def _module(node: fx.Node, module: Any) -> Found | None:
    x = _node(node, 0)
    if x is None or value_of(x) is None or len(node.args) != 1 or node.kwargs:
        return None
    if isinstance(module, (SparseLinear, NativeLinear)):
        fits = module.output_layout == "tiled" and values_of(module).dtype is _dtype(x)
        sizes = {"rows": module.out_features, "columns": module.in_features}
        return Found("multiply", (x,), sizes) if fits and value_of(x).dim() > 1 else None
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return Found("normalize", (x,), {"epsilon": module.eps, "centred": True, "module": True})
    if isinstance(module, nn.RMSNorm) and len(module.normalized_shape) == 1:
        eps = torch.finfo(_dtype(x)).eps if module.eps is None else module.eps
        return Found("normalize", (x,), {"epsilon": eps, "centred": False, "module": True})
    if type(module) is nn.GELU:
        name = "gelu_tanh" if module.approximate == "tanh" else "gelu"
        return Found("combine", (x,), {"activation": name})
    if type(module) in _MODULES:
        return Found("combine", (x,), {"activation": _MODULES[type(module)]})
    idle = isinstance(module, nn.Dropout) and not module.training
    return Found("same", (x,)) if idle or type(module) is nn.Identity else None


def _pair(node: fx.Node, x: fx.Node, part: str) -> Found | None:
    """A sum or a product of two activations of one shape."""
    other = _node(node, 1)
    plain = len(node.args) == 2 and not node.kwargs and other is not None
    if not plain or other is None or not shape_text(x) or shape_text(x) != shape_text(other):
        return None
    return Found("combine", (x, other), {"pair": part})


def _layer_norm(node: fx.Node, x: fx.Node) -> Found | None:
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    given = _given(node, names)
    shape, weight, bias = given.get("normalized_shape"), given.get("weight"), given.get("bias")
    if not isinstance(shape, (tuple, list)) or len(shape) != 1 or set(given) - set(names):
        return None
    epsilon = given.get("eps", 1e-5)
    return Found(
        "normalize",
        (x,),
        {"epsilon": epsilon, "centred": True, "weight": weight, "bias": bias},
    )


def _leaf(node: fx.Node, leaf: Leaf, module_of: ModuleOf) -> Found | None:
    """The attention function of transformers that calls torch's."""
    given = _given(node, ("module", "query", "key", "value", "attention_mask"))
    module = given.pop("module", None)
    reads = _activations(given)
    mask, dropout = given.pop("attention_mask", None), given.pop("dropout", 0.0)
    scale, causal = given.pop("scaling", None), given.pop("is_causal", None)
    other = [k for k, v in given.items() if v is not None and k not in _WITHOUT_MEANING]
    known = leaf.name == "sdpa_attention_forward" and isinstance(module, fx.Node)
    if not known or reads is None or dropout or other or len(node.users) != 1:
        return None
    if causal is None:
        causal = getattr(module_of(str(module.target)), "is_causal", True)
    options = {"mask": mask, "scale": scale, "causal": bool(causal) and mask is None}
    return Found("attend", reads, options)


def _attention(node: fx.Node) -> Found | None:
    """Torch's own attention."""
    given = _given(node, ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"))
    reads = _activations(given)
    options = {
        "mask": given.pop("attn_mask", None),
        "scale": given.pop("scale", None),
        "causal": given.pop("is_causal", False),
    }
    given.pop("enable_gqa", None)
    if given.pop("dropout_p", 0.0) or given or reads is None:
        return None
    return Found("attend", reads, options)


def _given(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """A call's arguments by name; `names` are those that may come without one."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _activations(given: dict[str, Any]) -> tuple[fx.Node, ...] | None:
    """Query, key and value, taken out of the arguments of an attention."""
    found = [given.pop(name, None) for name in ("query", "key", "value")]
    nodes = tuple(one for one in found if isinstance(one, fx.Node))
    return nodes if len(nodes) == 3 else None


def _node(node: fx.Node, position: int) -> fx.Node | None:
    found = node.args[position] if len(node.args) > position else None
    return found if isinstance(found, fx.Node) else None


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype
