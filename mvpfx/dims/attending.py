"""Whether each query of an attention has something to attend to, in every call that may come.

A query from which a mask hides everything, as in padding on the left or an empty source, gets 0
from torch's attention, not an average of the values. So constant values can be folded only where no
mask can hide everything. That the recorded call had no mask proves nothing: where the module could
be given one, a later call may give it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from mvpfx.dims.rule import Step
from mvpfx.matmul_table import ATTENTIONS
from mvpfx.program import Program, full_name
from mvpfx.swap import original_class

_PLAIN = 3
"""Tensors that any attention reads: query, key, value."""


def may_mask(program: Program, region: str, step: Step) -> bool:
    """Whether a mask may hide everything from a query of this step; False for other nodes too.

    Args:
        program: with the call that the region was recorded from.
        region: that the step is in.
        step: with its values.
    """
    if step.node.target in ATTENTIONS:
        call: dict[str, Any] = dict(step.node.kwargs)
        if call.get("attn_mask") is not None or call.get("key_padding_mask") is not None:
            return True
    elif is_attention(step):
        for value in list(step.values.values())[_PLAIN:]:
            known = value.known
            if not (known.is_all and known.value.is_floating_point()):
                return True
            if not bool(torch.isfinite(known.value).all()):
                return True
    else:
        return False
    owner = program.module(full_name(region, step.node.meta.get("module", "")).rstrip("."))
    return _takes_a_mask(program, region, owner)


def is_attention(step: Step) -> bool:
    """Whether a step is torch's attention, or one of transformers' attention functions."""
    leaf = getattr(step.node.target, "role", None) == "attention"
    return leaf or step.name == "scaled_dot_product_attention"


def _takes_a_mask(program: Program, region: str, owner: nn.Module | None) -> bool:
    """Whether a call may hand in something that the recorded one did not."""
    module, call = program.module(region), program.calls.get(region)
    if module is None or owner is None or call is None:
        return True
    signature = inspect.signature(original_class(module).forward)
    bound = signature.bind(module, *call[0], **call[1])
    bound.apply_defaults()
    if any(value is None for value in bound.arguments.values()):
        return True
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        return False
    inner = inspect.signature(original_class(owner).forward).parameters.values()
    return any(parameter.default is None for parameter in inner)
