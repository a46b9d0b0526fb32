"""The same channels removed by `mvpfx.convert` and by two peers: what is left, and is it the same?

    python -m benchmarks.structured_peers

Peers are torch-pruning and the structured sparsifier of `torch.ao.pruning`. All start from one
masked model, in which the weights of these channels are zero and biases stay as they are: what a
mask on a weight leaves. What such a channel hands on is a constant, of which a peer may or may not
know; so every model comes again with that zero too. `torch.ao.pruning` is asked to fold biases
(`prune_bias=False`). Differences are those of outputs to the masked model's, over its largest.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mvpfx
from benchmarks import results_file, structured_table
from benchmarks.peer_models import Case, build, cases
from benchmarks.workloads import Batch

TOLERANCE = 1e-5
"""Largest relative difference that a converted model may show."""


def by_mvpfx(masked: nn.Module, case: Case) -> nn.Module:
    """Convert; storages stay dense, for only what is removed counts here."""
    return mvpfx.convert(masked, example_inputs=case.batch, lowering="dense")


def by_torch_pruning(masked: nn.Module, case: Case) -> nn.Module:
    """Remove channels, and all that its dependency graph finds to hang on them."""
    import torch_pruning  # type: ignore[import-untyped]

    peer: Any = torch_pruning
    model = copy.deepcopy(masked)
    graph: Any = peer.DependencyGraph().build_dependency(model, example_inputs=case.batch)
    for name in case.roots or case.zeroed:
        layer = model.get_submodule(name)
        prune = graph.get_pruner_of_module(layer).prune_out_channels
        group = graph.get_pruning_group(layer, prune, idxs=case.zeroed[name])
        if not graph.check_pruning_group(group):
            raise RuntimeError(f"check_pruning_group refuses {name}")
        group.prune()
    return model


def by_torch_ao(masked: nn.Module, case: Case) -> nn.Module:
    """Remove channels where its patterns of layers match, biases folded."""
    from torch.ao.pruning._experimental.pruner import base_structured_sparsifier

    base: Any = base_structured_sparsifier.BaseStructuredSparsifier

    class Chosen(base):
        """Prunes the rows that its configuration names."""

        def update_mask(self, module: Any, tensor_name: str, rows: list[int], **_: Any) -> None:
            getattr(module.parametrizations, tensor_name)[0].mask.data[rows] = False

    sparsifier: Any = Chosen({})
    config = [
        {"tensor_fqn": f"{name}.weight", "rows": rows, "prune_bias": False}
        for name, rows in case.zeroed.items()
    ]
    sparsifier.prepare(copy.deepcopy(masked), config)
    sparsifier.step()
    return sparsifier.prune()


PEERS: dict[str, Callable[[nn.Module, Case], nn.Module]] = {
    "torch_pruning": by_torch_pruning,
    "torch_ao": by_torch_ao,
}


def compare(case: Case, silent: bool) -> dict[str, Any]:
    """One row: the masked model, what `convert` makes of it, what each peer does.

    Raises:
        RuntimeError: the converted model differs from the masked one by more than `TOLERANCE`.
    """
    masked = build(case, silent)
    small = by_mvpfx(masked, case)
    ours = measured(masked, small, case.batch)
    if not ours["difference"] <= TOLERANCE:
        raise RuntimeError(
            f"{case.name}: the converted model's outputs differ from the masked one's by "
            f"{ours['difference']:.1e} of the largest; at most {TOLERANCE:.0e} was to be expected"
        )
    left = [d for d in mvpfx.report_of(small).decisions if not d.applied]
    ours["left"] = [f"{d.site}: {d.reason}" for d in left]
    peers = {name: attempt(remove, masked, case) for name, remove in PEERS.items()}
    return {
        "case": case.name,
        "silent": silent,
        "channels": {name: len(channels) for name, channels in case.zeroed.items()},
        "parameters": parameters(masked),
        "mvpfx": ours,
        **peers,
    }


def attempt(
    remove: Callable[[nn.Module, Case], nn.Module], masked: nn.Module, case: Case
) -> dict[str, Any]:
    """What a peer left, or the error by which it says that it cannot."""
    try:
        return measured(masked, remove(masked, case), case.batch)
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is its answer
        return {"cannot": " ".join(f"{type(error).__name__}: {error}".split())}


def measured(masked: nn.Module, small: nn.Module, batch: Batch) -> dict[str, Any]:
    """Parameters of a smaller model, and how far its outputs are from the masked one's."""
    wanted, found = outputs(masked, batch), outputs(small, batch)
    difference = ((wanted - found).abs().max() / wanted.abs().max()).item()
    return {"parameters": parameters(small), "difference": difference}


@torch.no_grad()
def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """Scores or hidden states of a batch, in eval mode."""
    result: Any = model.eval()(**batch)
    return result if isinstance(result, Tensor) else result.logits


def parameters(model: nn.Module) -> int:
    """All parameters, each counted once."""
    return sum(p.numel() for p in model.parameters())


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.structured_peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, default=results_file.FOLDER / "structured_peers.json"
    )
    options = parser.parse_args(arguments)
    environment = results_file.environment(torch.device("cpu"))
    environment["torch-pruning"] = version("torch-pruning")
    rows = [compare(case, silent) for case in cases() for silent in (False, True)]
    result = {"benchmark": "structured_peers", "environment": environment, "rows": rows}
    results_file.write(options.output, result)
    print(structured_table.peers([result]))


if __name__ == "__main__":
    main()
