"""Attention with fewer heads than its width has room for: what `nn.MultiheadAttention` refuses.

Shapes: `L` queries, `S` keys, `B` batch, `E` width of the model, `H` heads that are left, `D` width
of a head. Weights are as torch has them, with `H * D` rows or columns where it has `E`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from mvpfx.torch_private import canonical_mask, none_or_dtype

Masks = tuple[Tensor | None, bool]
"""A mask to be added, `[B or 1, H or 1, L, S]`, and whether the attention is causal without one."""


class ReducedAttention(nn.MultiheadAttention):
    """An `nn.MultiheadAttention` some of whose heads were removed.

    An instance is made by giving an `nn.MultiheadAttention` this class and smaller weights, so
    attributes, parameter names and the way it is called stay. Where attention weights are asked
    for, they are those of the heads that are left (averaged: zeros where none is).
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """Asked by torch's encoder layers, whose fused kernel takes no such weights."""
        return False

    def extra_repr(self) -> str:
        """Describe the attention as `print` shows it."""
        return f"embed_dim={self.embed_dim}, heads={self.num_heads} of {self.head_dim}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention` does; its documentation has the arguments.

        Raises:
            ValueError: a nested tensor comes with masks, or from elsewhere than self-attention; or
                a mask has a matrix for each head, and not as many as there are heads left.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            plain = key_padding_mask is None and attn_mask is None and not need_weights
            if not plain or query is not key or key is not value:
                raise ValueError(
                    "nested tensors are supported in self-attention without masks and weights; "
                    "pad them, and pass key_padding_mask."
                )
            return self._nested(query), None
        other = none_or_dtype(attn_mask)
        key_padding_mask = canonical_mask(
            key_padding_mask, "key_padding_mask", other, "attn_mask", query.dtype
        )
        attn_mask = canonical_mask(attn_mask, "attn_mask", None, "", query.dtype, False)
        turned = self.batch_first and query.dim() == 3
        if turned:
            query, key, value = _turned(query, key, value)
        out, weights = reduced_attention_forward(
            query, key, value, self.head_dim, self.num_heads, self.in_proj_weight,
            self.in_proj_bias, self.bias_k, self.bias_v, self.add_zero_attn, self.dropout,
            self.out_proj.weight, self.out_proj.bias, training=self.training,
            key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
            use_separate_proj_weight=self._parameters["in_proj_weight"] is None,
            q_proj_weight=self.q_proj_weight, k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight, average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )  # fmt: skip
        return (out.transpose(1, 0) if turned else out), weights

    def _nested(self, x: Tensor) -> Tensor:
        """Self-attention within sequences of several lengths, as on an encoder's fast path."""
        lengths = [part.shape[0] for part in x.unbind()]
        padded = x.to_padded_tensor(0.0)
        places = torch.arange(padded.shape[1], device=x.device)
        gone = places[None, :] >= torch.tensor(lengths, device=x.device)[:, None]
        out, _ = self.forward(padded, padded, padded, gone, need_weights=False)
        parts = [part[:length] for part, length in zip(out, lengths, strict=True)]
        return torch.nested.as_nested_tensor(parts)


