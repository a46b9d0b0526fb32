"""Weights that a module computes in each call: masked by `torch.nn.utils.prune`, or parametrized.

Both keep an original beside the weight, and neither is a parameter that a pass could replace. Here
is what finds them, what they amount to, and how such a weight is made a parameter again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from mvpfx.recurrent import FLAT
from mvpfx.swap import masked_names, original_class, swap_class

PRUNED = "torch.nn.utils.prune"
PARAMETRIZED = "a parametrization"


@dataclass(frozen=True)
class Computed:
    """One tensor that is computed from others in each call.

    Attributes:
        owner: name of the module that holds it.
        leaf: its name there.
        way: what computes it, `PRUNED` or `PARAMETRIZED`.
        originals: full names of what it is computed from and what trains.
    """

    owner: str
    leaf: str
    way: str
    originals: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its full name."""
        return f"{self.owner}.{self.leaf}" if self.owner else self.leaf


def find_computed(model: nn.Module) -> Iterator[Computed]:
    """Every tensor of `model` that pruning hooks or parametrizations compute, in model order."""
    for owner, module in model.named_modules():
        prefix = f"{owner}." if owner else ""
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                leaf = cast("str", cast("Any", hook)._tensor_name)
                yield Computed(owner, leaf, PRUNED, (f"{prefix}{leaf}_orig",))
        if parametrize.is_parametrized(module):
            for leaf, listed in _parametrizations(module).items():
                at = f"{prefix}parametrizations.{leaf}."
                held = [*listed._parameters, *listed._buffers]
                yield Computed(owner, leaf, PARAMETRIZED, tuple(at + name for name in held))


@torch.no_grad()
def value_of(model: nn.Module, computed: Computed) -> Tensor:
    """What a computed tensor is at the moment, as a tensor of its own.

    Of pruning hooks it is the original times the mask, not what the last call left behind.
    """
    module = model.get_submodule(computed.owner)
    if computed.way == PRUNED:
        value = cast("Any", _hook(module, computed.leaf)[1]).apply_mask(module)
    else:
        value = getattr(module, computed.leaf)
    return value.detach().clone()


def make_plain(model: nn.Module, found: dict[Computed, Tensor | nn.Parameter]) -> None:
    """Give modules of `model` these tensors to hold, in the place of what computed them.

    Nothing that the modules share with others, a class or an original, is written to.
    """
    owners = {computed.owner for computed in found}
    for owner in owners:
        module = model.get_submodule(owner)
        here = {c: value for c, value in found.items() if c.owner == owner}
        gone = {c.leaf for c in here if c.way == PARAMETRIZED}
        if gone:
            _drop_parametrizations(module, gone)
        for computed, value in here.items():
            if computed.way == PRUNED:
                _drop_hook(module, computed.leaf)
            kept: Any = module._parameters if isinstance(value, nn.Parameter) else module._buffers
            held = cast("dict[str, Any]", kept)
            rest = dict(held)
            held.clear()
            held.update({computed.leaf: value, **rest})


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy of a model, also where its last call left computed weights with gradients.

    torch copies no tensor that has a history; the copy holds such a one by its values.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*vars(module).values(), *vars(module).get(FLAT, ())):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _parametrizations(module: nn.Module) -> dict[str, nn.Module]:
    return dict(cast("nn.ModuleDict", module._modules["parametrizations"]).items())


def _hook(module: nn.Module, leaf: str) -> tuple[int, BasePruningMethod]:
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, BasePruningMethod) and cast("Any", hook)._tensor_name == leaf:
            return key, hook
    raise AssertionError(leaf)


def _drop_hook(module: nn.Module, leaf: str) -> None:
    del module._forward_pre_hooks[_hook(module, leaf)[0]]
    vars(module).pop(leaf, None)
    del module._parameters[f"{leaf}_orig"], module._buffers[f"{leaf}_mask"]


def _drop_parametrizations(module: nn.Module, leaves: set[str]) -> None:
    """As `remove_parametrizations`, but that one takes the property off a class of many copies."""
    masked, kind = masked_names(module), original_class(module)
    left = {name: p for name, p in _parametrizations(module).items() if name not in leaves}
    if left:
        body = {k: v for k, v in vars(kind).items() if k not in leaves}
        module.__class__ = type(kind.__name__, kind.__bases__, body)
        module._modules["parametrizations"] = nn.ModuleDict(left)
    else:
        module.__class__ = kind.__bases__[0]
        del module._modules["parametrizations"]
    if masked:
        swap_class(module, masked)
