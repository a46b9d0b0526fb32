"""Random calls: the same calls in the same random order, made to two models that must agree.

One model is right by definition: the masked one for a converted model, `W *= mask` for a prepared
one. What it raises, the other may raise too; whatever it returns, the other must return.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import random
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import mvpfx
from tests.zoo.check import masked_copy, prepare
from tests.zoo.entry import SHAPES, Batch, Entry, loss

GRANULARITIES = ("element", "head", "channel", "hybrid")
WAYS = ("prepared", "dense", "native")
"""What is tested: a prepared model, or one converted with this lowering."""
RELATIVE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference that counts as equal, relative to the largest entry of a tensor."""
SMALLER = ("attention", "past_key_values", "cache")
"""Parts of an output that have fewer heads after heads were removed."""


@dataclass
class Call:
    """One call, to be made to several models in the same way.

    Attributes:
        batch: keyword arguments.
        words: what is special about it, in the order in which it was drawn.
        any_dtype: torch itself leaves open which floating dtype comes out: of its transformer
            layers the fused way, which serves where nothing asks for a gradient, gives another one
            under autocast than the layers one by one.
    """

    batch: Batch
    words: list[str] = field(default_factory=list[str])
    positional: int = 0
    gradients: str = "no_grad"
    autocast: bool = False
    dtype: torch.dtype | None = None
    steps: int = 0
    hook: str | None = None
    way: str = "plain"
    any_dtype: bool = False
    training: bool = False

    def __str__(self) -> str:
        return ", ".join([self.gradients, *self.words])


@dataclass
class Tally:
    """What a run of random calls found.

    Attributes:
        calls: how many were made to both models.
        refused: how many of them the reference raised on, so nothing was compared.
        wrong: descriptions of calls whose results differ.
        raised: descriptions of calls that only the tested model raised on.
    """

    calls: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list[str])
    raised: list[str] = field(default_factory=list[str])


class NotApplicableError(Exception):
    """The model cannot be prepared like this, and `prepare` says why."""


def check(entry: Entry, granularity: str, way: str, seed: int, calls: int) -> Tally:
    """Random calls of one model of the zoo, prepared or converted.

    Raises:
        NotApplicableError: `prepare` refuses this granularity for the model.
    """
    raw, batch = entry.model().eval(), entry.batch(0)
    options = {} if granularity == "element" else {"overrides": {}, "granularity": granularity}
    try:
        prepared = prepare(raw, batch, **options).eval()
    except ValueError as error:
        raise NotApplicableError(str(error)) from error
    if way == "prepared":
        reference = masked_copy(raw, prepared).eval()
        return run(entry, reference, prepared, seed, calls, training=True)
    small = mvpfx.convert(prepared, example_inputs=batch, lowering=way)
    return run(entry, prepared, small, seed, calls)


def run(
    entry: Entry,
    reference: nn.Module,
    tested: nn.Module,
    seed: int,
    calls: int,
    training: bool = False,
) -> Tally:
    """Make `calls` random calls to both models.

    Args:
        entry: whose batches are drawn.
        reference: the model that is right.
        tested: the model that must agree.
        seed: of everything that is drawn.
        calls: how many.
        training: whether calls in training mode are among them.
    """
    draw, tally = random.Random(seed), Tally()
    pair = [reference, tested]
    shared = {name for name, _ in tested.named_modules()}
    parts = [name for name, _ in reference.named_modules() if name and name in shared]
    for number in range(calls):
        call = drawn(entry, reference, parts, draw)
        call.training = training and draw.random() < 0.4
        if training and draw.random() < 0.3:
            call.gradients = "backward"
        if call.way in ("deepcopy", "pickle"):
            copied = [_copied(model, call.way) for model in pair]
            pair = copied if draw.random() < 0.5 else pair
        else:
            copied = pair
        tally.calls += 1
        described = f"{entry.name}, seed {seed}, call {number}: {call}"
        try:
            wanted = made(call, copied[0])
        except Exception:  # noqa: BLE001  whatever the model itself raises, is no fault
            tally.refused += 1
            continue
        try:
            found = made(call, copied[1])
        except Exception as error:  # noqa: BLE001  the fault that is looked for
            tally.raised.append(f"{described}: {type(error).__name__}: {str(error)[:300]}")
            continue
        finally:
            for model in copied:
                model.zero_grad()
        for difference in differences(wanted, found, call):
            tally.wrong.append(f"{described}: {difference}")
    return tally


