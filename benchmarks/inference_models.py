"""Models and zeros whose inference `benchmarks.cpu_inference` times: real shapes, random weights.

Three patterns, each at a density of the linears in the repeated blocks:

- `unstructured`: of every weight as many values as the density says, drawn at random;
- `blocks`: of every weight as many blocks;
- `hybrid`: of BERT's kin what `benchmarks.hybrid_latency` draws; of Llama 32 x 32 blocks in the
  attention and whole hidden units in the FFN.

At density 1 all are the same model, and the pattern is called `dense`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import hybrid_latency
from benchmarks.hybrid_latency import Shape, blocks, drawn

DENSE = "dense"
PATTERNS = ("unstructured", "blocks", "hybrid")


@dataclass(frozen=True)
class Model:
    """A shape, and whether it is an encoder with a classifier or a decoder."""

    shape: Shape
    decoder: bool = False


MODELS = {
    "bert": Model(Shape()),
    "minilm": Model(Shape(layers=6, hidden=384, ffn=1536)),
    "llama": Model(Shape(layers=6, hidden=512, heads=8, ffn=1376, vocabulary=32000), decoder=True),
}
FOR_PEOPLE = {"bert": "BERT-base", "minilm": "MiniLM-L6", "llama": "small Llama"}


def build(model: Model) -> nn.Module:
    """The dense model in float32 and eval mode; the same weights each time."""
    return dense_llama(model.shape) if model.decoder else hybrid_latency.dense_bert(model.shape)


def dense_llama(shape: Shape, seed: int = 0) -> nn.Module:
    """A causal language model with random weights, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**shape.config())).eval()


def tensors(model: Model, batch: int) -> dict[str, Tensor]:
    """Token ids without padding, and their mask, both `[batch, sequence]`."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.shape.vocabulary, (batch, model.shape.sequence), generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def settings(model: Model) -> dict[str, Any]:
    """What else the forward is called with: of a prompt the last token's scores are wanted, as
    `generate` asks for them, and no cache, which is no tensor.
    """
    return {"use_cache": False, "logits_to_keep": 1} if model.decoder else {}


def pruned_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of the repeated blocks, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if (".layer." in name or ".layers." in name) and isinstance(module, nn.Linear)
    }


def zeroed(
    dense: nn.Module, model: Model, pattern: str, density: float, block: tuple[int, int]
) -> nn.Module:
    """A copy of the dense model with zeros in a pattern.

    Raises:
        ValueError: a weight is not tiled by the blocks.
    """
    if pattern == "hybrid" and not model.decoder:
        return hybrid_latency.hybrid(dense, model.shape, density)
    found, random = copy.deepcopy(dense), torch.Generator().manual_seed(0)
    with torch.no_grad():
        if pattern == "hybrid":
            _hybrid_llama(found, model.shape, density, random)
        elif pattern != DENSE:
            for name, linear in pruned_linears(found).items():
                linear.weight *= _mask(name, linear.weight, pattern, density, block, random)
    return found


def _mask(
    name: str,
    weight: Tensor,
    pattern: str,
    density: float,
    block: tuple[int, int],
    random: torch.Generator,
) -> Tensor:
    if pattern == "unstructured":
        return drawn(tuple(weight.shape), density, random)
    rows, columns = weight.shape
    if rows % block[0] or columns % block[1]:
        raise ValueError(
            f"{name}.weight is {rows} x {columns}, which blocks of {block[0]} x {block[1]} do not "
            "tile. Give --block sizes that divide it, as in --block 4x4"
        )
    return blocks(weight, block, density, random)


def _hybrid_llama(llama: Any, shape: Shape, density: float, random: torch.Generator) -> None:
    block = (shape.block, shape.block)
    for layer in llama.model.layers:
        attention, ffn = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            linear.weight *= blocks(linear.weight, block, density, random)
        units = drawn((shape.ffn,), density, random)
        ffn.gate_proj.weight[~units] = 0
        ffn.up_proj.weight[~units] = 0
        ffn.down_proj.weight[:, ~units] = 0
