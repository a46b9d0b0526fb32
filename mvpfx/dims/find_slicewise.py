"""Which nodes act on slices: a closed table of functions, methods and layers of torch."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, nn

from mvpfx.dims.channel_norm import ChannelSlope, Gate, GroupNorm, parameter_values
from mvpfx.dims.elementwise import PerChannel
from mvpfx.dims.rule import Rule, Step
from mvpfx.dims.slicewise import Keeps, Slicewise, Softmax

_REDUCTIONS: dict[str, tuple[int, Keeps]] = {
    "all": (1, "nothing"), "amax": (1, "same"), "amin": (1, "same"), "any": (1, "nothing"),
    "argmax": (1, "nothing"), "argmin": (1, "nothing"), "argsort": (1, "nothing"),
    "count_nonzero": (1, "nothing"), "cummax": (1, "same"), "cummin": (1, "same"),
    "cumprod": (1, "zero"), "cumsum": (1, "zero"), "diff": (2, "flat"),
    "kthvalue": (2, "same"), "logcumsumexp": (1, "nothing"), "logsumexp": (1, "nothing"),
    "max": (1, "same"), "mean": (1, "same"), "median": (1, "same"), "min": (1, "same"),
    "mode": (1, "same"), "nanmean": (1, "same"), "nanmedian": (1, "same"), "nansum": (1, "zero"),
    "norm": (2, "zero"), "normalize": (2, "zero"), "prod": (1, "zero"), "softmin": (1, "nothing"),
    "sort": (1, "same"), "std": (1, "nothing"), "sum": (1, "zero"), "topk": (2, "same"),
    "var": (1, "nothing"), "var_mean": (1, "nothing"), "std_mean": (1, "nothing"),
    "vector_norm": (2, "zero"), "linalg_vector_norm": (2, "zero"),
}  # fmt: skip
"""Name -> where the dimension stands among the arguments, and what is kept of constants."""
_LAST = frozenset(("argsort", "cummax", "diff", "kthvalue", "mode", "sort", "topk"))
"""Those that mix the last dimension where none is given."""
_CHANNELS = frozenset(("normalize",))
"""Those that mix dimension 1 where none is given."""
_UNSQUARED = frozenset(("var", "std", "var_mean", "std_mean"))
_SAMPLING = frozenset(("interpolate", "upsample", "upsample_nearest", "upsample_bilinear"))
_LAYER_SAMPLING = (nn.Upsample,)
_PADDING = (
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d,
    nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
)  # fmt: skip
_NORMS = ("layer_norm", "rms_norm")
_POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool")
_LAYER_POOLS: dict[type[nn.Module], str] = {
    kind: f"{name}{dims}d"
    for dims, kinds in enumerate(
        (
            (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.LPPool1d),
            (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d),
            (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d, nn.LPPool3d),
        ),
        start=1,
    )
    for kind, name in zip(
        kinds,
        ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool"),
        strict=True,
    )
}
_INSTANCE = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
_TABLES = {"running_mean": 1, "running_var": 2, "weight": 3, "bias": 4}


def find_slicewise(step: Step) -> Rule | None:
    """The rule of a node that acts on slices of its first argument; None for any other."""
    first = step.node.args[0] if step.node.args else None
    x = step.value(first)
    if x is None or not step.outputs or next(iter(step.values.values())) is not x:
        return None
    rank = len(x.shape)
    if step.module is not None:
        return _layer(step, step.module, rank)
    if step.node.op == "call_function" and not _is_torch(step.node.target):
        return None
    return _gate(step, rank) or _channelwise(step, rank) or _function(step, rank)


def _is_torch(target: Any) -> bool:
    home = str(getattr(target, "__module__", None) or "torch")
    return home.split(".")[0] in ("torch", "_operator", "builtins")


def _function(step: Step, rank: int) -> Rule | None:
    name = step.name.removesuffix("_with_indices").removeprefix("boolean_dispatch")
    if name in _SAMPLING and len(step.values) == 1 and rank > 2:
        return _over(step, tuple(range(2, rank)), "same")
    if name == "pad" and len(step.values) == 1:
        sizes = step.argument(1, "pad")
        given = step.argument(2, "mode", "constant"), step.argument(3, "value", None)
        return _pad(step, rank, sizes, *given)
    if name in ("unfold", "fold") and step.node.op == "call_function":
        return _folding(step, name, step.argument(1 if name == "unfold" else 2, "kernel_size"))
    if name == "grid_sample" and rank > 2:
        zeros = step.argument(3, "padding_mode", "zeros") == "zeros"
        return _over(step, tuple(range(2, rank)), "zero" if zeros else "same")
    if name[:-2] in _POOLS and name[-2:] in ("1d", "2d", "3d"):
        return _pool(step, name, step.argument(_padding_place(name), "padding", 0))
    if name == "softmax" and type(step.argument(1, "dim")) is int and len(step.values) == 1:
        return _softmax(step, step.argument(1, "dim") % rank)
    if name == "local_response_norm":
        return _over(step, (1,), "nothing")
    if name in _NORMS:
        sizes = step.argument(1, "normalized_shape")
        return _norm(step, len(sizes)) if isinstance(sizes, (tuple, list)) else None
    return _reduction(step, name, rank)


def _norm(step: Step, last: int) -> Rule | None:
    """Normalisation over the last dimensions; without a bias it makes zeros of zeros."""
    rank = len(step.inputs[0].shape)
    biased = getattr(step.module, "bias", None) is not None
    biased |= step.module is None and step.argument(3, "bias") is not None
    plain = "nothing" if biased and "rms" not in step.name else "zero"
    return _over(step, tuple(range(rank - last, rank)), plain)


def _softmax(step: Step, dim: int) -> Rule:
    rest = [d for d in range(len(step.inputs[0].shape)) if d != dim]
    return Softmax((dim,), tuple((d, d) for d in rest))


def _padding_place(name: str) -> int:
    return 3 if name.startswith(("max_pool", "avg_pool")) else 99


def _reduction(step: Step, name: str, rank: int) -> Rule | None:
    """A function of one argument along dimensions that are given."""
    if name in ("quantile", "nanquantile"):
        place, keeps = 2, "same"
        if not isinstance(step.argument(1, "q"), float):
            return None
    elif name in ("softmin", "log_softmax"):
        place, keeps = 1, "nothing"
    elif name in _REDUCTIONS:
        place, keeps = _REDUCTIONS[name]
    else:
        return None
    if len(step.values) != 1:
        return None
    default = -1 if name in _LAST else 1 if name in _CHANNELS else None
    dim: Any = step.argument(place, "dim", step.node.kwargs.get("axis", default))
    dims: Any = dim if isinstance(dim, (tuple, list)) else (dim,)
    if name in _UNSQUARED and not all(type(d) is int for d in dims):
        return None
    if any(type(d) is not int for d in dims) or not dims:
        return None
    return _over(step, tuple(sorted({d % rank for d in dims})), keeps)


def _over(step: Step, mixed: tuple[int, ...], keeps: Keeps) -> Rule | None:
    """A rule for results that have the mixed dimensions too, or lack them."""
    rank = len(step.inputs[0].shape)
    ranks = {len(out.shape) for out in step.outputs}
    free = [dim for dim in range(rank) if dim not in mixed]
    if ranks == {rank}:
        pairs = tuple((dim, dim) for dim in free)
    elif ranks == {len(free)}:
        pairs = tuple((dim, own) for own, dim in enumerate(free))
    else:
        return None
    alike = all(
        step.inputs[0].shape[dim] == out.shape[own] for dim, own in pairs for out in step.outputs
    )
    if not _has_first(step):
        keeps = "nothing"
    return Slicewise(mixed, pairs, keeps) if alike else None


def _has_first(step: Step) -> bool:
    """Whether the first output of a step is the node's first result, and not its indices."""
    if isinstance(step.node.meta.get("val"), Tensor):
        return True
    return any(user.target is operator.getitem and user.args[1] == 0 for user in step.node.users)


