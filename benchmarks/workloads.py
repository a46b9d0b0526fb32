"""What the benchmarks train on: a pretrained model, the task it is moved to, an input to time.

`digits` is embedded (scikit-learn's bundled images, a small vision transformer made here);
`sentences` reads a pretrained encoder and a text-classification task from folders.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownParameterType=false

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


class Split(Protocol):
    """Labelled examples that can be put together to a batch."""

    def __len__(self) -> int:
        """Count the examples."""
        ...

    def lengths(self) -> list[int]:
        """Tell how long each example is, so that those of like length share a batch."""
        ...

    def batch(self, indices: list[int]) -> Batch:
        """Keyword arguments of the model's forward, `labels` among them."""
        ...


@dataclass(frozen=True)
class Images:
    """Images of one shape."""

    pixels: Tensor  # [examples, channels, height, width]
    labels: Tensor  # [examples]

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self) -> list[int]:
        return [1] * len(self)

    def batch(self, indices: list[int]) -> Batch:
        return {"pixel_values": self.pixels[indices], "labels": self.labels[indices]}


@dataclass(frozen=True)
class Sentences:
    """Sentences as token ids, of differing length."""

    tokens: list[list[int]]
    labels: list[int]
    padding: int

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self) -> list[int]:
        return [len(tokens) for tokens in self.tokens]

    def batch(self, indices: list[int]) -> Batch:
        width = max(len(self.tokens[i]) for i in indices)
        ids = torch.full((len(indices), width), self.padding)
        attention = torch.zeros_like(ids)
        for row, i in enumerate(indices):
            ids[row, : len(self.tokens[i])] = torch.tensor(self.tokens[i])
            attention[row, : len(self.tokens[i])] = 1
        labels = torch.tensor([self.labels[i] for i in indices])
        return {"input_ids": ids, "attention_mask": attention, "labels": labels}


@dataclass(frozen=True)
class Workload:
    """A pretrained model, the task it is fine-tuned on, and the input whose latency counts."""

    name: str
    model: nn.Module
    train: Split
    test: Split
    timed: Batch  # without labels
    timed_as: str  # what `timed` is, for people
    pretraining: Split | None = None  # where the model still has to be pretrained
    dev: Split | None = None  # to choose settings on


def batches(split: Split, size: int, shuffle: random.Random | None = None) -> Iterator[Batch]:
    """Batches of examples of like length; with `shuffle`, in random order and composition."""
    order = list(range(len(split)))
    if shuffle:
        shuffle.shuffle(order)
    lengths = split.lengths()
    window = 50 * size if shuffle else len(order)
    groups: list[list[int]] = []
    for start in range(0, len(order), window):
        chunk = sorted(order[start : start + window], key=lengths.__getitem__)
        groups += [chunk[i : i + size] for i in range(0, len(chunk), size)]
    if shuffle:
        shuffle.shuffle(groups)
    for group in groups:
        yield split.batch(group)


def digits(*, seed: int) -> Workload:
    """Half of the digits to pretrain on (0 to 4), the other half (5 to 9) to move to.

    8 x 8 images in patches of 2 x 2; a vision transformer of 4 layers, width 128, 4 heads.
    """
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification

    bundled: Any = load_digits()
    order = torch.randperm(len(bundled.target), generator=torch.Generator().manual_seed(seed))
    pixels = torch.tensor(bundled.images / 16, dtype=torch.float32)[order, None]
    labels = torch.tensor(bundled.target)[order]
    old, new = labels < 5, labels >= 5
    held_out = int(0.3 * int(new.sum()))
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
    )
    config.num_labels = 5
    return Workload(
        name="digits, small ViT",
        model=ViTForImageClassification(config),
        pretraining=Images(pixels[old], labels[old]),
        train=Images(pixels[new][held_out:], labels[new][held_out:] - 5),
        test=Images(pixels[new][:held_out], labels[new][:held_out] - 5),
        timed={"pixel_values": pixels[:64]},
        timed_as="64 images",
    )


def sentences(
    model_folder: Path, data_folder: Path, *, seed: int, max_tokens: int, limit: int | None
) -> Workload:
    """A pretrained encoder and `sentence<TAB>label` files train.tsv and test.tsv, from folders.

    There may be a dev.tsv too. `limit` keeps the first examples of each file only. Timed is one
    sequence of 128 real tokens.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)

    def read(name: str) -> tuple[list[str], list[int]]:
        lines = read_lines(data_folder / name)[:limit]
        pairs = [line.rsplit("\t", 1) for line in lines]
        return [text for text, _ in pairs], [int(label) for _, label in pairs]

    def split(name: str) -> Sentences:
        texts, labels = read(name)
        tokens = cast(
            list[list[int]], tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
        )
        return Sentences(tokens, labels, tokenizer.pad_token_id)

    train, test = split("train.tsv"), split("test.tsv")
    torch.manual_seed(seed)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        model_folder, num_labels=max(train.labels) + 1, local_files_only=True
    )
    text = " ".join(read("test.tsv")[0][:64])
    timed: Any = tokenizer(text, truncation=True, max_length=128, return_tensors="pt")
    return Workload(
        name=f"{data_folder.name}, {model_folder.name}",
        model=model,
        train=train,
        test=test,
        timed={key: timed[key] for key in ("input_ids", "attention_mask")},
        timed_as=f"1 sequence of {timed['input_ids'].shape[1]} tokens",
        dev=split("dev.tsv") if (data_folder / "dev.tsv").is_file() else None,
    )


def read_lines(path: Path) -> list[str]:
    """Lines of a `sentence<TAB>label` file.

    Raises:
        FileNotFoundError: naming the file and the form that is needed.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. --data takes a folder with train.tsv and test.tsv, "
            "UTF-8, one example a line: sentence<TAB>label"
        )
    return path.read_text(encoding="utf-8").splitlines()
