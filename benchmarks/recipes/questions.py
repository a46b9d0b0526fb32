"""SQuAD: an answer is a part of the context, which may be too long for one feature."""

# datasets, torchmetrics and transformers annotate themselves in part only.
# pyright: reportMissingTypeStubs=false, reportUnknownParameterType=false

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from transformers import AutoModelForQuestionAnswering

from benchmarks.recipes.answers import answer_tokens, best_answers
from benchmarks.recipes.data import check_texts
from benchmarks.recipes.task import Outputs, Task, Validation


@dataclass(frozen=True)
class Questions(Task):
    """A question, a context, and one or more answers that stand in it."""

    @property
    def model_class(self) -> Any:
        return AutoModelForQuestionAnswering

    def check(self, rows: Any, source: str) -> None:
        check_texts(rows, ("question", "context"), source)
        for number, answers in enumerate(rows["answers"]):
            if not isinstance(answers, dict) or not answers.get("text"):
                raise ValueError(
                    f"row {number} of {source} has {answers!r} as answers. The task {self.name} "
                    'needs one answer or more: {"text": ["..."], "answer_start": [0]}, where each '
                    "starts at this character of the context."
                )

    def training_features(
        self, rows: Any, tokenizer: Any, max_length: int, stride: int | None
    ) -> Any:
        options = {"tokenizer": tokenizer, "max_length": max_length, "stride": stride}
        columns = rows.column_names
        return rows.map(located, batched=True, fn_kwargs=options, remove_columns=columns)

    def validation(
        self, split: str, rows: Any, tokenizer: Any, max_length: int, stride: int | None
    ) -> Validation:
        options = {"tokenizer": tokenizer, "max_length": max_length, "stride": stride}
        features = rows.map(
            windows,
            batched=True,
            with_indices=True,
            fn_kwargs=options,
            remove_columns=rows.column_names,
        )
        score = partial(self.score, rows=rows, features=features)
        return Validation(features, ("start_logits", "end_logits"), score)

    def score(self, outputs: Outputs, rows: Any, features: Any) -> dict[str, float]:
        """Exact match and F1 of the best answers, as the official script computes them."""
        from torchmetrics.functional.text import squad

        texts = best_answers(
            list(rows["context"]),
            list(features["row"]),
            [np.asarray(starts) for starts in features["starts"]],
            [np.asarray(ends) for ends in features["ends"]],
            outputs["start_logits"],
            outputs["end_logits"],
        )
        found: Any = squad(
            [{"id": str(i), "prediction_text": text} for i, text in enumerate(texts)],
            [{"id": str(i), "answers": answers} for i, answers in enumerate(rows["answers"])],
        )
        return {name: round(float(found[name]), 3) for name in ("exact_match", "f1")}


def windows(
    batch: dict[str, Any],
    rows: list[int],
    tokenizer: Any,
    max_length: int,
    stride: int,
) -> dict[str, Any]:
    """Features of `max_length` tokens: the question, and as much of the context as fits in.

    Neighbouring ones of a context share `stride` tokens. `row` is where a feature comes from,
    `starts` and `ends` are the characters of the context that a token stands for, -1 for one that
    is not of the context.
    """
    found = tokenizer(
        [question.lstrip() for question in batch["question"]],
        batch["context"],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    offsets = found.pop("offset_mapping")
    inside = [found.sequence_ids(feature) for feature in range(len(offsets))]
    sources = found.pop("overflow_to_sample_mapping")
    both = [list(zip(*pair, strict=True)) for pair in zip(offsets, inside, strict=True)]
    return {
        **found,
        "row": [rows[source] for source in sources],
        "starts": [[o[0] if part == 1 else -1 for o, part in feature] for feature in both],
        "ends": [[o[1] if part == 1 else -1 for o, part in feature] for feature in both],
    }


def located(batch: dict[str, Any], tokenizer: Any, max_length: int, stride: int) -> dict[str, Any]:
    """Features with the first and last token of the first answer as labels.

    In a feature that does not hold the whole answer both are the first token, which is [CLS].
    """
    found = windows(batch, list(range(len(batch["context"]))), tokenizer, max_length, stride)
    labels: list[tuple[int, int]] = []
    columns = [found.pop(name) for name in ("row", "starts", "ends")]
    for row, starts, ends in zip(*columns, strict=True):
        answers = batch["answers"][row]
        begin = answers["answer_start"][0]
        end = begin + len(answers["text"][0])
        span = answer_tokens(np.asarray(starts), np.asarray(ends), begin, end)
        labels.append(span or (0, 0))
    return {
        **found,
        "start_positions": [first for first, _ in labels],
        "end_positions": [last for _, last in labels],
    }


SQUAD = Questions(
    name="squad",
    hub="rajpurkar/squad",
    subset=None,
    columns=("question", "context", "answers"),
    validations=("validation",),
)
