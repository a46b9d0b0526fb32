"""Swapped classes: how a prepared module behaves differently and still is what it was.

The class of a module is swapped for a cached subclass of it, so `isinstance`, parameters,
`state_dict` keys, hooks and pickling stay. The subclass reads masked parameters as masked, and
hands calls to the module's runtime where it has one.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from mvpfx.distributed import is_sharded
from mvpfx.interception import Running, is_capturing, is_running
from mvpfx.masked_saving import saving
from mvpfx.recomputing import Recomputing
from mvpfx.recurrent import FLAT, flat_weights_property

MASK_SUFFIX = "_mask"
_RUNTIME = "_mvpfx_region"
_CLASS_KEY = "_mvpfx_class"
_SAVE = "save_pretrained"


class Runtime(Protocol):
    """What runs the calls of a module in its place."""

    def call(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run one call; `forward` is the module's own."""
        ...


_classes: dict[tuple[type, tuple[str, ...], bool], type] = {}


def swap_class(module: nn.Module, masked: tuple[str, ...] = (), region: bool = False) -> None:
    """Give `module` a subclass of its class whose `masked` parameters read as masked.

    Raises:
        ValueError: another library derived a class from the swapped one, which would be lost.
    """
    base = original_class(module)
    kind = type(module)
    if kind is not base and _CLASS_KEY not in vars(kind):
        raise ValueError(
            f"{kind.__name__} was derived from a prepared {base.__name__} before all of its sites "
            "were known. Pass example_inputs= to mvpfx.prepare, and call it before fully_shard."
        )
    masked = tuple(sorted({*masked, *masked_names(module)}))
    region = region or _is_region_class(type(module))
    key = (base, masked, region)
    if key not in _classes:
        body: dict[str, Any] = {name: masked_property(name) for name in masked}
        body.update(
            forward=_forward(base.forward, masked),
            __module__=base.__module__,
            __qualname__=base.__qualname__,
            __doc__=base.__doc__,
            __reduce_ex__=_reduce,
        )
        if callable(save := getattr(base, _SAVE, None)):
            body[_SAVE] = saving(save, masked_tensors)
        if masked and issubclass(base, nn.RNNBase):
            body[FLAT] = flat_weights_property()
        body[_CLASS_KEY] = key
        _classes[key] = type(base.__name__, (base,), body)
    module.__class__ = _classes[key]


