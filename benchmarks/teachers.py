"""Teachers of `benchmarks.accuracy`: a dense model, or answers of models that had not seen them.

A model answers the sentences it was trained on as their labels say, so it has little to add to
them. Cross-fitted answers have: the training sentences are split into folds, a dense model is
trained without each, and answers what it has not seen (Dao et al. 2021, "Knowledge Distillation as
Semiparametric Inference", section 4). Those of several splits are averaged.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks import training
from benchmarks.training import Recipe
from benchmarks.workloads import Batch, Sentences, Workload, batches

Sentence = tuple[int, ...]
"""Its token ids."""
WorkloadOf = Callable[[int], Workload]
"""The task, with a model that is made with a seed."""


def dense(workload: Workload, saved: Path) -> nn.Module:
    """The dense model that was trained and saved before."""
    model = copy.deepcopy(workload.model).eval()
    device = next(model.parameters()).device
    model.load_state_dict(torch.load(saved, map_location=device))
    return model


class Answers(nn.Module):
    """Logits `[C]` that are known for each sentence, called as a model is."""

    def __init__(self, known: Mapping[Sentence, Tensor]) -> None:
        super().__init__()
        self.known = known

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> object:
        """Logits `[B, C]` of a batch."""
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        logits = torch.stack([self.known[sentence] for sentence in sentences_of(batch)])
        return SequenceClassifierOutput(
            logits=cast("torch.FloatTensor", logits.to(input_ids.device))
        )


@dataclass(frozen=True)
class CrossFitting:
    """How answers come about.

    Attributes:
        folds: of each split; a sentence and its repetitions are in one fold.
        splits: ways to split, each with models of its own.
        recipe: how the models are trained; seeds are counted on from its.
    """

    folds: int
    splits: int
    recipe: Recipe

    def answers(self, workload_of: WorkloadOf, folder: Path) -> Answers:
        """Of all training sentences; what was found is kept in `folder`, fold by fold.

        Raises:
            ValueError: a fold holds no sentence.
        """
        found: dict[Sentence, list[Tensor]] = {}
        for split in range(self.splits):
            for fold in range(self.folds):
                path = folder / f"split{split}-fold{fold}of{self.folds}.pt"
                if not path.is_file():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    torch.save(self._answers(workload_of, split, fold), path)
                for sentence, logits in torch.load(path).items():
                    found.setdefault(sentence, []).append(logits.log_softmax(-1))
        return Answers({s: torch.logsumexp(torch.stack(all_), 0) for s, all_ in found.items()})

    def _answers(self, workload_of: WorkloadOf, split: int, fold: int) -> dict[Sentence, Tensor]:
        """Of the sentences of one fold, by a model that is trained on the others."""
        seed = self.recipe.seed + self.folds * split + fold
        workload = workload_of(seed)
        train = cast("Sentences", workload.train)
        inside = [self.fold_of(tokens, split) == fold for tokens in train.tokens]
        seen = [i for i, held in enumerate(inside) if not held]
        held_out = [i for i, held in enumerate(inside) if held]
        if not held_out or not seen:
            count = len({tuple(tokens) for tokens in train.tokens})
            raise ValueError(
                f"fold {fold} of split {split} holds {'all' if held_out else 'none'} of {count} "
                f"sentences: take {'more' if held_out else 'fewer'} than {self.folds} folds"
            )
        model = copy.deepcopy(workload.model)
        recipe = replace(self.recipe, seed=seed)
        label = f"{workload.name} split {split} without fold {fold}"
        training.fine_tune(model, part(train, seen), recipe, label)
        return dict(answered(model, part(train, held_out)))

    def fold_of(self, tokens: list[int], split: int) -> int:
        """The fold of a sentence, which its tokens tell."""
        return zlib.crc32(f"{split}{tokens}".encode()) % self.folds


def part(sentences: Sentences, indices: list[int]) -> Sentences:
    """Some of the sentences."""
    tokens = [sentences.tokens[i] for i in indices]
    return Sentences(tokens, [sentences.labels[i] for i in indices], sentences.padding)


@torch.no_grad()
def answered(model: nn.Module, sentences: Sentences) -> Iterator[tuple[Sentence, Tensor]]:
    """Each sentence and its logits `[C]`."""
    for batch in batches(sentences, 64):
        logits = model(**training.to_device(batch, model)).logits
        yield from zip(sentences_of(batch), logits.float().cpu(), strict=True)


def sentences_of(batch: Batch) -> list[Sentence]:
    """What is in a batch, without padding."""
    lengths = batch["attention_mask"].sum(1).tolist()
    rows = batch["input_ids"].tolist()
    return [tuple(row[:length]) for row, length in zip(rows, lengths, strict=True)]
