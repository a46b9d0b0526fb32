"""The main job: fine-tune a pretrained model while its weights are pruned, then convert it.

Without options an embedded task that needs no network: a small vision transformer is pretrained on
the digits 0 to 4 and moved to the digits 5 to 9, while three quarters of its heads and FFN
channels go. With `--model FOLDER --data FOLDER` the same on a real encoder and real sentences:

    python -m benchmarks.fine_prune --model FOLDER --data FOLDER --density 0.10
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mvpfx
from benchmarks import measure, presets, results_file, training
from benchmarks.training import Recipe
from benchmarks.workloads import Workload, digits, sentences


@dataclass(frozen=True)
class Settings:
    """What a run does; the defaults are those of the embedded task."""

    density: float = 0.25
    granularity: str = "structured"
    criterion: str = "movement"
    epochs: int = 30
    dense_epochs: int = 15
    batch_size: int = 32
    lr: float = 1e-3
    score_lr: float = 1e-2
    seed: int = 0
    rounds: int = 60  # of the latency measurement
    threads: int | None = 1  # None: torch's own choice. The embedded model is too small for two

    def recipe(self, epochs: int) -> Recipe:
        """The training recipe of one of the run's parts."""
        return Recipe(epochs, self.batch_size, self.lr, self.score_lr, self.seed)


SENTENCES = Settings(
    density=0.10, granularity="element", epochs=6, dense_epochs=3, lr=1e-4, threads=None
)


def train_dense(workload: Workload, settings: Settings) -> nn.Module:
    """Fine-tune a copy without pruning, having pretrained the workload's model if it needs that."""
    recipe = settings.recipe(settings.dense_epochs)
    if workload.pretraining is not None:
        training.fine_tune(workload.model, workload.pretraining, recipe, "pretraining")
    dense = copy.deepcopy(workload.model)
    training.fine_tune(dense, workload.train, recipe, "fine-tuning, dense")
    return dense


def train_pruned(workload: Workload, settings: Settings) -> nn.Module:
    """Fine-tune a copy while its masks move to the final density."""
    model = copy.deepcopy(workload.model)
    config = presets.pruning_config(
        model,
        density=settings.density,
        granularity=settings.granularity,
        criterion=settings.criterion,
    )
    mvpfx.prepare(model, config)
    recipe = settings.recipe(settings.epochs)
    scheduler = mvpfx.SparsityScheduler(model, total_steps=recipe.total_steps(workload.train))
    training.fine_tune(model, workload.train, recipe, "fine-tuning, pruned", scheduler)
    return model


def prune_at_once(model: nn.Module, workload: Workload, settings: Settings) -> nn.Module:
    """A converted copy of `model`, cut by magnitude without training, to take its latency."""
    pruned = copy.deepcopy(model)
    config = presets.pruning_config(
        pruned,
        density=settings.density,
        granularity=settings.granularity,
        criterion="magnitude",
        constant=True,
    )
    mvpfx.prepare(pruned, config)
    return mvpfx.convert(pruned, example_inputs=training.to_device(workload.timed, pruned))