def drawn(entry: Entry, model: nn.Module, parts: list[str], draw: random.Random) -> Call:
    """A random call that fits the forward of `model`."""
    shape = draw.randrange(len(SHAPES))
    call = Call(dict(entry.batch(shape)), [f"shape {SHAPES[shape]}"])
    known = inspect.signature(model.forward).parameters
    if call.batch.get("labels") is not None and draw.random() < 0.5:
        del call.batch["labels"]
        call.words.append("no labels")
    _draw_padding(call, draw)
    if entry.kind == "hf":
        for name, value in (
            ("output_hidden_states", True),
            ("output_attentions", True),
            ("return_dict", False),
        ):
            if draw.random() < 0.3:
                call.batch[name] = value
                call.words.append(f"{name}={value}")
        if "past_key_values" in known and "decoder_input_ids" not in known and draw.random() < 0.3:
            call.steps = 2
            call.batch.pop("labels", None)
            call.batch["return_dict"] = True
            call.words.append("two steps with a cache")
    call.gradients = draw.choice(("no_grad", "grad", "inference"))
    fused = any(isinstance(part, nn.TransformerEncoderLayer) for part in model.modules())
    _draw_surroundings(call, parts, draw, fused)
    names = list(known)
    while (
        set(names[call.positional : call.positional + 1]) & set(call.batch) and draw.random() < 0.5
    ):
        call.positional += 1
    if call.positional:
        call.words.append(f"{call.positional} positional")
    return call


def _draw_padding(call: Call, draw: random.Random) -> None:
    mask = call.batch.get("attention_mask")
    if not isinstance(mask, Tensor) or "mm_token_type_ids" in call.batch:
        return
    choice = draw.choice(("as given", "none", "left", "right", "row", "ones"))
    if choice == "none":
        del call.batch["attention_mask"]
    elif choice != "as given":
        mask = torch.ones_like(mask)
        cut = draw.randrange(mask.shape[1])
        if choice == "left":
            mask[0, :cut] = 0
        elif choice == "right" and cut:
            mask[-1, -cut:] = 0
        elif choice == "row":
            mask[draw.randrange(len(mask))] = 0
        call.batch["attention_mask"] = mask
    call.words.append(f"padding {choice}")


def _draw_surroundings(
    call: Call, parts: list[str], draw: random.Random, fused: bool = False
) -> None:
    what = draw.random()
    if what < 0.12:
        call.autocast = True
        call.any_dtype = fused
        call.words.append("autocast")
    elif what < 0.24:
        call.dtype = draw.choice((torch.float64, torch.bfloat16))
        call.words.append(str(call.dtype))
    elif what < 0.4:
        call.hook = draw.choice(parts) if parts else None
        call.words.append(f"hook on {call.hook}")
    elif what < 0.6:
        call.way = draw.choice(("deepcopy", "pickle", "functional_call", "vmap"))
        call.words.append(call.way)


def _copied(model: nn.Module, way: str) -> nn.Module:
    if way == "deepcopy":
        return copy.deepcopy(model)
    buffer = io.BytesIO(pickle.dumps(model))
    return pickle.load(buffer)


def made(call: Call, model: nn.Module) -> Any:
    """What one model returns for a call, and the gradients of biases and norms where asked for."""
    was_training = model.training
    model.train(call.training)
    torch.manual_seed(7)
    try:
        if call.dtype is not None:
            model = copy.deepcopy(model).to(call.dtype)
            call = _cast(call)
        with ExitStack() as stack:
            seen = stack.enter_context(_hooked(model, call.hook))
            stack.enter_context(_gradients(call.gradients))
            if call.autocast:
                stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
            results = list(_results(call, model))
        if call.gradients == "backward":
            loss(results[0]).backward()
            results.append(_small_gradients(model))
        return [*results, seen]
    finally:
        model.train(was_training)


def _cast(call: Call) -> Call:
    cast = copy.copy(call)
    cast.batch = {
        name: value.to(call.dtype)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in call.batch.items()
    }
    return cast


