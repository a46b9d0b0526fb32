"""The toy zoo: small models with random weights, each with a batch to call it with."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

Batch = dict[str, Any]
Built = tuple[nn.Module, Batch]
ZOO: dict[str, Callable[[], Built]] = {}
BATCH, LENGTH = 2, 8
_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}


def build(name: str, seed: int = 0) -> Built:
    """The model and its batch; the same weights for the same seed. Biases are not zero."""
    torch.manual_seed(seed)
    model, batch = ZOO[name]()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model, batch


def entry(build_one: Callable[[], Built]) -> Callable[[], Built]:
    """Add a builder to the zoo under its own name."""
    ZOO[build_one.__name__] = build_one
    return build_one


def text_batch(**more: Any) -> Batch:
    """Token ids with a padded second row."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, -2:] = 0
    return {"input_ids": torch.randint(3, 99, (BATCH, LENGTH)), "attention_mask": mask, **more}


@entry
def bert() -> Built:
    config = transformers.BertConfig(**_TEXT)
    return transformers.BertForSequenceClassification(config), text_batch(
        labels=torch.tensor([0, 1])
    )


@entry
def roberta() -> Built:
    config = transformers.RobertaConfig(**_TEXT)
    return transformers.RobertaForSequenceClassification(config), text_batch(
        labels=torch.tensor([0, 1])
    )


@entry
def distilbert() -> Built:
    config = transformers.DistilBertConfig(
        vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64
    )
    return transformers.DistilBertForSequenceClassification(config), text_batch(
        labels=torch.tensor([0, 1])
    )


@entry
def vit() -> Built:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
    )
    images = torch.randn(BATCH, 3, 16, 16)
    return transformers.ViTForImageClassification(config), {
        "pixel_values": images,
        "labels": torch.tensor([0, 1]),
    }


@entry
def gpt2() -> Built:
    config = transformers.GPT2Config(
        vocab_size=99,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    batch = text_batch()
    return transformers.GPT2LMHeadModel(config), {**batch, "labels": batch["input_ids"]}


def _llama(use_cache: bool) -> Built:
    config = transformers.LlamaConfig(
        **_TEXT,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=use_cache,
    )
    batch = text_batch()
    return transformers.LlamaForCausalLM(config), {**batch, "labels": batch["input_ids"]}


@entry
def llama() -> Built:
    return _llama(use_cache=False)


@entry
def llama_cached() -> Built:
    return _llama(use_cache=True)


class FunctionalMLP(nn.Module):
    """Matmuls on raw parameters, in every functional form."""

    def __init__(self) -> None:
        super().__init__()

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * 0.1)

        self.up, self.up_bias = weight(32, 48), nn.Parameter(torch.randn(48))
        self.down, self.mix = weight(32, 48), weight(32, 32)
        self.flipped, self.bank = weight(32, 32), weight(3, 32, 32)
        self.layers = nn.ParameterList([weight(32, 32) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(x @ self.up + self.up_bias)
        h = F.linear(h, self.down)
        h = torch.einsum("bsi,ij->bsj", h, self.mix)
        h = torch.addmm(self.up_bias[:32], h.reshape(-1, 32), self.flipped.t()).view(*x.shape)
        h = torch.bmm(h.reshape(1, -1, 32).expand(3, -1, -1), self.bank).sum(0).view(x.shape)
        for weight in self.layers:
            h = torch.matmul(h, weight)
        return h


@entry
def functional_mlp() -> Built:
    return FunctionalMLP(), {"x": torch.randn(BATCH, LENGTH, 32)}


class Tied(nn.Module):
    """An output layer tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(99, 32)
        self.hidden = nn.Linear(32, 32)
        self.out = nn.Linear(32, 99, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.embedding(ids))))


@entry
def tied() -> Built:
    return Tied(), {"ids": torch.randint(0, 99, (BATCH, LENGTH))}


class Twice(nn.Module):
    """One linear layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(F.relu(self.shared(x))))


@entry
def twice() -> Built:
    return Twice(), {"x": torch.randn(BATCH, LENGTH, 32)}


class Attention(nn.Module):
    """torch's own attention, with its packed input projection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@entry
def attention() -> Built:
    return Attention(), {"x": torch.randn(BATCH, LENGTH, 32)}


@entry
def conv_net() -> Built:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    return model, {"input": torch.randn(BATCH, 3, 12, 12)}


@entry
def mlp() -> Built:
    model = nn.Sequential(
        nn.Linear(16, 64),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 4),
    )
    return model, {"input": torch.randn(BATCH, LENGTH, 16)}


def output(result: Any) -> Tensor:
    """The tensor a model is used for."""
    return result if isinstance(result, Tensor) else result.logits


def loss(result: Any) -> Tensor:
    """The model's own loss, else the mean square of its output."""
    own = getattr(result, "loss", None)
    return own if own is not None else output(result).float().pow(2).mean()
