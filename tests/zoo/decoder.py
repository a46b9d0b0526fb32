"""Decoders, mixtures of experts, state-space models, and encoder-decoders of text."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from tests.zoo.entry import Entry, causal_text, translated_text
from tests.zoo.text import SIZES, TOKENS

_LLAMA: dict[str, Any] = {**SIZES, **TOKENS, "num_key_value_heads": 2, "head_dim": 8}


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=99,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA))


def _qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_LLAMA))


def _gemma2() -> nn.Module:
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**_LLAMA, sliding_window=4))


def _gemma3() -> nn.Module:
    config = transformers.Gemma3TextConfig(**_LLAMA, sliding_window=4)
    return transformers.Gemma3ForCausalLM(config)


def _mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def _qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **_LLAMA,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        decoder_sparse_step=1,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def _mamba2() -> nn.Module:
    config = transformers.Mamba2Config(
        **TOKENS,
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=8,
        expand=2,
        num_heads=4,
        head_dim=8,
        n_groups=1,
        chunk_size=4,
    )
    return transformers.Mamba2ForCausalLM(config)


def _falcon_h1() -> nn.Module:
    config = transformers.FalconH1Config(
        **_LLAMA,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=4,
    )
    return transformers.FalconH1ForCausalLM(config)


def _t5() -> nn.Module:
    options: dict[str, Any] = {"decoder_start_token_id": 0}
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **options
    )
    return transformers.T5ForConditionalGeneration(config)


def _bart() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
    )
    return transformers.BartForConditionalGeneration(config)


DECODERS = (
    Entry("GPT-2", "hf", _gpt2, causal_text),
    Entry("Llama", "hf", _llama, causal_text),
    Entry("Qwen3", "hf", _qwen3, causal_text),
    Entry("Gemma 2", "hf", _gemma2, causal_text),
    Entry("Gemma 3", "hf", _gemma3, causal_text),
)
MIXTURES = (
    Entry("Mixtral", "hf", _mixtral, causal_text),
    Entry("Qwen3-MoE", "hf", _qwen3_moe, causal_text),
)
STATE_SPACES = (
    Entry("Mamba2", "hf", _mamba2, causal_text),
    Entry("Falcon-H1", "hf", _falcon_h1, causal_text),
)
ENCODER_DECODERS = (
    Entry("T5", "hf", _t5, translated_text),
    Entry("BART", "hf", _bart, translated_text),
)