def _results(call: Call, model: nn.Module) -> Iterator[Any]:
    batch = dict(call.batch)
    names = list(inspect.signature(model.forward).parameters)[: call.positional]
    arguments = tuple(batch.pop(name) for name in names)
    if call.way == "functional_call":
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        yield torch.func.functional_call(model, tensors, arguments, batch)
    elif call.way == "vmap":
        tensors = {name: value for name, value in call.batch.items() if isinstance(value, Tensor)}
        rest = {name: value for name, value in call.batch.items() if name not in tensors}
        stacked = {name: torch.stack([value, value.flip(0)]) for name, value in tensors.items()}

        def each(one: Batch) -> list[Any]:
            return pytree.tree_leaves(model(**one, **rest))

        yield torch.vmap(each)(stacked)
    elif call.steps:
        yield from _with_cache(call, model)
    else:
        yield model(*arguments, **batch)


def _with_cache(call: Call, model: nn.Module) -> Iterator[Any]:
    """A call that fills a cache, and further ones of a single token each that read it."""
    batch: Batch = {**call.batch, "use_cache": True}
    result = model(**batch)
    yield result
    mask = batch.get("attention_mask")
    for _ in range(call.steps):
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        token = batch["input_ids"][:, :1]
        more = {} if mask is None else {"attention_mask": mask}
        past = result.past_key_values
        result = model(input_ids=token, past_key_values=past, use_cache=True, **more)
        yield result


@contextmanager
def _hooked(model: nn.Module, name: str | None) -> Generator[list[Tensor]]:
    """A forward hook on a part, for one call; how often it ran."""
    seen: list[Tensor] = []
    if name is None:
        yield seen
        return

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(torch.ones(()))

    handle = model.get_submodule(name).register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def _gradients(mode: str) -> Any:
    kinds: dict[str, Callable[[], Any]] = {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "grad": torch.enable_grad,
        "backward": torch.enable_grad,
    }
    return kinds[mode]()


def _small_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of what is never masked: biases and norms; zeros are those of unused ones."""
    named = dict(model.named_parameters())
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in sorted(named.items())
        if value.dim() == 1 and not name.endswith("scores")
    }


def differences(wanted: Any, found: Any, call: Call) -> Iterator[str]:
    """Where two results of the same call differ, with by how much."""
    first, second = _tensors(wanted), _tensors(found)
    if list(first) != list(second):
        missing, more = set(first) - set(second), set(second) - set(first)
        yield f"other outputs: {sorted(missing)[:4]} missing, {sorted(more)[:4]} added"
        return
    for place, a in first.items():
        b = second[place]
        if any(part in place for part in SMALLER) and a.shape != b.shape:
            continue
        free = call.any_dtype and a.is_floating_point() and b.is_floating_point()
        if a.shape != b.shape or (a.dtype != b.dtype and not free):
            yield f"{place} is {b.dtype} {tuple(b.shape)}, not {a.dtype} {tuple(a.shape)}"
            continue
        if a.numel() == 0:
            continue
        a, b = a.detach(), b.detach()
        exact = RELATIVE.get(torch.bfloat16 if call.autocast else call.dtype or a.dtype, 0.0)
        a, b = (a.abs(), b.abs()) if a.is_complex() else (a, b)
        same = (a == b) | (a.isnan() & b.isnan())
        gaps = torch.where(same, 0.0, (a.double() - b.double()).abs()).nan_to_num(nan=float("inf"))
        finite = a.double().abs()[a.isfinite()]
        scale = max(1e-3, float(finite.max()) if finite.numel() else 0.0)
        if float(gaps.max()) > exact * scale:
            yield f"{place} differs by {float(gaps.max()):.2e} of {scale:.2e}"


def _tensors(result: Any) -> dict[str, Tensor]:
    """The tensors of a result by their place; caches are compared by what is read from them."""
    leaves, _ = pytree.tree_flatten_with_path(result)
    named = {pytree.keystr(path): leaf for path, leaf in leaves}
    return {
        place: leaf
        for place, leaf in named.items()
        if isinstance(leaf, Tensor) and "past_key_values" not in place
    }
