"""Encoders of text."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.zoo.entry import INPUT, Batch, Entry, classified_text, text_batch

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))


def _bert_qa() -> nn.Module:
    return transformers.BertForQuestionAnswering(transformers.BertConfig(**SIZES))


def _question_batch(shape: int) -> Batch:
    batch = text_batch(shape)
    rows, length = batch["input_ids"].shape
    if length == 1:  # one place to choose: the loss is zero, and all gradients with it
        return batch
    spots: Tensor = torch.arange(rows) % length
    return {**batch, "start_positions": spots, "end_positions": (spots + 1) % length}


def _roberta() -> nn.Module:
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SIZES))


def _distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64
    )
    return transformers.DistilBertForSequenceClassification(config)


def _electra() -> nn.Module:
    config = transformers.ElectraConfig(**SIZES, embedding_size=16)
    return transformers.ElectraForSequenceClassification(config)


def _albert() -> nn.Module:
    config = transformers.AlbertConfig(**SIZES, embedding_size=16)
    return transformers.AlbertForSequenceClassification(config)


def _deberta() -> nn.Module:
    options: dict[str, Any] = {
        "relative_attention": True,
        "position_biased_input": False,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 16,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
    }
    config = transformers.DebertaV2Config(**SIZES, **options)
    return transformers.DebertaV2ForSequenceClassification(config)


def _modernbert() -> nn.Module:
    options: dict[str, Any] = {
        "cls_token_id": 1,
        "sep_token_id": 2,
        "local_attention": 4,
        "global_attn_every_n_layers": 2,
    }
    config = transformers.ModernBertConfig(**SIZES, **TOKENS, **options)
    return transformers.ModernBertForSequenceClassification(config)


ENTRIES = (
    Entry("BERT", "hf", _bert, classified_text),
    Entry("BERT, questions", "hf", _bert_qa, _question_batch),
    Entry("RoBERTa", "hf", _roberta, classified_text),
    Entry("DistilBERT", "hf", _distilbert, classified_text),
    Entry("ELECTRA", "hf", _electra, classified_text),
    Entry("ALBERT", "hf", _albert, classified_text),
    Entry(
        "DeBERTa-v2",
        "hf",
        _deberta,
        classified_text,
        misses={"deberta.encoder.rel_embeddings.weight": INPUT},
    ),
    Entry("ModernBERT", "hf", _modernbert, classified_text),
)