def _pad(step: Step, rank: int, sizes: Any, mode: Any, value: Any) -> Rule | None:
    """Padding mixes the dimensions that it pads."""
    if not isinstance(sizes, (tuple, list)):
        return None
    mixed = tuple(range(rank - len(sizes) // 2, rank))
    keeps: Keeps = "same" if mode != "constant" else "nothing"
    if mode == "constant" and not value:
        keeps = "zero"
    return _over(step, mixed, keeps)


def _pool(step: Step, name: str, padding: Any) -> Rule | None:
    """Pooling: a maximum ignores what it pads with, an average does not."""
    rank, dims = len(step.inputs[0].shape), int(name[-2])
    if rank <= dims or len(step.values) != 1:
        return None
    padded = any(padding) if isinstance(padding, (tuple, list)) else bool(padding)
    keeps: Keeps = "same"
    if name.startswith("lp_pool") or (name.startswith("avg_pool") and padded):
        keeps = "zero"
    divided = step.module is None and step.argument(6, "divisor_override") is not None
    if name.startswith("avg_pool") and divided:
        keeps = "zero"
    return _over(step, tuple(range(rank - dims, rank)), keeps)


def _folding(step: Step, name: str, kernel: Any) -> Rule | None:
    """`unfold` makes as many channels of each as the kernel has places; `fold` sums them."""
    x, out = step.inputs[0], step.outputs[0]
    batched = len(x.shape) == (4 if name == "unfold" else 3)
    if not batched or not isinstance(kernel, (int, tuple, list)):
        return None
    high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
    block = (1, high * wide) if name == "unfold" else (high * wide, 1)
    if x.shape[1] * block[1] != out.shape[1] * block[0]:
        return None
    mixed = tuple(range(2, len(x.shape)))
    return Slicewise(mixed, ((0, 0), (1, 1)), "zero", block)


def _gate(step: Step, rank: int) -> Rule | None:
    if step.name != "glu" or len(step.values) != 1:
        return None
    dim = step.argument(1, "dim", -1)
    return Gate(dim % rank) if isinstance(dim, int) else None


def _channelwise(step: Step, rank: int) -> Rule | None:
    """Functions with parameters per channel."""
    if rank < 2:
        return None
    if step.name == "prelu":
        slope = step.value(step.argument(1, "weight"))
        return ChannelSlope(slope) if slope is not None and slope.known.is_all else None
    if step.name == "group_norm":
        held = parameter_values(step, {"weight": 2, "bias": 3})
        groups = step.argument(1, "num_groups")
        if len(step.node.args) < 2 or not isinstance(groups, int):
            return None
        return _normed(step, groups, step.argument(4, "eps", 1e-5), held)
    if step.name == "instance_norm" and rank > 2:
        held = parameter_values(step, _TABLES)
        if not step.argument(5, "use_input_stats", True):
            return None
        held = {name: held[name] for name in ("weight", "bias") if name in held}
        return _normed(step, step.inputs[0].shape[1], step.argument(7, "eps", 1e-5), held)
    return None


def _normed(step: Step, groups: int, eps: Any, held: dict[str, Any]) -> Rule | None:
    plain = all(value.known.is_all for value in held.values())
    given = len(step.inputs) == 1 + len(held)
    return GroupNorm(groups, float(eps), held) if plain and given else None


def _layer(step: Step, module: nn.Module, rank: int) -> Rule | None:
    """Layers of torch, by their class."""
    kind = type(module)
    layer: Any = module
    if len(step.values) != 1:
        return None
    if isinstance(module, _LAYER_SAMPLING) and rank > 2:
        return _over(step, tuple(range(2, rank)), "same")
    if kind in _PADDING:
        constant = isinstance(module, (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d))
        mode = "constant" if constant else "other"
        return _pad(step, rank, layer.padding, mode, getattr(module, "value", 0))
    if kind in _LAYER_POOLS:
        if getattr(module, "divisor_override", None) is not None:
            return _pool(step, _LAYER_POOLS[kind], 1)
        return _pool(step, _LAYER_POOLS[kind], getattr(module, "padding", 0))
    if kind in (nn.Unfold, nn.Fold):
        return _folding(step, kind.__name__.lower(), layer.kernel_size)
    return _mixing(step, layer, rank)


def _mixing(step: Step, layer: Any, rank: int) -> Rule | None:
    """Layers that are given the dimension they compute over, and gates."""
    kind = type(layer)
    if kind is nn.Softmax:
        return None if layer.dim is None else _softmax(step, layer.dim % rank)
    if kind in (nn.Softmin, nn.LogSoftmax) and layer.dim is not None:
        return _over(step, (layer.dim % rank,), "nothing")
    if kind is nn.Softmax2d:
        return _softmax(step, rank - 3)
    if kind in (nn.LocalResponseNorm, nn.CrossMapLRN2d):
        return _over(step, (1,), "nothing")
    if kind in (nn.LayerNorm, nn.RMSNorm):
        return _norm(step, len(layer.normalized_shape))
    if kind is nn.GLU:
        dim: Any = layer.dim
        return Gate(dim % rank)
    return _parametric(step, layer, rank)


def _parametric(step: Step, layer: nn.Module, rank: int) -> Rule | None:
    """Layers with parameters per channel."""
    held = parameter_values(step, {})
    if isinstance(layer, nn.PReLU) and rank > 1:
        return ChannelSlope(held["weight"]) if "weight" in held else None
    if not held and _is_shared(step):
        return None  # one number of groups serves several calls
    if isinstance(layer, nn.GroupNorm):
        return _normed(step, layer.num_groups, layer.eps, held)
    if isinstance(layer, _INSTANCE.get(rank, ())):
        if layer.track_running_stats:
            return PerChannel(layer.eps)
        return _normed(step, layer.num_features, layer.eps, held)
    return None


def _is_shared(step: Step) -> bool:
    same = step.node.graph.find_nodes(op="call_module", target=str(step.node.target))
    return len(list(same)) > 1
