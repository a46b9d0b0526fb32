"""Regions: modules whose calls run as graphs, captured at the first call of each kind.

A call that cannot become a graph runs the module's own forward, in which every masked parameter
reads as its masked value: masks apply whatever happens, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from mvpfx.call import blank
from mvpfx.interception import is_capturing
from mvpfx.net import caught, guarded, is_our_own
from mvpfx.recomputing import Recomputing
from mvpfx.recorder import Recorder
from mvpfx.recording import CaptureError, Recording
from mvpfx.signature import Configuration, flatten, signature
from mvpfx.sizes import UnknownSizeError
from mvpfx.swap import MASK_SUFFIX, masked_names, original_class, runtime_of, set_runtime
from mvpfx.torch_private import GuardOnDataDependentSymNode, is_size_known
from mvpfx.traces import is_traced
from mvpfx.transformers_types import is_checkpointed_block, is_idle_hook
from mvpfx.variant import Variant

MOST_VARIANTS = 32

NOT_CALLED = "no graph: it was not called yet"
"""Why a region of a prepared model has no graph, until it is called."""

Rewrite = Callable[[nn.Module, "Region", fx.Graph], fx.Graph]


@dataclass
class Region:
    """The runtime of one region: its variants by call signature.

    Attributes:
        name: the module's name in the model, "" for the root.
        rewrite: turns a recorded graph into the one that runs (inserts masks).
        state: the model's record, shared by its regions.
        variants: captured graphs by call signature, or the reason there is none.
        declined: reasons why calls were not captured, and how many calls that was.
        faults: why native kernels were not used inside of graphs, and how often.
        calls: how many calls ran as a graph.
        configuration: remembers what the module's forward may branch on.
    """

    name: str
    rewrite: Rewrite
    state: Any
    variants: dict[Any, list[Variant | str]] = field(
        default_factory=dict[Any, "list[Variant | str]"]
    )
    declined: dict[str, int] = field(default_factory=dict[str, int])
    faults: dict[str, int] = field(default_factory=dict[str, int])
    calls: int = 0
    configuration: Configuration = field(default_factory=Configuration)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without variants: graphs hold the modules they came from."""
        return {
            **self.__dict__,
            "variants": {},
            "declined": dict(self.declined),
            "faults": dict(self.faults),
            "calls": 0,
            "configuration": Configuration(),
        }

    def call(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run one call of the region: as a graph, or where it cannot be one, by `forward`."""
        if is_capturing() or is_traced():
            return forward(module, *args, **kwargs)
        flat: list[Any] = []
        try:
            flat, spec = flatten(args, kwargs)
            key = signature(module, flat, spec, self.configuration)
            variant = _find(module, self, key, flat, (args, kwargs), forward)
        except CaptureError as reason:
            variant = str(reason)
        except Exception as error:  # noqa: BLE001  the net
            variant = caught(error, "looking for a graph")
        if isinstance(variant, str):
            self.decline(variant)
            return forward(module, *args, **kwargs)
        self.calls += 1
        with Recomputing():
            return variant.run(flat)

    def decline(self, reason: str) -> None:
        """Remember that a call ran the module's own forward, and why."""
        self.declined[reason] = self.declined.get(reason, 0) + 1

    def fault(self, reason: str) -> None:
        """Remember that native kernels were not used inside of a graph, and why."""
        self.faults[reason] = self.faults.get(reason, 0) + 1

    def captured(self) -> list[Variant]:
        """What was captured, without gradients first."""
        found = [
            (key[1], variant)
            for key, variants in self.variants.items()
            for variant in variants
            if isinstance(variant, Variant)
        ]
        return [variant for _, variant in sorted(found, key=lambda pair: bool(pair[0]))]


def region_of(module: nn.Module) -> Region | None:
    """The region runtime of a module, or None."""
    runtime = runtime_of(module)
    return runtime if isinstance(runtime, Region) else None


def captured(model: nn.Module, names: list[str]) -> dict[str, Variant]:
    """What the regions called `names` have captured so far, one variant each."""
    regions = {name: region_of(model.get_submodule(name)) for name in names}
    found = {name: region.captured() for name, region in regions.items() if region is not None}
    return {name: variants[0] for name, variants in found.items() if variants}


def region_modules(model: nn.Module, owners: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """The regions of a model whose weights are held by the modules named in `owners`.

    A repeated block (a transformers layer, or a composite child of an `nn.ModuleList` with a
    sibling of its class) is a region; a block inside a block is not. What lies outside all blocks
    is covered by the largest modules that hold no block.
    """
    blocks = block_names(model)

    def holds(name: str, names: Any) -> bool:
        return any(other == name or not name or other.startswith(f"{name}.") for other in names)

    def cover(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if name in blocks or not holds(name, blocks):
            if holds(name, owners):
                yield name, module
            return
        for child_name, child in module.named_children():
            yield from cover(child, f"{name}.{child_name}" if name else child_name)

    yield from cover(model, "")


def block_names(model: nn.Module) -> set[str]:
    """Names of the outermost repeated blocks of a model."""
    return {name for name, _ in _blocks(model, "")}


def _blocks(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    children = list(module.named_children())
    kinds = [type(child) for _, child in children]
    for child_name, child in children:
        full = f"{name}.{child_name}" if name else child_name
        repeated = isinstance(module, nn.ModuleList) and kinds.count(type(child)) > 1
        if is_checkpointed_block(child) or (repeated and _is_composite(child)):
            yield full, child
        else:
            yield from _blocks(child, full)


def _is_composite(module: nn.Module) -> bool:
    """Whether a module has children besides masks."""
    masks = {f"{name}{MASK_SUFFIX}" for name in masked_names(module)}
    return any(name not in masks for name, _ in module.named_children())


def _find(
    module: nn.Module,
    region: Region,
    key: Any,
    flat: list[Any],
    call: tuple[tuple[Any, ...], dict[str, Any]],
    forward: Callable[..., Any],
) -> Variant | str:
    """The variant for a call, captured now if it is the first of its kind; or why there is none."""
    known = region.variants.setdefault(key, [])
    for variant in known:
        if isinstance(variant, str) or variant.check(flat):
            return variant
    if sum(len(variants) for variants in region.variants.values()) >= MOST_VARIANTS:
        raise CaptureError(f"more than {MOST_VARIANTS} kinds of call")
    try:
        variant = capture(module, region, call, forward)
    except CaptureError as reason:
        variant = str(reason)
    known.append(variant)
    return variant


def capture(
    module: nn.Module,
    region: Region,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    forward: Callable[..., Any],
) -> Variant:
    """Record one call, rewrite its graph, and make it ready to run.

    Raises:
        CaptureError: with the reason, whatever went wrong while recording on fakes; the
            module's own forward then serves, and raises the error if it is one.
        RefusedError: what the graph shows has to be mended by the user.
    """
    recording = _record(module, call, forward)
    with guarded("rewriting the graph"):
        graph = region.rewrite(module, region, recording.graph)
    with guarded("preparing the graph"):
        return Variant(module, recording, graph, blank(*call))


def capture_graph(module: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> fx.Graph:
    """Record one call of a module, prepared or not; parameters are read raw.

    Raises:
        CaptureError: with the reason.
    """
    graph = _record(module, call, original_class(module).forward).graph
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not all(map(is_size_known, value.shape)):
            raise CaptureError(f"the size of what {node.name} gives depends on data")
    return graph


def _record(
    module: nn.Module,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    forward: Callable[..., Any],
) -> Recording:
    _check_hooks(module)
    try:
        return Recorder(module, forward).record(*call)
    except CaptureError:
        raise
    except UnknownSizeError as error:
        raise CaptureError(str(error)) from error
    except GuardOnDataDependentSymNode as error:
        raise CaptureError("its control flow depends on data") from error
    except Exception as error:
        if is_our_own(error):
            raise CaptureError(caught(error, "recording a call")) from error
        first_line = str(error).partition("\n")[0]
        raise CaptureError(f"{type(error).__name__}: {first_line}") from error


def _check_hooks(module: nn.Module) -> None:
    for name, part in module.named_modules():
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        if name and not all(is_idle_hook(hook) for hook in hooks):
            raise CaptureError(f"{name} has forward hooks")
        if name and (part._backward_hooks or part._backward_pre_hooks):
            raise CaptureError(f"{name} has backward hooks")
        for parameter in masked_names(part):
            if parameter not in part._parameters:
                raise CaptureError(f"{name}.{parameter} is no parameter any more".lstrip("."))
        if name and "forward" in part.__dict__:
            raise CaptureError(f"{name} has a forward of its own instance")


def make_region(module: nn.Module, region: Region) -> None:
    """Run the calls of `module` as graphs from now on."""
    set_runtime(module, region)
