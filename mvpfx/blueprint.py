"""What a model is besides its tensors, as plain data, and a model made from it again.

A blueprint names the class, its configuration, the sizes its modules hold, which layers became
sparse, and every tensor. It holds no code: a class is looked up by its name in transformers, or a
model of that class is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from mvpfx.expected_tensors import Told, check_alike, check_shapes, layer_shapes
from mvpfx.file_limits import COUNT
from mvpfx.native_linear import NativeLinear
from mvpfx.recurrent import refresh_flat_weights
from mvpfx.reduced_attention import ReducedAttention
from mvpfx.shared_bias import (
    KEPT,
    all_heads,
    class_name,
    most_heads,
    shared_bias_class,
    takes_shared_bias,
)
from mvpfx.sparse_matmul import block_of, check_indices, check_sizes
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


def class_before(kind: str) -> str:
    """The class that a module called `kind` had before anything of it went.

    >>> class_before("ReducedAttention"), class_before("Linear")
    ('MultiheadAttention', 'Linear')
    """
    return REDUCED[kind][0].__name__ if kind in REDUCED else kind


def fill(
    model: nn.Module, blueprint: Blueprint, stored: Mapping[str, Tensor], told: Told | None
) -> nn.Module:
    """Give a skeleton the sizes, sparse layers and tensors of a blueprint, in place.

    Args:
        model: the skeleton.
        blueprint: of the model that was saved.
        stored: its tensors.
        told: shapes before and after by parameter, as the report has them.

    Raises:
        ValueError: model, blueprint and tensors do not fit one another.
    """
    _check_modules(model, blueprint)
    _check_numbers(model, blueprint)
    replaced = [n for n, kind in blueprint.modules.items() if kind in (SPARSE, NATIVE_DENSE)]
    told = told if blueprint.config is None else None
    check_shapes(model, blueprint.sizes, blueprint.tensors, replaced, told)
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
            _put_native(model, name, blueprint, tensors)
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
        elif takes_shared_bias(module) and kind == class_name(found):
            module.__class__ = cast("Any", shared_bias_class(original_class(module)))
            module.register_buffer(KEPT, all_heads(most_heads(module)))
        elif found != kind and not replaced:
            raise ValueError(f"{name} is a {found}, and a {kind} was saved")
    if own:
        raise ValueError(f"the module {next(iter(own))!r} of {blueprint.kind} was not saved")


def _check_numbers(model: nn.Module, blueprint: Blueprint) -> None:
    """Sizes are numbers that the modules hold, and no greater than what was built or saved."""
    dimensions = (d for entry in blueprint.tensors.values() for d in entry["shape"])
    most = max(COUNT, *dimensions, 0)
    for name, sizes in blueprint.sizes.items():
        held = vars(model.get_submodule(name))
        for attribute, size in sizes.items():
            own = held.get(attribute)
            if type(size) is not int or (abs(size) > most and size != own):
                raise ValueError(f"{attribute} of {name} is {size!r}, not a number up to {most}")


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
    block = block_of(values)
    if rows % block or columns % block or rows < 0 or columns < 0:
        raise ValueError(f"{name} is {rows} x {columns}, in blocks of {block}")
    if layout not in Layout.__args__ or set(tensors) - {"bias"}:
        raise ValueError(f"the sparse layer {name} has layout {layout!r} and also {list(tensors)}")
    try:
        check_indices(crow, col, rows // block, columns // block)
    except ValueError as error:
        raise ValueError(f"of {name}, {error}") from None
    bias = tensors.get("bias")
    if values.dim() not in (1, 3) or (values.dim() == 3 and values.shape[1] != values.shape[2]):
        raise ValueError(f"the values of the sparse layer {name} are {list(values.shape)}")
    check_sizes(crow, col, values, bias, rows)
    _check_float(name, values, bias)
    layer = SparseLinear(columns, rows, crow, col, values, bias, layout)
    _replace(model, name, layer)


def _put_native(
    model: nn.Module, name: str, blueprint: Blueprint, tensors: Mapping[str, Tensor]
) -> None:
    """Put a layer without tensors where another one was."""
    sizes = blueprint.sizes.get(name, {})
    try:
        weight, bias = tensors["weight"], tensors.get("bias")
        layer = NativeLinear.empty(sizes["in_features"], sizes["out_features"], bias is not None)
    except KeyError as error:
        raise ValueError(f"the layer {name} lacks {error}") from None
    needed = layer_shapes(layer, sizes) or {}
    for leaf, tensor in tensors.items():
        if tuple(tensor.shape) != needed.get(leaf):
            raise ValueError(f"{leaf} of {name} is {list(tensor.shape)}")
    _check_float(name, weight, bias)
    _replace(model, name, layer)


def _check_float(name: str, weight: Tensor, bias: Tensor | None) -> None:
    """Weight and bias of a layer that is put in are parameters, floating, and of one type."""
    for tensor in (weight, bias):
        if tensor is not None:
            if not (isinstance(tensor, nn.Parameter) and tensor.is_floating_point()):
                raise ValueError(
                    f"{name} has a weight or bias that is {tensor.dtype}, no parameter"
                )
            check_alike(name, [str(t.dtype) for t in (weight, tensor)])


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
