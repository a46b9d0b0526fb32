"""Prepared models of the zoo against `W *= mask`: outputs, loss, gradients, captured regions."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import mvpfx
from mvpfx.granularity import to_matrix
from mvpfx.mask import Mask
from mvpfx.region import block_names, region_of
from mvpfx.state import state_of
from tests.zoo.count import multiplied_parameters
from tests.zoo.entry import SHAPES, Batch, Entry, loss, output

RELATIVE = 1e-6
"""Largest difference that counts as equal, relative to the largest entry of a tensor."""


@dataclass
class Outcome:
    """What checking one model gave.

    Attributes:
        model: name of its class.
        differences: shape index -> quantity -> largest relative difference.
        blocks, regions: name -> the reasons why calls of it were not captured; none where all were.
            Blocks are the regions that are repeated blocks of the model.
        sites: the weights that were masked.
        expected: those an independent count finds.
    """

    model: str
    differences: dict[int, dict[str, float]] = field(default_factory=dict[int, dict[str, float]])
    blocks: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    regions: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    sites: set[str] = field(default_factory=set[str])
    expected: set[str] = field(default_factory=set[str])

    @property
    def missed(self) -> set[str]:
        """Weights that are multiplied by and were not masked."""
        return self.expected - self.sites

    @property
    def largest(self) -> float:
        """The largest relative difference of all."""
        return max(max(found.values()) for found in self.differences.values())

    @property
    def equal_shapes(self) -> int:
        """In how many shapes all was equal."""
        return sum(max(found.values()) <= RELATIVE for found in self.differences.values())


def check(entry: Entry, shapes: tuple[int, ...] = tuple(range(len(SHAPES)))) -> Outcome:
    """Compare one model in all `shapes`, every weight that feeds a matmul masked."""
    raw = entry.model()
    outcome = Outcome(type(raw).__name__)
    prepared = prepare(raw, entry.batch(shapes[0]))
    reference = masked_copy(raw, prepared)
    for shape in shapes:
        found: dict[str, float] = {}
        for training in (True, False):
            prepared.train(training)
            reference.train(training)
            step = compare(prepared, reference, raw, entry.batch(shape))
            found |= step if training else {f"{name} in eval": v for name, v in step.items()}
        outcome.differences[shape] = found
    blocks = block_names(raw)
    for name in state_of(prepared).regions:
        region = region_of(prepared.get_submodule(name))
        assert region is not None
        reasons = list(region.declined)
        if not (region.calls or reasons):
            reasons = ["it was never called"]
        (outcome.blocks if name in blocks else outcome.regions)[name] = reasons
    canonical = _canonical_names(raw)
    outcome.sites = {canonical[name] for name in masks(prepared)}
    outcome.expected = multiplied_parameters(raw, entry.batch(shapes[0]))
    return outcome


def prepare(raw: nn.Module, batch: Batch, **options: Any) -> nn.Module:
    """A prepared copy of `raw` with random scores; every weight that feeds a matmul is a site."""
    options = {"overrides": {"re:.*": {}}, **options}
    config = mvpfx.PruningConfig(density=0.4, schedule=mvpfx.ConstantSchedule(), **options)
    prepared = mvpfx.prepare(copy.deepcopy(raw), config, example_inputs=batch)
    generator = torch.Generator().manual_seed(1)
    for mask in masks(prepared).values():
        if mask.scores is None:  # it follows the scores of another weight
            continue
        with torch.no_grad():
            mask.scores.copy_(torch.rand(mask.scores.shape, generator=generator))
    return prepared


def masks(model: nn.Module) -> dict[str, Mask]:
    """The masks of a prepared model by the name of their weight."""
    return {m.site.name: m for m in model.modules() if isinstance(m, Mask)}


def masked_names(mask: Mask, model: nn.Module) -> list[str]:
    """The names under which a weight reads as masked: an embedding tied to it keeps it raw."""
    names = (mask.site.name, *mask.site.aliases)
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    return [n for n in names if n == mask.site.name or not isinstance(owners[n], nn.Embedding)]


def masked_copy(raw: nn.Module, prepared: nn.Module) -> nn.Module:
    """A copy of `raw` whose masked weights are multiplied by their mask."""
    reference = copy.deepcopy(raw)
    for name, mask in masks(prepared).items():
        weight = reference.get_parameter(name)
        masked = nn.Parameter(weight.detach() * mask.mask(), requires_grad=weight.requires_grad)
        for each in masked_names(mask, raw):
            owner, _, leaf = each.rpartition(".")
            setattr(reference.get_submodule(owner), leaf, masked)
    return reference


def compare(
    prepared: nn.Module, reference: nn.Module, raw: nn.Module, batch: Batch
) -> dict[str, float]:
    """The worst relative difference of output, loss, dW and dS in one step, dropout seeded."""
    prepared.zero_grad()
    reference.zero_grad()
    torch.manual_seed(3)
    wanted = reference(**batch)
    torch.manual_seed(3)
    found = prepared(**batch)
    result = {
        "output": difference(output(found), output(wanted)),
        "loss": difference(loss(found), loss(wanted)),
        "dW": 0.0,
        "dS": 0.0,
    }
    loss(wanted).backward()
    loss(found).backward()
    gradients = dict(_gradients(reference))
    weights, names = dict(raw.named_parameters()), _canonical_names(raw)
    wanted_weights: dict[str, Tensor | None] = {}
    for name, gradient in gradients.items():
        wanted_weights.setdefault(names[name], None)
        if gradient is not None and not _is_masked(name, prepared, raw):
            wanted_weights[names[name]] = gradient
    for name, mask in masks(prepared).items():
        gradient = gradients[name]
        weight = weights[names[name]].detach()
        gradient = torch.zeros_like(weight) if gradient is None else gradient
        assert mask.scores is not None
        product = gradient.float() * weight.float()
        matrix = to_matrix(product, mask.site.out_dim, mask.site.parts)
        scores = mask.granularity.reduce(matrix, mask.site.parts).to(mask.scores.dtype)
        result["dS"] = max(result["dS"], difference(mask.scores.grad, scores))
        raw_part = wanted_weights.get(names[name])
        masked_part = gradient * mask.mask()
        wanted_weights[names[name]] = masked_part if raw_part is None else masked_part + raw_part
    for name, parameter in prepared.named_parameters():
        if not name.endswith("_mask.scores"):
            worst = difference(parameter.grad, wanted_weights[names[name]])
            result["dW"] = max(result["dW"], worst)
    return result


def difference(found: Tensor | None, wanted: Tensor | None) -> float:
    """The largest difference relative to the largest entry; no gradient is one of zeros."""
    if found is None or wanted is None:
        left = found if wanted is None else wanted
        return 0.0 if left is None or not left.any() else float("inf")
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    if not wanted.numel():
        return 0.0
    found, wanted = found.detach(), wanted.detach()
    apart = float((found - wanted).abs().max())
    scale = float(wanted.abs().max())
    if apart != apart or scale != scale:
        return float("inf")
    return 0.0 if apart == 0 else apart / max(scale, 1e-12)


def _is_masked(name: str, prepared: nn.Module, raw: nn.Module) -> bool:
    return any(name in masked_names(mask, raw) for mask in masks(prepared).values())


def _gradients(model: nn.Module) -> list[tuple[str, Tensor | None]]:
    found = model.named_parameters(remove_duplicate=False)
    return [(name, parameter.grad) for name, parameter in found]


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """The first name of each parameter, by every name."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(parameter), name)
    return names
