"""What one attention head has of each projection around it, read from the modules alone.

Graphs show attentions as well (`mvpfx.heads`), but exist only once the model has been called; masks
are made before that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

_INPUTS = re.compile(
    r"(.*[_.])?(q|k|v|qk|kv|qkv|wqkv|query|key|value|query_key_value|c_attn|in)([_.].*)?", re.I
)
_WIDTHS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_per_head")
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "encoder_attention_heads")
_GROUPS = ("num_key_value_heads", "num_kv_heads")


@dataclass(frozen=True)
class HeadUnit:
    """The part of one weight that belongs to one head.

    Attributes:
        attention: name of the module that holds all projections of the attention.
        rows: outputs of one head, for a projection to heads; None for one from heads.
        cols: inputs of one head, for the projection from heads; None for those to heads.
    """

    attention: str
    rows: int | None
    cols: int | None


def head_unit(model: nn.Module, name: str, outputs: int, inputs: int) -> HeadUnit | None:
    """What one head has of the weight called `name`; None where it is no projection of one.

    The attention is the topmost of the module's neighbouring ancestors whose class is called so,
    and which hold no other one beside it. Its modules, or else their configuration, tell the number
    of heads and their width.

    Args:
        model: that the weight belongs to.
        name: full parameter name.
        outputs: of the weight.
        inputs: of the weight.
    """
    attention = _attention(model, name)
    if attention is None:
        return None
    block = model.get_submodule(attention)
    heads = _number(block, _HEADS)
    if heads is None:
        return None
    leaf = name[len(attention) :].removesuffix(".weight").rpartition(".")[2]
    if not _INPUTS.fullmatch(leaf):
        return HeadUnit(attention, None, inputs // heads) if inputs % heads == 0 else None
    groups = _number(block, _GROUPS) or heads
    width = _number(block, _WIDTHS)
    # To queries, keys or values; or to all at once.
    for count in (heads, groups, 3 * heads, heads + 2 * groups, 2 * groups):
        if outputs == count * (width or outputs // heads):
            return HeadUnit(attention, outputs // count, None)
    return None


def _attention(model: nn.Module, name: str) -> str | None:
    """Name of the attention that a parameter belongs to."""
    parts = name.split(".")[:-1]
    found: str | None = None
    for size in range(len(parts), -1, -1):
        name = ".".join(parts[:size])
        module = model.get_submodule(name)
        inner = sum(_is_attention(child) for child in module.children())
        if _is_attention(module) and inner <= 1:
            found = name
        elif found is not None:
            break
    return found


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


def _number(block: nn.Module, names: Sequence[str]) -> int | None:
    """The first of these attributes that a module of an attention, or a configuration, has."""
    for holder in _holders(block):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _holders(block: nn.Module) -> Iterator[object]:
    yield from block.modules()
    yield from (module.config for module in block.modules() if hasattr(module, "config"))
