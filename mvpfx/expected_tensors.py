"""Shapes and types that the tensors of a smaller model must have, by the modules that hold them.

A layer of torch says what it needs by its sizes. Of any other module the tensors are as its class
builds them, but for dimensions that follow a number which has changed: of the module, such as a
head count, or of the model's other modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from mvpfx.shared_bias import KEPT, is_shared
from mvpfx.transformers_types import is_conv1d

Sizes = Mapping[str, Mapping[str, int]]
Entries = Mapping[str, Mapping[str, Any]]
FLOATS = ("float32", "bfloat16", "float16", "float64")
Told = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
_Changes = set[tuple[int, int]]


def check_shapes(
    model: nn.Module, sizes: Sizes, entries: Entries, other: Iterable[str], told: Told | None
) -> None:
    """Make sure that each module gets the tensors that it computes with.

    Args:
        model: as its class builds it.
        sizes: module -> whole numbers that it holds in the end.
        entries: tensor -> `shape` and `dtype`, as it will be.
        other: modules that are replaced by layers of another kind, which check their own.
        told: parameter -> its shape before and after, as the report has them, where `model` is of
            the caller's own class: its parameters may have sizes that no number of a module tells.
            Two of them have to have changed alike then, or the report has to tell of it.

    Raises:
        ValueError: a tensor is missing, or its shape or type is not the module's.
    """
    skip, by_owner = set(other), _by_owner(entries)
    modules = dict(model.named_modules(remove_duplicate=False))
    changed = {name: changes_of(module, sizes.get(name, {})) for name, module in modules.items()}
    everywhere: _Changes = set().union(*changed.values())
    shares = set[Fraction]() if told is None else _shares(model, entries)
    usual = check_types(entries)
    for name, module in modules.items():
        if name in skip:
            continue
        found = by_owner.get(name, {})
        held = {**_numbers(module), **sizes.get(name, {})}
        known = layer_shapes(module, held)
        for leaf, tensor in _tensors_of(module).items():
            full = f"{name}.{leaf}" if name else leaf
            if leaf not in found:
                if tensor is not None and not (known is not None and leaf == "bias"):
                    raise ValueError(f"{full} is missing, which {type(module).__name__} needs")
                continue
            shape = tuple(found[leaf]["shape"])
            if leaf == KEPT and is_shared(type(module)) and tensor is not None:
                fits = len(shape) == 1 and 0 < shape[0] <= len(tensor)
            elif known is not None and leaf in known:
                fits = shape == known[leaf]
            else:
                before = None if tensor is None else tuple(tensor.shape)
                fits = before is not None and (
                    follows(before, shape, changed[name], everywhere, shares)
                    or (told is not None and _is_told(told.get(full), before, shape))
                )
            if not fits:
                raise ValueError(
                    f"{full} is {list(shape)}, and a {type(module).__name__} with "
                    f"{_described(module, held, known, leaf, tensor)} was built"
                )
            if tensor is not None:
                _check_kind(full, found[leaf], tensor, usual)
        if known is not None:
            check_alike(
                name, [found[leaf]["dtype"] for leaf in ("weight", "bias") if leaf in found]
            )


def _by_owner(entries: Entries) -> dict[str, dict[str, Mapping[str, Any]]]:
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, entry in entries.items():
        owner, _, leaf = name.rpartition(".")
        found.setdefault(owner, {})[leaf] = entry
    return found


def changes_of(module: nn.Module, sizes: Mapping[str, int]) -> _Changes:
    """Numbers of a module, before and after, where they differ."""
    held = _numbers(module)
    return {(held[n], new) for n, new in sizes.items() if held.get(n, new) != new and held[n] > 0}


def follows(
    before: tuple[int, ...],
    after: tuple[int, ...],
    own: _Changes,
    others: _Changes,
    shares: Collection[Fraction] = (),
) -> bool:
    """Whether a shape is what became of another one when numbers changed.

    >>> follows((48, 32), (8, 32), {(24, 4)}, set())
    True
    >>> follows((48, 32), (1, 32), {(24, 4)}, {(48, 1)})
    False
    """
    if len(before) != len(after):
        return False
    for old, new in zip(before, after, strict=True):
        # A dimension of 1 is stretched to any other, so it has to be the module's own number.
        known = own if new == 1 else own | others
        alike = any(old % a == 0 and new == old // a * b for a, b in known)
        if old != new and not alike and (new > old or Fraction(new, old) not in shares):
            return False
    return True


def _is_told(pair: object, whole: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether the report says that this became of a shape, and it is a part of it."""
    part = len(shape) == len(whole) and all(
        0 < new <= old for new, old in zip(shape, whole, strict=True)
    )
    return part and pair == (whole, shape)


