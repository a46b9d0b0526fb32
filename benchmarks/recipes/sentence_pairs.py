"""MNLI and QQP: pairs of sentences in classes."""

# datasets, scikit-learn and transformers annotate themselves in part only.
# pyright: reportMissingTypeStubs=false, reportUnknownParameterType=false

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from transformers import AutoModelForSequenceClassification

from benchmarks.recipes.data import check_texts
from benchmarks.recipes.task import Array, Outputs, Task, Validation, percent


@dataclass(frozen=True)
class SentencePairs(Task):
    """Two sentences, one class.

    Attributes:
        with_f1: whether the F1 of class 1 is a figure beside the accuracy.
    """

    with_f1: bool = False

    @property
    def model_class(self) -> Any:
        return AutoModelForSequenceClassification

    @property
    def sentences(self) -> tuple[str, str]:
        """The columns of the two sentences."""
        return self.columns[0], self.columns[1]

    def check(self, rows: Any, source: str) -> None:
        check_texts(rows, self.sentences, source)
        found = rows.unique("label")
        if not set(found) <= set(range(len(self.classes))):
            labels = ", ".join(f"{number} ({name})" for number, name in enumerate(self.classes))
            raise ValueError(
                f"{source} has the labels {', '.join(sorted(map(str, found)))}. "
                f"The task {self.name} has {labels}; leave other rows out."
            )

    def training_features(
        self, rows: Any, tokenizer: Any, max_length: int, stride: int | None
    ) -> Any:
        options = {"tokenizer": tokenizer, "columns": self.sentences, "max_length": max_length}
        kept = [name for name in rows.column_names if name != "label"]
        features = rows.map(tokenized, batched=True, fn_kwargs=options, remove_columns=kept)
        return features.rename_column("label", "labels")

    def validation(
        self, split: str, rows: Any, tokenizer: Any, max_length: int, stride: int | None
    ) -> Validation:
        features = self.training_features(rows, tokenizer, max_length, stride)
        suffix = split.removeprefix("validation")
        score = partial(self.score, labels=np.asarray(rows["label"]), suffix=suffix)
        return Validation(features, ("logits",), score)

    def score(self, outputs: Outputs, labels: Array, suffix: str) -> dict[str, float]:
        """Accuracy, and F1 where the task has it, under names that end in `suffix`."""
        from sklearn.metrics import accuracy_score, f1_score

        predicted = np.stack(outputs["logits"]).argmax(-1)
        found = {f"accuracy{suffix}": percent(float(accuracy_score(labels, predicted)))}
        if self.with_f1:
            options: dict[str, Any] = {"zero_division": 0.0}  # where class 1 is never predicted
            found[f"f1{suffix}"] = percent(float(f1_score(labels, predicted, **options)))
        return found


def tokenized(
    batch: dict[str, Any], tokenizer: Any, columns: tuple[str, str], max_length: int
) -> Any:
    """Pairs of sentences as token ids, cut to `max_length`, the longer one first."""
    first, second = columns
    return tokenizer(batch[first], batch[second], truncation=True, max_length=max_length)


MNLI = SentencePairs(
    name="mnli",
    hub="nyu-mll/glue",
    subset="mnli",
    columns=("premise", "hypothesis", "label"),
    validations=("validation_matched", "validation_mismatched"),
    classes=("entailment", "neutral", "contradiction"),
)
QQP = SentencePairs(
    name="qqp",
    hub="nyu-mll/glue",
    subset="qqp",
    columns=("question1", "question2", "label"),
    validations=("validation",),
    classes=("not_duplicate", "duplicate"),
    with_f1=True,
)
