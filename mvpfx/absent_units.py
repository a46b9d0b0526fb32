"""Tensors from which attention heads or hidden units were removed, put back into full shapes.

What is absent comes back as zeros: of a head its rows of queries, keys and values with their
biases, and its columns of the output projection; of a hidden unit its row, its bias and its
column. So an absent unit contributes nothing, as before, and `convert` removes it again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mvpfx.site import Site
from mvpfx.weights import layer_sites

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Attention:
    """The projections of one attention.

    Attributes:
        name: of the module that holds them.
        sites: their weights.
        heads: how many heads it has in full.
    """

    name: str
    sites: tuple[Site, ...]
    heads: int


def fill_absent(
    model: nn.Module, tensors: Mapping[str, Tensor], pruned_heads: Mapping[int, tuple[int, ...]]
) -> Tensors:
    """`tensors` in the shapes that `model` has, with zeros where units are absent.

    Args:
        model: of full size; its numbers are not read, it may be on the meta device.
        tensors: by the names of the model's parameters; other names stay as they are.
        pruned_heads: number of an attention, in model order -> its absent heads.

    Raises:
        ValueError: a head is out of range, or a shape does not follow.
    """
    sites = [site for site in layer_sites(model) if len(site.shape) == 2]
    filled = dict(tensors)
    _fill_heads(filled, _attentions(sites), pruned_heads)
    _fill_channels(filled, [site for site in sites if site.head is None])
    for name, wanted in model.state_dict().items():
        if name in filled and filled[name].shape != wanted.shape:
            raise ValueError(
                f"{name} is {_text(tensors[name].shape)}, and {_text(wanted.shape)} by the "
                "configuration. Absent may be heads that pruned_heads lists, and hidden units of "
                "a feed-forward layer, from all of its weights alike."
            )
    return filled


def _attentions(sites: list[Site]) -> list[Attention]:
    found: dict[str, list[Site]] = {}
    for site in sites:
        if site.head is not None:
            found.setdefault(site.head.attention, []).append(site)
    return [Attention(name, tuple(s), min(map(_heads, s))) for name, s in found.items()]


def _heads(site: Site) -> int:
    """Heads that a projection goes to or comes from; three times as many where it is fused."""
    assert site.head is not None
    dim, size = _head_dim(site)
    return site.shape[dim] // size


def _head_dim(site: Site) -> tuple[int, int]:
    """The dimension of a projection that runs along heads, and the indices of one head."""
    assert site.head is not None
    if site.head.rows is not None:
        return site.out_dim, site.head.rows
    assert site.head.cols is not None
    return 1 - site.out_dim, site.head.cols


def _fill_heads(
    tensors: Tensors, attentions: list[Attention], pruned: Mapping[int, tuple[int, ...]]
) -> None:
    for number, gone in pruned.items():
        if number >= len(attentions):
            raise ValueError(
                f"pruned_heads names layer {number}, and the model has {len(attentions)} "
                "attentions, counted from 0."
            )
        attention = attentions[number]
        outside = [head for head in gone if head >= attention.heads]
        if outside:
            raise ValueError(
                f"pruned_heads names head {outside[0]} of layer {number}, and {attention.name} "
                f"has {attention.heads} heads, counted from 0."
            )
        kept = [head for head in range(attention.heads) if head not in gone]
        for site in attention.sites if gone else ():
            dim, size = _head_dim(site)
            parts = site.shape[dim] // (attention.heads * size)
            at = [part * attention.heads + head for part in range(parts) for head in kept]
            places = [head * size + index for head in at for index in range(size)]
            why = f"pruned_heads leaves {len(kept)} of {attention.heads} heads"
            _spread(tensors, site, dim, places, why)


def _fill_channels(tensors: Tensors, sites: list[Site]) -> None:
    """Put hidden units back, where all weights of a layer lack the same number of them."""
    by_layer: dict[str, list[tuple[Site, int, int]]] = {}
    for site in sites:
        layer = re.match(r"(.*\.\d+)\.", site.name)
        for dim, size in _smaller(tensors, site) if layer else ():
            by_layer.setdefault(layer[1] if layer else "", []).append((site, dim, size))
    for layer, found in by_layer.items():
        inner = {(site.shape[dim], size) for site, dim, size in found}
        made = any(dim == site.out_dim for site, dim, _ in found)
        read = any(dim != site.out_dim for site, dim, _ in found)
        if len(inner) > 1 or not (made and read):
            listed = ", ".join(
                f"{site.name} {_text(tensors[site.name].shape)} of {_text(site.shape)}"
                for site, _, _ in found
            )
            raise ValueError(
                f"the weights of {layer} lack hidden units, but not alike: {listed}. Needed: the "
                "weight that makes them and the one that reads them, without the same number."
            )
        for site, dim, size in found:
            _spread(tensors, site, dim, list(range(size)), f"{layer} keeps {size} hidden units")


def _smaller(tensors: Tensors, site: Site) -> Iterator[tuple[int, int]]:
    """The dimension of a weight that is smaller than in full, with its size."""
    found = tensors.get(site.name)
    if found is None or found.dim() != len(site.shape):
        return
    different = [dim for dim, size in enumerate(site.shape) if found.shape[dim] != size]
    if len(different) == 1 and found.shape[different[0]] < site.shape[different[0]]:
        yield different[0], found.shape[different[0]]


def _spread(tensors: Tensors, site: Site, dim: int, places: list[int], why: str) -> None:
    """Put a weight, and the bias that goes with its rows, into full shape: `places` are held."""
    bias = f"{site.module_name}.bias"
    for name, at in ((site.name, dim), (bias, 0)):
        found = tensors.get(name)
        if found is None or (name == bias and dim != site.out_dim):
            continue
        full = list(site.shape) if name == site.name else [site.shape[site.out_dim]]
        wanted = [*full[:at], len(places), *full[at + 1 :]]
        if list(found.shape) != wanted:
            raise ValueError(
                f"{name} is {_text(found.shape)}, and {_text(wanted)} was needed: {why}."
            )
        index = torch.tensor(places, dtype=torch.long)
        tensors[name] = found.new_zeros(full).index_copy(at, index, found)


def _text(shape: tuple[int, ...] | list[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"