def _shares(model: nn.Module, entries: Entries) -> set[Fraction]:
    """What is left of a dimension, where it is the same for dimensions of two tensors or more."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found: Counter[Fraction] = Counter()
    for name, tensor in held.items():
        after = entries[name]["shape"] if name in entries else ()
        if len(after) == tensor.dim():
            pairs = zip(tensor.shape, after, strict=True)
            found.update({Fraction(new, old) for old, new in pairs if new < old})
    return {share for share, count in found.items() if count > 1}


def layer_shapes(module: nn.Module, held: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """What the tensors of a layer have to be, by the numbers it holds; None for what is not known.

    Buffers and parameters that are not named are as the class builds them.
    """
    if isinstance(module, nn.Linear):
        out = held["out_features"]
        return {"weight": (out, held["in_features"]), "bias": (out,)}
    if is_conv1d(module):
        return {"weight": (held["nx"], held["nf"]), "bias": (held["nf"],)}
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        out, groups = held["out_channels"], max(1, held["groups"])
        return {
            "weight": (out, held["in_channels"] // groups, *module.kernel_size),
            "bias": (out,),
        }
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        out, groups = held["out_channels"], max(1, held["groups"])
        return {
            "weight": (held["in_channels"], out // groups, *module.kernel_size),
            "bias": (out,),
        }
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"weight": (held["num_embeddings"], held["embedding_dim"])}
    if isinstance(module, nn.GroupNorm):
        return dict.fromkeys(("weight", "bias"), (held["num_channels"],))
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return dict.fromkeys(("weight", "bias"), tuple(module.normalized_shape))
    if isinstance(module, nn.modules.batchnorm._NormBase):
        names = ("weight", "bias", "running_mean", "running_var")
        return dict.fromkeys(names, (held["num_features"],))
    return None


def check_types(entries: Entries) -> set[str]:
    """Make sure that floating parameters are of one type, but for those in float32 and groups.

    Returns:
        float32, and the type that most have.

    Raises:
        ValueError: one differs from all others.
    """
    names: dict[str, list[str]] = {}
    for name, entry in entries.items():
        if entry["role"] == "parameter" and entry["dtype"] in FLOATS:
            names.setdefault(entry["dtype"], []).append(name)
    counts = Counter({dtype: len(found) for dtype, found in names.items()})
    usual = {"float32", *(dtype for dtype, _ in counts.most_common(1))}
    for dtype, found in names.items():
        if dtype not in usual and len(found) == 1:
            raise ValueError(
                f"{found[0]} is {dtype}, and all other parameters are {', '.join(sorted(usual))}. "
                "Convert the whole model with .to(dtype)"
            )
    return usual


def check_alike(name: str, dtypes: Sequence[str]) -> None:
    """Make sure that the floating tensors of a layer are of one type.

    Raises:
        ValueError: they are not.
    """
    if len(set(dtypes)) > 1:
        raise ValueError(f"the tensors of {name} are {', '.join(dtypes)}, and one type is needed")


def _check_kind(name: str, entry: Mapping[str, Any], built: Tensor, usual: set[str]) -> None:
    """A floating tensor may have another floating type than it was built with, no other one."""
    own, dtype = str(built.dtype).removeprefix("torch."), entry["dtype"]
    parameter = isinstance(built, nn.Parameter)
    role = "parameter" if parameter else "buffer"
    if entry["role"] != role:
        raise ValueError(f"{name} is a {entry['role']}, and a {role} was built")
    others = (FLOATS if parameter else usual) if built.is_floating_point() else ()
    if dtype != own and dtype not in others:
        raise ValueError(f"{name} is {dtype}, and {own} was built")


def _tensors_of(module: nn.Module) -> dict[str, Tensor | None]:
    return {**module._parameters, **module._buffers}


def _numbers(module: nn.Module) -> dict[str, int]:
    return {name: value for name, value in vars(module).items() if type(value) is int}


def _described(
    module: nn.Module,
    held: Mapping[str, int],
    known: Mapping[str, tuple[int, ...]] | None,
    leaf: str,
    tensor: Tensor | None,
) -> str:
    shape = (known or {}).get(leaf, None if tensor is None else tuple(tensor.shape))
    return f"{list(shape)}" if shape is not None else f"no {leaf}"
