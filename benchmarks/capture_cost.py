"""What capturing costs: seconds a layer of BERT-base, and microseconds of dispatch a call.

    python -m benchmarks.capture_cost --output benchmarks/results/capture_cost.json

Dispatch is what a call of a region takes beyond running its graph: finding the variant that fits
the call, reading the tensors it needs. It is the difference of two medians on a layer so small that
the graph itself takes little; both take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mvpfx
from benchmarks import results_file
from mvpfx.region import Region, capture, region_of
from mvpfx.state import state_of
from mvpfx.swap import original_class
from mvpfx.torch_private import pytree
from mvpfx.variant import Variant

BATCH, LENGTH = 8, 128


def encoder(hidden: int, heads: int, layers: int) -> nn.Module:
    """A BERT encoder with random weights, prepared, in eval mode."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.BertConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        intermediate_size=4 * hidden,
        vocab_size=99,
    )
    return mvpfx.prepare(transformers.BertModel(config)).eval()


def layers_of(model: nn.Module) -> list[tuple[nn.Module, Region]]:
    """The repeated layers of a prepared model with their regions."""
    modules = [model.get_submodule(name) for name in state_of(model).regions]
    found = [(module, region_of(module)) for module in modules]
    return [(module, region) for module, region in found if region is not None]


def capture_seconds(hidden: int, heads: int, layers: int) -> list[float]:
    """Seconds to capture each layer: record, put masks in, compile. The first one, which imports
    and warms up what torch needs, is not counted.
    """
    seconds: list[float] = []
    states = torch.randn(BATCH, LENGTH, hidden)
    for module, region in layers_of(encoder(hidden, heads, layers + 1)):
        start = time.perf_counter()
        capture(module, region, ((states,), {}), original_class(module).forward)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def dispatch_microseconds(rounds: int) -> dict[str, float]:
    """Medians of a region's call and of its graph alone, microseconds."""
    module, region = layers_of(encoder(32, 4, 1))[0]
    states = torch.randn(1, 4, 32)
    with torch.no_grad():
        module(states)
        (variant,) = (v for found in region.variants.values() for v in found)
        assert isinstance(variant, Variant)
        graph = plain_call(variant, states)
        calls: dict[str, Callable[[], Any]] = {
            "region": lambda: original_call(module, states),
            "graph": graph,
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(-rounds // 10, rounds):
            for name in list(calls)[:: 1 if turn % 2 else -1]:
                start = time.perf_counter()
                calls[name]()
                if turn >= 0:
                    times[name].append(1e6 * (time.perf_counter() - start))
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {**medians, "dispatch": medians["region"] - medians["graph"]}


def original_call(module: nn.Module, states: Tensor) -> Any:
    """The call a user makes, without nn.Module's own hooks, which a plain layer pays as well."""
    return module.forward(states)


def plain_call(variant: Variant, states: Tensor) -> Callable[[], Any]:
    """The variant's compiled graph on inputs that are already gathered."""
    flat, _ = pytree.tree_flatten(((states,), {}))
    inputs = variant.inputs(flat)
    return lambda: variant.function(*inputs)


def main(arguments: list[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capture_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2000, help="calls of each kind")
    parser.add_argument("--layers", type=int, default=11, help="layers captured")
    parser.add_argument("--hidden", type=int, default=768, help="width; BERT-base has 768")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="where to write the result")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    seconds = capture_seconds(options.hidden, options.hidden // 64 or 1, options.layers)
    result = {
        "benchmark": "capture_cost",
        "environment": results_file.environment(torch.device("cpu")),
        "settings": {"hidden": options.hidden, "layers": options.layers, "rounds": options.rounds},
        "capture_seconds_a_layer": {
            "median": statistics.median(seconds),
            "largest": max(seconds),
        },
        "call_microseconds": dispatch_microseconds(options.rounds),
    }
    if options.output:
        results_file.write(options.output, result)
    print(result["capture_seconds_a_layer"])
    print(result["call_microseconds"])


if __name__ == "__main__":
    main()
