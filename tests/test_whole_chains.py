"""Of the zoo: models whose blocks are one chain, whatever way they write what tiles have."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch

import mvpfx
from mvpfx.kernels.library import LIBRARY, MISSING
from tests.test_fuse_tiles import call, chains_of_a_call, zeroed
from tests.zoo import ZOO

pytestmark = pytest.mark.skipif(LIBRARY is None, reason=MISSING)


@pytest.mark.parametrize(("name", "norms"), [("Qwen3", 4), ("Gemma 3", 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoders_with_norms_of_their_own_kind(name: str, norms: int, dtype: torch.dtype) -> None:
    """Norms of each head by itself, and norms whose weight is one more than their parameter."""
    model, batch = ZOO[name].model(), ZOO[name].batch(0)
    cast(Any, model).config.use_cache = False
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.normal_()
    model = zeroed(model).to(dtype)
    small = mvpfx.convert(model, example_inputs=batch, lowering="native")
    found, exact = call(small, batch).logits, call(copy.deepcopy(model).double(), batch).logits
    assert (found - exact).abs().max() <= (1e-5 if dtype is torch.float32 else 2e-2)
    _, (chain,) = chains_of_a_call(small, batch)
    kinds = [step.kind for step in chain.steps]
    blocks = cast(Any, model).config.num_hidden_layers
    assert [kinds.count(k) for k in ("attend", "normalize")] == [blocks, norms * blocks]


@pytest.mark.parametrize("name", ["GPT-2", "ALBERT", "ModernBERT"])
def test_attentions_of_all_blocks_are_in_one_chain(name: str) -> None:
    """Of models whose matmuls make queries, keys and values, or gates, at once, or which write out
    their activation.
    """
    model, batch = zeroed(ZOO[name].model()), ZOO[name].batch(0)
    if "use_cache" in cast(Any, model).config.to_dict():
        cast(Any, model).config.use_cache = False
    small = mvpfx.convert(model, example_inputs=batch, lowering="native")
    assert (call(small, batch).logits - call(model, batch).logits).abs().max() <= 1e-5
    _, chains = chains_of_a_call(small, batch)
    counts = [[step.kind for step in chain.steps].count("attend") for chain in chains]
    assert max(counts) == sum(counts) == 2