def _turned(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs with their first two dimensions exchanged; what is one tensor stays one."""
    if key is not value:
        return query.transpose(1, 0), key.transpose(1, 0), value.transpose(1, 0)
    turned = query.transpose(1, 0)
    if query is key:
        return turned, turned, turned
    other = key.transpose(1, 0)
    return turned, other, other


def reduced_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_dim: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` where heads times their width is not the model's width.

    Args:
        query: `[L, B, E]`, or `[L, E]` where keys and values have no `B` either.
        key: `[S, B, ...]`.
        value: `[S, B, ...]`.
        head_dim: `D`, in the place of the width that torch's function checks.
        num_heads: `H`, which may be 0.
        in_proj_weight: `[3 * H * D, E]`, or None with separate ones among `options`.
        in_proj_bias: `[3 * H * D]`.
        bias_k: `[1, 1, H * D]`, one more key.
        bias_v: `[1, 1, H * D]`, its value.
        add_zero_attn: whether there is one more key, and value, of zeros.
        dropout_p: share of attention weights that are dropped in training.
        out_proj_weight: `[E, H * D]`.
        out_proj_bias: `[E]`.
        options: the other arguments of torch's function, by name.

    Returns:
        `[L, B, E]`, and weights `[B, L, S]` averaged over heads, or `[B, H, L, S]`, or None.

    Raises:
        ValueError: a mask has a matrix for each head, and not as many as there are heads left.
    """
    tensors = (query, key, value, in_proj_weight, in_proj_bias, bias_k, bias_v, out_proj_weight)
    arguments = (
        query, key, value, head_dim, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v,
        add_zero_attn, dropout_p, out_proj_weight, out_proj_bias,
    )  # fmt: skip
    if has_torch_function(tensors):
        return handle_torch_function(reduced_attention_forward, tensors, *arguments, **options)
    return _compute(arguments, options)


def _compute(arguments: Any, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """What `reduced_attention_forward` is asked for."""
    query, key, value, head_dim, num_heads, packed, bias, *more, weight, out_bias = arguments
    bias_k, bias_v, add_zero_attn, dropout_p = more
    padding, batched = options["key_padding_mask"], query.dim() == 3
    if not batched:
        query, key, value = _unsqueezed(query, key, value)
        padding = None if padding is None else padding.unsqueeze(0)
    separate = [options[f"{name}_proj_weight"] for name in "qkv"]
    weights = separate if packed is None else [*packed.chunk(3)]
    q, k, v = _project((query, key, value), packed, weights, bias)
    length, batch = q.shape[:2]
    if bias_k is not None:
        k = torch.cat([k, bias_k.expand(1, batch, -1)])
        v = torch.cat([v, bias_v.expand(1, batch, -1)])
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 0, 0, 1)), F.pad(v, (0, 0, 0, 0, 0, 1))
    # Written out, since -1 says nothing where no head is left.
    q, k, v = (
        t.view(t.shape[0], batch, num_heads, head_dim).permute(1, 2, 0, 3) for t in (q, k, v)
    )
    masks = _masks(options, padding, k.shape[2] - key.shape[0], (batch, num_heads), q.dtype)
    dropped = dropout_p if options["training"] else 0.0
    found, attended = _attend(q, k, v, masks, dropped, options["need_weights"])
    found = found.permute(2, 0, 1, 3).reshape(length, batch, num_heads * head_dim)
    out = F.linear(found, weight, out_bias)
    if attended is not None and options["average_attn_weights"]:
        attended = attended.sum(dim=1) / max(num_heads, 1)
    if not batched:
        out, attended = out.squeeze(1), None if attended is None else attended.squeeze(0)
    return out, attended


def _unsqueezed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs as a batch of one; what is one tensor stays one."""
    made = {id(tensor): tensor.unsqueeze(1) for tensor in (query, key, value)}
    return made[id(query)], made[id(key)], made[id(value)]


def _project(
    inputs: tuple[Tensor, Tensor, Tensor],
    packed: Tensor | None,
    weights: list[Tensor],
    bias: Tensor | None,
) -> list[Tensor]:
    """Queries, keys and values `[L, B, H * D]`; by one matmul where they are made of one input."""
    query, key, value = inputs
    if packed is not None and query is key and key is value:
        return [*F.linear(query, packed, bias).chunk(3, dim=-1)]
    biases = [None] * 3 if bias is None else [*bias.chunk(3)]
    return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]


def _masks(
    options: dict[str, Any], padding: Tensor | None, added: int, sizes: tuple[int, int], dtype: Any
) -> Masks:
    """Both masks in one that is added, with room for the `added` keys that no mask hides."""
    mask, causal = options["attn_mask"], bool(options["is_causal"])
    if causal and mask is None:
        raise ValueError("is_causal says what attn_mask holds, and needs it. Pass attn_mask too.")
    if causal and padding is None and not options["need_weights"]:
        return None, True
    padding = canonical_mask(padding, "key_padding_mask", none_or_dtype(mask), "attn_mask", dtype)
    mask = canonical_mask(mask, "attn_mask", None, "", dtype, False)
    if mask is not None and mask.dim() == 3:
        if mask.shape[0] != math.prod(sizes):
            raise ValueError(
                f"attn_mask has {mask.shape[0]} matrices, and a batch of {sizes[0]} with the "
                f"{sizes[1]} heads that are left needs {math.prod(sizes)}. Pass one for all heads."
            )
        mask = mask.view(*sizes, *mask.shape[1:])
    if padding is not None:
        mask = padding[:, None, None, :] + (0 if mask is None else mask)
    return (mask if mask is None else F.pad(mask, (0, added))), False


def _attend(
    q: Tensor, k: Tensor, v: Tensor, masks: Masks, dropped: float, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """What each head yields, `[B, H, L, D]`, and its weights `[B, H, L, S]` if asked for."""
    mask, causal = masks
    if q.shape[1] == 0 and not need_weights:
        return q, None
    if not need_weights:
        if mask is not None and mask.dim() == 2:
            mask = mask[None, None]
        return F.scaled_dot_product_attention(q, k, v, mask, dropped, causal), None
    weights = q * math.sqrt(1.0 / float(q.shape[-1])) @ k.transpose(-2, -1)
    weights = torch.softmax(weights if mask is None else weights + mask, dim=-1)
    weights = F.dropout(weights, p=dropped) if dropped > 0.0 else weights
    return weights @ v, weights
