"""Choose how each site's weight is stored: dense, reduced, csr, bsr, native or native_dense.

A sparse storage is taken only where it is faster, by more than timings scatter, than the dense
matmul of the same (shrunken) shape, transposes at both edges included: measured at the token count
of the example inputs, or by the break-even table where there are none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mvpfx.break_even import break_even
from mvpfx.cost import Quartiles, measure_storages
from mvpfx.facts import NATIVE_DENSE, REDUCED, SPARSE
from mvpfx.kernels.library import no_kernels
from mvpfx.layer import Layer, find_layers, is_linear, is_own_call, tied_names
from mvpfx.pipeline import Decision, Pass
from mvpfx.program import Program, Timing, full_name
from mvpfx.site import Site
from mvpfx.storage import find_block, stored_fraction
from mvpfx.transformers_types import is_conv1d

LOWERINGS = ("auto", "dense", *SPARSE)
HOPELESS = 0.6
"""Density above which no sparse storage is worth measuring."""
BUDGET_SECONDS = 0.5
"""How long the timed calls of one weight may take together, about."""
DEFAULT_TOKENS = 128
"""Token count that the break-even table is asked for where none is known."""


@dataclass(frozen=True)
class ChooseStorage(Pass):
    """Choose a storage for every site.

    Args:
        lowering: "auto" takes the fastest; "dense", "csr", "bsr" or "native" is taken wherever it
            can be.
        highest_density: denser sites stay dense even where a sparse storage is named.
        dense_too: whether those that stay dense, where "native" is named, are computed by native
            kernels all the same.
        why: the reason that is recorded where a storage is named.
        rounds: timed rounds of each measurement, where they fit into `BUDGET_SECONDS`.

    Raises:
        ValueError: the lowering is unknown.
    """

    name: ClassVar[str] = "choose_storage"
    requires: ClassVar[tuple[str, ...]] = ("masks_folded",)
    ensures: ClassVar[tuple[str, ...]] = ("storages_chosen",)
    lowering: str = "auto"
    highest_density: float = 1.0
    dense_too: bool = False
    why: str = "asked for"
    rounds: int = 11

    def __post_init__(self) -> None:
        if self.lowering not in LOWERINGS:
            known = ", ".join(LOWERINGS)
            raise ValueError(f"unknown lowering {self.lowering!r}; needed one of: {known}.")

    def apply(self, program: Program) -> Iterator[Decision]:
        """Choose site by site; equal shapes and densities are measured once."""
        layers = _by_weight(program)
        tied = tied_names(program.model)
        stopwatch = _Stopwatch(self.rounds)
        for site in program.sites.values():
            if site.name in program.storages:
                continue
            found = layers.get(site.name, [])
            obstacle = _obstacle(program, site, found, tied)
            storage, decision = self._choose(program, site, found, obstacle, stopwatch)
            program.storages[site.name] = storage
            yield decision

    def _choose(
        self,
        program: Program,
        site: Site,
        layers: list[Layer],
        obstacle: str | None,
        stopwatch: _Stopwatch,
    ) -> tuple[str, Decision]:
        dense = _dense_name(program, site)
        if self.lowering in SPARSE:
            reason = obstacle or self._impossible(program, layers[0])
            density = program.density(site.name)
            if reason is None and density > self.highest_density:
                if self.dense_too:
                    decision = Decision(site.name, f"store as {NATIVE_DENSE}", True, self.why)
                    return NATIVE_DENSE, decision
                reason = f"density {density:.2f} is too high for sparse storage"
            if reason is not None:
                reason = f"{reason}; stays {dense}"
                return dense, Decision(site.name, f"store as {self.lowering}", False, reason)
            decision = Decision(site.name, f"store as {self.lowering}", True, self.why)
            return self.lowering, decision
        action = f"store as {dense}"
        if self.lowering == "dense" or obstacle is not None:
            return dense, Decision(site.name, action, True, obstacle or self.why)
        density = program.density(site.name)
        if density > HOPELESS:
            reason = f"density {density:.2f} is too high for sparse storage"
            return dense, Decision(site.name, action, True, reason)
        storage, reason = self._fastest(program, site, layers[0], stopwatch)
        return storage, Decision(site.name, f"store as {storage}", True, reason)

    def _impossible(self, program: Program, layer: Layer) -> str | None:
        """Why the storage that was named cannot be had."""
        if self.lowering == "bsr":
            return _no_block(program, layer)
        if self.lowering == "native":
            weight = layer.weight(program)
            return no_kernels(weight.device, weight.dtype)
        return None

    def _fastest(
        self, program: Program, site: Site, layer: Layer, stopwatch: _Stopwatch
    ) -> tuple[str, str]:
        dense = _dense_name(program, site)
        weight = layer.weight(program)
        tokens = program.tokens.get(site.name)
        blocks = {"csr": 1, "bsr": find_block(weight), "native": 1}
        if weight.device.type != "cpu":
            del blocks["bsr"]
        if no_kernels(weight.device, weight.dtype) is not None:
            del blocks["native"]
        candidates = {name: block for name, block in blocks.items() if block}
        if tokens is None:
            return _by_table(weight, candidates, dense)
        found = stopwatch.measure(weight, layer.bias(program), layer.out_dim, tokens, candidates)
        # The lower quartile: what a busy machine adds is not the storage's cost.
        times = {name: quartiles.low_ms for name, quartiles in found.items()}
        best = min(candidates, key=times.__getitem__)
        listed = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
        where = f"at {tokens} tokens, density {program.density(site.name):.2f}: {listed}"
        chosen = best if found[best].is_clearly_below(found["dense"]) else dense
        program.timings[site.name] = Timing(tokens, times)
        return chosen, f"measured {where}"


@dataclass
class _Stopwatch:
    rounds: int
    _known: dict[tuple[object, ...], dict[str, Quartiles]] = field(
        default_factory=dict[tuple[object, ...], dict[str, Quartiles]]
    )

    def measure(
        self,
        weight: Tensor,
        bias: Tensor | None,
        out_dim: int,
        tokens: int,
        candidates: dict[str, int],
    ) -> dict[str, Quartiles]:
        """Return milliseconds of dense and of each candidate storage."""
        nonzero = round(50 * int(torch.count_nonzero(weight)) / weight.numel())
        key = (*weight.shape, weight.dtype, str(weight.device), out_dim, bias is None, tokens)
        key = (*key, nonzero, *candidates.items())
        if key not in self._known:
            strided = weight.contiguous() if out_dim == 0 else weight.t().contiguous().t()
            self._known[key] = measure_storages(
                strided, bias, tokens, candidates, self.rounds, BUDGET_SECONDS
            )
        return self._known[key]


def _by_table(weight: Tensor, candidates: dict[str, int], dense: str) -> tuple[str, str]:
    chosen, reasons = dense, list[str]()
    for name, block in candidates.items():
        density = stored_fraction(weight, block)
        limit = break_even(name, DEFAULT_TOKENS, weight.numel(), weight.device.type, weight.dtype)
        sign = "<" if density < limit else ">="
        reasons.append(f"{name} density {density:.3f} {sign} break-even {limit:.3f}")
        if density < limit:
            chosen = name
    return chosen, f"from the table at {DEFAULT_TOKENS} tokens: {', '.join(reasons)}"


def _by_weight(program: Program) -> dict[str, list[Layer]]:
    found: dict[str, list[Layer]] = {}
    for layers in find_layers(program).values():
        for layer in layers.values():
            found.setdefault(layer.weight_name, []).append(layer)
    return found


def _dense_name(program: Program, site: Site) -> str:
    value = program.parameter(site.name)
    return REDUCED if value is not None and tuple(value.shape) != site.shape else "dense"


def _no_block(program: Program, layer: Layer) -> str | None:
    weight = layer.weight(program)
    if find_block(weight, waste=float("inf")):
        return None
    rows, columns = weight.shape
    return f"no block size tiles {rows} x {columns}"


def _obstacle(
    program: Program, site: Site, layers: list[Layer], tied: dict[str, str]
) -> str | None:
    """Say why a site cannot be a `SparseLinear`; None where it can."""
    owner, weight = program.module(site.module_name), program.parameter(site.name)
    if weight is not None and not weight.numel():
        return "nothing of it is left"
    if len(site.shape) != 2:
        return f"a weight of {len(site.shape)} dimensions has no sparse storage"
    if site.name in tied:
        return f"tied to {tied[site.name]}"
    if site.name in program.unfolded:
        return "its mask is not folded"
    if owner is None or not (is_linear(owner) or is_conv1d(owner)):
        return f"held by {type(owner).__name__}, which is not a linear layer"
    if site.module_name in ("", *program.graphs):
        return "it is the captured module itself"
    if not layers:
        return "no graph shows how it is used"
    if owner._forward_hooks or owner._forward_pre_hooks or owner._backward_hooks:
        return "its module has hooks"
    uses = sum(
        len(node.users)
        for region, node in program.nodes()
        if node.op == "get_attr" and full_name(region, node.target) == site.name
    )
    if uses != len(layers) or not all(is_own_call(layer) for layer in layers):
        return "its weight is also read outside its module"
    return None
