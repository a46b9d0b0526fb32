"""Models of speech, and of images with text."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from tests.zoo.entry import COMPUTED, SHAPES, Batch, Entry, causal_text, classes, ids, text_batch
from tests.zoo.text import SIZES, TOKENS
from tests.zoo.vision import SIZES as IMAGE_SIZES
from tests.zoo.vision import images

_IMAGE, _IMAGE_START = 97, 96


def _clip() -> nn.Module:
    text = transformers.CLIPTextConfig(**SIZES, bos_token_id=1, eos_token_id=98)
    vision = transformers.CLIPVisionConfig(**IMAGE_SIZES)
    config = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16
    )
    return transformers.CLIPModel(config)


def _pairs(shape: int) -> Batch:
    sides = (16, 16, 24, 8)
    batch = {**text_batch(shape), "pixel_values": images(shape, sides), "return_loss": shape != 1}
    return {**batch, "interpolate_pos_encoding": True} if shape > 1 else batch


def _whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        **TOKENS,
        vocab_size=99,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config)


def _spoken(shape: int) -> Batch:
    sound = torch.randn(SHAPES[shape][0], 8, 32)
    return {"input_features": sound, "labels": ids(shape, (6, 4, 1, 9)[shape])}


def _wav2vec2() -> nn.Module:
    sizes = {key: value for key, value in SIZES.items() if key != "max_position_embeddings"}
    config = transformers.Wav2Vec2Config(
        **sizes,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
        layerdrop=0.0,
        classifier_proj_size=16,
    )
    return transformers.Wav2Vec2ForSequenceClassification(config)


def _waves(shape: int) -> Batch:
    return {
        "input_values": torch.randn(SHAPES[shape][0], (120, 75, 20, 200)[shape]),
        "labels": classes(shape),
    }


def _qwen_vl() -> nn.Module:
    text = {**SIZES, **TOKENS, "num_key_value_heads": 2}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2],
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "patch_size": 4,
        "temporal_patch_size": 1,
        "spatial_merge_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "in_channels": 3,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=_IMAGE,
        video_token_id=98,
        vision_start_token_id=_IMAGE_START,
        vision_end_token_id=95,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _described(shape: int) -> Batch:
    """An image of 4 tokens (8 in the last shape), then text."""
    batch = causal_text(shape)
    rows, wide = SHAPES[shape][0], 8 if shape == 3 else 4
    start = torch.full((rows, 1), _IMAGE_START)
    image = torch.full((rows, wide), _IMAGE)
    text = batch["input_ids"].clamp(max=94)
    input_ids = torch.cat([start, image, text], 1)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == _IMAGE).int(),
        "labels": input_ids,
        "pixel_values": torch.randn(rows * 4 * wide, 3 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, wide]] * rows),
    }


_CONVOLUTION = "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight"
SPEECH = (
    Entry("Whisper", "hf", _whisper, _spoken),
    Entry(
        "Wav2Vec2",
        "hf",
        _wav2vec2,
        _waves,
        misses=dict.fromkeys((f"{_CONVOLUTION}.original0", f"{_CONVOLUTION}.original1"), COMPUTED),
    ),
)
IMAGES_WITH_TEXT = (
    Entry("CLIP", "hf", _clip, _pairs),
    Entry("Qwen2.5-VL", "hf", _qwen_vl, _described, fallback="item returns a number"),
)
