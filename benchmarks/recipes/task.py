"""What a task is: its data, its model, and how the model's outputs are scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
Outputs = dict[str, list[Array]]
"""Output of a model -> one array for each feature."""


@dataclass(frozen=True)
class Validation:
    """A split that models are scored on.

    Attributes:
        features: what a model reads, as a `datasets.Dataset` with its inputs among the columns.
        outputs: the model's outputs that the score needs.
        score: makes figures of them, in percent.
    """

    features: Any
    outputs: Sequence[str]
    score: Callable[[Outputs], dict[str, float]]


@dataclass(frozen=True)
class Task(ABC):
    """One of the recipes.

    Attributes:
        name: as on the command line.
        hub: the data set's name on the hub.
        subset: which part of it, where it has several.
        columns: that are read; those of the hub.
        validations: splits that are scored. The one that is learned from is "train".
        classes: names of the classes in the order of their labels, where there are classes.
    """

    name: str
    hub: str
    subset: str | None
    columns: tuple[str, ...]
    validations: tuple[str, ...]
    classes: tuple[str, ...] = ()

    @property
    @abstractmethod
    def model_class(self) -> Any:
        """The class of transformers whose `from_pretrained` makes a model for the task."""

    @abstractmethod
    def check(self, rows: Any, source: str) -> None:
        """Make sure that the columns of a split hold what they should.

        Args:
            rows: a `datasets.Dataset` with all columns.
            source: what it was read from, for the message.

        Raises:
            ValueError: if not.
        """

    @abstractmethod
    def training_features(
        self, rows: Any, tokenizer: Any, max_length: int, stride: int | None
    ) -> Any:
        """What the model reads in training, labels included, and nothing else."""

    @abstractmethod
    def validation(
        self, split: str, rows: Any, tokenizer: Any, max_length: int, stride: int | None
    ) -> Validation:
        """What the model reads of a split, and how its outputs are scored."""


def percent(value: float) -> float:
    """A fraction in percent, as figures are published, with two more digits."""
    return round(100 * value, 3)
