"""What a model is besides its tensors, as plain data, and a model made from it again.

A blueprint names the class, its configuration, the sizes its modules hold, which layers became
sparse, and every tensor. It holds no code: a class is looked up by its name in transformers, or a
model of that class is given.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mvpfx.native_linear import NativeLinear
from mvpfx.recurrent import refresh_flat_weights
from mvpfx.reduced_attention import ReducedAttention
from mvpfx.sparse_matmul import block_of, check_indices
from mvpfx.storage import Layout, SparseLinear
from mvpfx.swap import original_class
from mvpfx.transformers_types import is_conv1d, is_pretrained

SPARSE = SparseLinear.__name__
NATIVE_DENSE = NativeLinear.__name__
REDUCED: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    ReducedAttention.__name__: (nn.MultiheadAttention, ReducedAttention)
}
"""Classes that modules are given once some of what they hold is gone -> which they had, and get."""


@dataclass(frozen=True)
class Blueprint:
    """A model without its numbers.

    Attributes:
        kind: name of its class.
        config: of a transformers model, as its `to_dict` gives it; None for any other.
        attention: which attention function a transformers model uses.
        generation: its generation settings, where it has any.
        modules: name -> name of its class.
        sizes: name -> the whole numbers that the module holds, by attribute.
        layouts: name of a sparse layer -> the layout of its output.
        tensors: name -> `shape`, `dtype`, `role` (parameter or buffer), `trains`.
        tied: name -> the name its tensor is stored under.
    """

    kind: str
    config: dict[str, Any] | None
    attention: str | None
    generation: dict[str, Any] | None
    modules: dict[str, str]
    sizes: dict[str, dict[str, int]]
    layouts: dict[str, str]
    tensors: dict[str, dict[str, Any]]
    tied: dict[str, str]


def describe(model: nn.Module) -> tuple[Blueprint, dict[str, Tensor]]:
    """The blueprint of a model, and its tensors under the names they are stored by."""
    modules = dict(model.named_modules(remove_duplicate=False))
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    entries: dict[str, dict[str, Any]] = {}
    first: dict[int, str] = {}
    for name, role, tensor in _tensors(model):
        trains = role == "parameter" and tensor.requires_grad
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries[name] = {
            "shape": list(tensor.shape),
            "dtype": dtype,
            "role": role,
            "trains": trains,
        }
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            stored[name] = tensor.detach().to("cpu").contiguous()
    pretrained: Any = model if is_pretrained(model) else None
    generation = getattr(pretrained, "generation_config", None)
    return Blueprint(
        kind=original_class(model).__name__,
        config=None if pretrained is None else pretrained.config.to_dict(),
        attention=None if pretrained is None else pretrained.config._attn_implementation,
        generation=None if generation is None else generation.to_dict(),
        modules={name: original_class(module).__name__ for name, module in modules.items()},
        sizes={name: sizes for name, module in modules.items() if (sizes := _sizes(module))},
        layouts={n: m.output_layout for n, m in modules.items() if isinstance(m, SparseLinear)},
        tensors=entries,
        tied=tied,
    ), stored


def make_skeleton(blueprint: Blueprint) -> nn.Module:
    """A transformers model of the class and configuration of a blueprint, without numbers.

    Raises:
        ValueError: there is no such class, or it does not take the configuration.
    """
    if blueprint.config is None:
        raise ValueError(
            f"{blueprint.kind} is no transformers model, and code is not loaded from files. Pass "
            f"load a {blueprint.kind} as it was before it was pruned, model=..."
        )
    transformers = importlib.import_module("transformers")
    kind = transformers_class(blueprint.kind)
    most = len(blueprint.tensors)
    for key, value in blueprint.config.items():
        counts = key.startswith("num_") and key.endswith("layers")
        if counts and isinstance(value, int) and value > most:
            raise ValueError(f"{key} is {value}, and there are {most} tensors in all")
    try:
        with torch.device("meta"):
            model: Any = kind(kind.config_class.from_dict(dict(blueprint.config)))
        if blueprint.attention is not None:
            model.set_attn_implementation(blueprint.attention)
        if blueprint.generation is not None:
            model.generation_config = transformers.GenerationConfig.from_dict(blueprint.generation)
    except Exception as error:
        raise ValueError(f"{blueprint.kind} does not take its configuration: {error}") from error
    return model


def transformers_class(name: str) -> Any:
    """The model class of transformers that is called `name`.

    Raises:
        ValueError: there is none.
    """
    transformers = importlib.import_module("transformers")
    kind: Any = getattr(transformers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise ValueError(f"transformers {transformers.__version__} has no model {name}")
    return kind


def class_before(kind: str) -> str:
    """The class that a module called `kind` had before anything of it went.

    >>> class_before("ReducedAttention"), class_before("Linear")
    ('MultiheadAttention', 'Linear')
    """
    return REDUCED[kind][0].__name__ if kind in REDUCED else kind


def fill(model: nn.Module, blueprint: Blueprint, stored: Mapping[str, Tensor]) -> nn.Module:
    """Give a skeleton the sizes, sparse layers and tensors of a blueprint, in place.

    Raises:
        ValueError: model, blueprint and tensors do not fit one another.
    """
    _check_modules(model, blueprint)
    made: dict[str, Tensor] = {}
    for name, source in {**{n: n for n in blueprint.tensors}, **blueprint.tied}.items():
        entry = blueprint.tensors[name]
        if source not in made:
            tensor = stored[source]
            parameter = entry["role"] == "parameter"
            made[source] = nn.Parameter(tensor, entry["trains"]) if parameter else tensor
    by_owner: dict[str, dict[str, Tensor]] = {name: {} for name in blueprint.modules}
    for name in blueprint.tensors:
        owner, _, leaf = name.rpartition(".")
        if owner not in by_owner:
            raise ValueError(f"{name} belongs to no module")
        by_owner[owner][leaf] = made[blueprint.tied.get(name, name)]
    for name, tensors in by_owner.items():
        kind = blueprint.modules[name]
        if kind == SPARSE:
            _put_sparse(model, name, blueprint, tensors)
            continue
        if kind == NATIVE_DENSE:
            _put_native(model, name, blueprint, "bias" in tensors)
        _put(model.get_submodule(name), name, tensors)
    for name, sizes in blueprint.sizes.items():
        _set_sizes(model.get_submodule(name), name, sizes)
    refresh_flat_weights(model)
    return model


def _tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, "parameter", parameter
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield name, "buffer", buffer


def _sizes(module: nn.Module) -> dict[str, int]:
    """The whole numbers a module holds itself; those of torch's bookkeeping start with "_"."""
    held = vars(module).items()
    return {name: value for name, value in held if type(value) is int and not name.startswith("_")}


