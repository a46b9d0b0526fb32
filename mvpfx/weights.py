"""Which weights of a model may feed a matmul, and all the names they go by."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from mvpfx.head_unit import head_unit
from mvpfx.recurrent import recurrent_weights
from mvpfx.site import Site
from mvpfx.transformers_types import is_conv1d, is_experts

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def layer_sites(model: nn.Module) -> Iterator[Site]:
    """The weights of layers known to multiply by them, in model order, each parameter once.

    >>> [site.name for site in layer_sites(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))]
    ['0.weight']
    """
    names = parameter_names(model)
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, out_dim in _layer_weights(module):
            weight = module._parameters.get(name)
            if weight is None or id(weight) in seen:
                continue
            seen.add(id(weight))
            full = f"{module_name}.{name}" if module_name else name
            aliases = tuple(other for other in names[full] if other != full)
            parts = weight.shape[0] if is_experts(module) else 1
            shape = tuple(weight.shape)
            head = None
            if len(shape) == 2:
                head = head_unit(model, full, shape[out_dim], shape[1 - out_dim])
            yield Site(full, shape, out_dim, aliases, parts, head)


def weight_owners(model: nn.Module) -> Iterator[str]:
    """Names of the modules that hold a weight some matmul may read: known layers, and modules
    outside torch.nn that hold parameters of two or more dimensions themselves.
    """
    for name, module in model.named_modules():
        own = isinstance(module, nn.ParameterList | nn.ParameterDict)
        own |= not type(module).__module__.startswith("torch.nn.modules.")
        raw = own and any(p.dim() >= 2 for p in module.parameters(recurse=False))
        if raw or any(True for _ in _layer_weights(module)):
            yield name


def computed_weights(model: nn.Module) -> Iterator[str]:
    """Names of layers' weights that are no parameters but computed from others in each forward:
    under `torch.nn.utils.parametrize`, or weight norm by hooks.
    """
    for module_name, module in model.named_modules():
        if isinstance(module, (*_LAYERS, *_TRANSPOSED)) and "weight" not in module._parameters:
            yield f"{module_name}.weight" if module_name else "weight"


def parameter_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """All names of each parameter, its own included, by every name."""
    by_identity: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), []).append(name)
    return {name: tuple(names) for names in by_identity.values() for name in names}


def _layer_weights(module: nn.Module) -> Iterator[tuple[str, int]]:
    if isinstance(module, _LAYERS):
        yield "weight", 0
    elif isinstance(module, _TRANSPOSED) or is_conv1d(module):
        yield "weight", 1
    elif is_experts(module):
        for name, weight in module._parameters.items():
            if weight is not None and weight.dim() == 3:
                yield name, 2 if getattr(module, "is_transposed", False) else 1
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        yield from ((name, 0) for name in recurrent_weights(module))
    elif isinstance(module, nn.MultiheadAttention):
        for name in _ATTENTION:
            if module._parameters.get(name) is not None:
                yield name, 0
