"""Models of images: transformers and convolutional ones."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from tests.zoo.entry import Batch, Entry, classes

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
}
_BATCHES = (2, 1, 2, 3)


def images(shape: int, sides: tuple[int, int, int, int]) -> torch.Tensor:
    """Random images: two, one, and two or three of another size."""
    return torch.randn(_BATCHES[shape], 3, sides[shape], sides[shape])


def _patches(shape: int) -> Batch:
    batch: Batch = {"pixel_values": images(shape, (16, 16, 24, 8)), "labels": classes(shape)}
    return {**batch, "interpolate_pos_encoding": True} if shape > 1 else batch


def _pixels(shape: int) -> Batch:
    return {"pixel_values": images(shape, (32, 64, 48, 64)), "labels": classes(shape)}


def _vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES))


def _deit() -> nn.Module:
    return transformers.DeiTForImageClassification(transformers.DeiTConfig(**SIZES))


def _convnext() -> nn.Module:
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16, 16, 32], depths=[1, 2, 1, 1], image_size=32, drop_path_rate=0.1
    )
    return transformers.ConvNextForImageClassification(config)


def _resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 2, 1, 1]
    )
    return transformers.ResNetForImageClassification(config)


ENTRIES = (
    Entry("ViT", "hf", _vit, _patches),
    Entry("DeiT", "hf", _deit, _patches),
    Entry("ConvNeXt", "hf", _convnext, _pixels),
    Entry("ResNet", "hf", _resnet, _pixels),
)