def _check_modules(model: nn.Module, blueprint: Blueprint) -> None:
    modules = model.named_modules(remove_duplicate=False)
    own = {name: original_class(module).__name__ for name, module in modules}
    for name, kind in blueprint.modules.items():
        found = own.pop(name, None)
        if found is None:
            raise ValueError(f"{blueprint.kind} has no module {name!r}, a {kind}")
        module = model.get_submodule(name)
        linear = isinstance(module, nn.Linear) or is_conv1d(module)
        replaced = kind in (SPARSE, NATIVE_DENSE) and linear
        if kind in REDUCED and original_class(module) is REDUCED[kind][0]:
            module.__class__ = cast("Any", REDUCED[kind][1])
        elif found != kind and not replaced:
            raise ValueError(f"{name} is a {found}, and a {kind} was saved")
    if own:
        raise ValueError(f"the module {next(iter(own))!r} of {blueprint.kind} was not saved")


def _put(module: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    """Replace the tensors of a module; a missing one was removed."""
    for slots in (module._parameters, module._buffers):
        for leaf in slots:
            slots[leaf] = None
    for leaf, tensor in tensors.items():
        parameter = isinstance(tensor, nn.Parameter)
        slots: dict[str, Any] = module._parameters if parameter else module._buffers
        if leaf not in slots:
            raise ValueError(f"{type(module).__name__} {name} has no place for {leaf}")
        slots[leaf] = tensor


def _put_sparse(
    model: nn.Module, name: str, blueprint: Blueprint, tensors: dict[str, Tensor]
) -> None:
    """Put a sparse layer where a dense one was."""
    sizes = blueprint.sizes.get(name, {})
    layout: Any = blueprint.layouts.get(name)
    try:
        rows, columns = sizes["out_features"], sizes["in_features"]
        crow, col, values = (tensors.pop(n) for n in ("crow_indices", "col_indices", "values"))
    except KeyError as error:
        raise ValueError(f"the sparse layer {name} lacks {error}") from None
    if layout not in Layout.__args__ or set(tensors) - {"bias"}:
        raise ValueError(f"the sparse layer {name} has layout {layout!r} and also {list(tensors)}")
    try:
        check_indices(crow, col, rows // block_of(values), columns // block_of(values))
    except ValueError as error:
        raise ValueError(f"of {name}, {error}") from None
    layer = SparseLinear(columns, rows, crow, col, values, tensors.get("bias"), layout)
    _replace(model, name, layer)


def _put_native(model: nn.Module, name: str, blueprint: Blueprint, bias: bool) -> None:
    """Put a layer without tensors where another one was."""
    sizes = blueprint.sizes.get(name, {})
    try:
        layer = NativeLinear.empty(sizes["in_features"], sizes["out_features"], bias)
    except KeyError as error:
        raise ValueError(f"the layer {name} lacks {error}") from None
    _replace(model, name, layer)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._modules[leaf] = layer


def _set_sizes(module: nn.Module, name: str, sizes: Mapping[str, int]) -> None:
    for attribute, size in sizes.items():
        if type(vars(module).get(attribute)) is not int:
            raise ValueError(f"{type(module).__name__} {name} holds no number {attribute}")
        setattr(module, attribute, size)
    weight: Any = module._parameters.get("weight")
    if isinstance(module, nn.Linear):
        expected = (module.out_features, module.in_features)
        if weight is not None and tuple(weight.shape) != expected:
            raise ValueError(f"{name} is a layer of {expected}, its weight is not")