def _forward(base_forward: Callable[..., Any], masked: tuple[str, ...]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name in masked:
            if name not in self._parameters and name not in self.__dict__:
                raise ValueError(_lost(self, name))
        if torch.compiler.is_compiling():
            return base_forward(self, *args, **kwargs)
        runtime = runtime_of(self)
        with Running():
            if runtime is not None:
                return runtime.call(self, base_forward, args, kwargs)
            if not masked or is_capturing():
                return base_forward(self, *args, **kwargs)
            with Recomputing():
                return base_forward(self, *args, **kwargs)

    forward.__wrapped__ = base_forward  # pyright: ignore[reportFunctionMemberAccess]
    forward.__signature__ = inspect.signature(base_forward)  # pyright: ignore[reportFunctionMemberAccess]
    return forward


def _lost(owner: nn.Module, name: str) -> str:
    mask = find_mask(owner, name)
    site = name if mask is None else cast("Any", mask).site.name
    return (
        f"{site} is masked, but is no parameter of its {original_class(owner).__name__} any more: "
        "something was put in its place after mvpfx.prepare. Add parametrizations before preparing "
        "the model."
    )


def swap_ancestors(model: nn.Module, owner: str) -> None:
    """Let the modules of `model` that hold module `owner` know when their forward runs."""
    parts = owner.split(".") if owner else []
    for length in range(len(parts)):
        module = model.get_submodule(".".join(parts[:length]))
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            swap_class(module)


def runtime_of(module: nn.Module) -> Runtime | None:
    """What runs the module's calls, None where it is its own forward."""
    return module.__dict__.get(_RUNTIME)


def set_runtime(module: nn.Module, runtime: Runtime) -> None:
    """Hand the calls of `module` to `runtime` from now on."""
    swap_class(module, region=True)
    module.__dict__[_RUNTIME] = runtime


def drop_runtimes(model: nn.Module) -> None:
    """Let every module run its own forward again; masks still apply."""
    for module in model.modules():
        module.__dict__.pop(_RUNTIME, None)


def restore(model: nn.Module) -> None:
    """Give every module its original class back and take all masks out."""
    drop_runtimes(model)
    for module in list(model.modules()):
        for name in masked_names(module):
            module._modules.pop(f"{name}{MASK_SUFFIX}", None)
        module.__class__ = original_class(module)
        for name in [n for n in module.__dict__ if n.endswith(MASK_SUFFIX)]:
            if f"{name.removesuffix(MASK_SUFFIX)}" in module._parameters:
                del module.__dict__[name]


def masked_property(name: str) -> property:
    """An attribute that reads as the masked parameter `name` while a forward runs.

    The rule: what computes sees the masked weight, what handles the weight sees the parameter.
    A thread computes from the start of the forward of any module that holds a masked parameter to
    its end, and in a backward pass, where checkpointed code runs again; so a matmul in a parent's
    forward sees the mask too. All else reads the parameter itself: initialisation, `get_parameter`,
    edits in place, FSDP (which also reads sharded parameters just before a block's forward), and
    the recorder, whose graphs have mask nodes.

    Two things follow. A matmul that is written outside of any forward, `F.linear(x, layer.weight)`
    in a training loop, is not masked: call the layer. And code inside a forward, its hooks
    included, that writes to `layer.weight` writes to the masked copy: take `named_parameters()`.

    A tensor that stands in for the parameter, as in the replicas of `nn.DataParallel`, is masked
    like it.
    """

    def get(self: nn.Module) -> Tensor | None:
        if name in self._parameters:
            parameter = self._parameters[name]
        elif name in self.__dict__:
            parameter = self.__dict__[name]
        else:
            raise AttributeError(f"{type(self).__name__} has no parameter {name}")
        mask = find_mask(self, name)
        if mask is None or parameter is None:
            return parameter
        if torch.compiler.is_compiling():
            return mask(parameter)
        if is_capturing() or not is_running() or is_sharded(parameter):
            cast("Any", mask).held.release()
            return parameter
        return mask(parameter)

    def put(self: nn.Module, tensor: Tensor) -> None:
        self.__dict__[name] = tensor

    def delete(self: nn.Module) -> None:
        del self.__dict__[name]

    return property(get, put, delete)


def find_mask(owner: nn.Module, name: str) -> nn.Module | None:
    """The mask of one parameter of `owner`: its own child, or one tied from elsewhere."""
    key = f"{name}{MASK_SUFFIX}"
    return owner._modules.get(key) or owner.__dict__.get(key)


def masked_tensors(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a prepared model as one of a plain model: masked weights, and nothing that
    masks hold.

    Raises:
        ValueError: a weight is sharded over ranks, or is also read without its mask.
    """
    values, written, dropped = dict[int, Tensor](), set[str](), list[str]()
    found = dict(state)
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf in masked_names(module):
            mask, weight = find_mask(module, leaf), module._parameters.get(leaf)
            name = f"{path}.{leaf}" if path else leaf
            if mask is None or weight is None:
                raise ValueError(_lost(module, leaf))
            dropped.append(f"{name}{MASK_SUFFIX}.")
            if name not in state:
                continue
            if is_sharded(weight):
                raise ValueError(
                    f"{name} is sharded over ranks, and its mask is found for the whole weight. "
                    "Save a checkpoint, load it into a model that is not sharded, and save that."
                )
            if id(weight) not in values:
                values[id(weight)] = _masked(mask, weight, state[name])
            found[name] = values[id(weight)]
            written.add(name)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in values and name in state and name not in written:
            raise ValueError(
                f"{name} is read as it is, and under another name with a mask, so one saved tensor "
                "cannot be both. Untie them before mvpfx.prepare, or convert the model and save "
                "that with mvpfx.save."
            )
    prefixes = tuple(dropped)
    return {name: value for name, value in found.items() if not name.startswith(prefixes)}


def _masked(mask: nn.Module, weight: Tensor, given: Tensor) -> Tensor:
    """What a matmul reads of `given`, the weight or one in its place, without what only training
    draws; one that is masked already stays.
    """
    training = mask.training
    mask.eval()
    try:
        with torch.no_grad():
            value: Tensor = mask(weight.detach())
            if torch.equal(given.to(weight.device), weight):
                return value
            if torch.equal(given.to(weight.device), value):
                return given
            return mask(given.detach().to(weight.device)).to(given.device)
    finally:
        mask.train(training)


def original_class(module: nn.Module) -> Any:
    """The class the module had before it was prepared.

    Other libraries (FSDP) derive classes from the swapped one, so the key is inherited.
    """
    key = getattr(type(module), _CLASS_KEY, None)
    return type(module) if key is None else key[0]


def masked_names(module: nn.Module) -> tuple[str, ...]:
    """The parameters of `module` itself that read as masked."""
    kind = type(module)
    return getattr(kind, _CLASS_KEY, (None, (), False))[1]


def _is_region_class(kind: type) -> bool:
    return bool(getattr(kind, _CLASS_KEY, (None, (), False))[2])


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    base, masked, region = cast("Any", type(self))._mvpfx_class
    return _rebuild, (base, masked, region), cast("Any", self).__getstate__()


def _rebuild(base: type[nn.Module], masked: tuple[str, ...], region: bool) -> nn.Module:
    module = base.__new__(base)
    swap_class(module, masked, region)
    return module