def run(workload: Workload, settings: Settings) -> tuple[dict[str, Any], str]:
    """Train, convert and measure. Returns the result and the converted model's table."""
    dense = train_dense(workload, settings)
    masked = train_pruned(workload, settings)
    small = mvpfx.convert(masked, example_inputs=training.to_device(workload.timed, masked))
    half = prune_at_once(dense, workload, replace(settings, density=0.5))

    dense_logits, labels = training.outputs(dense, workload.test)
    masked_logits, _ = training.outputs(masked, workload.test)
    small_logits, _ = training.outputs(small, workload.test)
    latency = measure.interleaved_ms(
        {"dense": dense, "converted": small, "converted_at_density_0.5": half},
        workload.timed,
        settings.rounds,
    )
    result = {
        "benchmark": "fine_prune",
        "workload": workload.name,
        "settings": asdict(settings),
        "environment": results_file.environment(next(dense.parameters()).device),
        "examples": {"train": len(workload.train), "test": len(workload.test)},
        "test_accuracy": {
            "dense": training.accuracy(dense_logits, labels),
            "masked": training.accuracy(masked_logits, labels),
            "converted": training.accuracy(small_logits, labels),
        },
        "largest_output_difference": (masked_logits - small_logits).abs().max().item(),
        "file_bytes": {
            "dense": measure.file_bytes(dense),
            "converted": measure.file_bytes(small),
        },
        "parameters_outside_embeddings": {
            "dense": measure.parameters_outside_embeddings(dense),
            "converted": measure.parameters_outside_embeddings(small),
        },
        "timed": workload.timed_as,
        "latency_ms": {name: asdict(quartiles) for name, quartiles in latency.items()},
    }
    return result, mvpfx.sparsity_table(small)


def summary(result: dict[str, Any]) -> str:
    """The figures of a result, for people."""
    accuracy, size = result["test_accuracy"], result["file_bytes"]
    latency = {name: times["median"] for name, times in result["latency_ms"].items()}
    parameters = result["parameters_outside_embeddings"]
    half = latency["converted_at_density_0.5"]
    return "\n".join(
        [
            f"test accuracy        dense {accuracy['dense']:.3f}, pruned {accuracy['masked']:.3f}, "
            f"converted {accuracy['converted']:.3f}",
            f"file                 {size['dense'] / 1e6:.2f} MB -> "
            f"{size['converted'] / 1e6:.2f} MB",
            f"parameters           {parameters['dense']:,} -> {parameters['converted']:,} "
            "(without embeddings)",
            f"latency              {latency['dense']:.2f} ms -> {latency['converted']:.2f} ms "
            f"({latency['dense'] / latency['converted']:.2f}x faster), {result['timed']}",
            f"  at density 0.5     {latency['dense']:.2f} ms -> {half:.2f} ms "
            f"({latency['dense'] / half:.2f}x faster)",
            f"largest difference   {result['largest_output_difference']:.1e} "
            "between the outputs of the masked and the converted model",
        ]
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; what is left out depends on the task."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fine_prune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help="folder of a pretrained encoder")
    parser.add_argument("--data", type=Path, help="folder with train.tsv and test.tsv")
    parser.add_argument("--name", help="what to call the task in the result")
    parser.add_argument("--density", type=float, help="final fraction kept")
    parser.add_argument("--granularity", choices=presets.GRANULARITIES)
    parser.add_argument("--criterion", help="movement, soft_movement or magnitude")
    parser.add_argument("--epochs", type=int, help="epochs of the pruned run")
    parser.add_argument("--dense-epochs", type=int, help="epochs of the dense run")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--score-lr", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--rounds", type=int, help="rounds of the latency measurement")
    parser.add_argument("--max-tokens", type=int, default=64, help="sentences are cut there")
    parser.add_argument("--limit", type=int, help="use the first examples of each file only")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="where to write the result, as JSON")
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.data is None):
        parser.error("--model and --data belong together: give both, or neither")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    options = parse(arguments)
    settings = SENTENCES if options.model else Settings()
    given = {key: getattr(options, key, None) for key in asdict(settings)}
    settings = replace(settings, **{key: v for key, v in given.items() if v is not None})
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if options.model:
        workload = sentences(
            options.model,
            options.data,
            seed=settings.seed,
            max_tokens=options.max_tokens,
            limit=options.limit,
        )
    else:
        workload = digits(seed=settings.seed)
    workload = replace(workload, name=options.name or workload.name)
    workload.model.to(options.device)
    result, table = run(workload, settings)
    print(f"\n{table}\n\n{summary(result)}")
    if options.output:
        results_file.write(options.output, {**result, "table": table.splitlines()})


if __name__ == "__main__":
    main()
