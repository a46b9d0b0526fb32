"""From a model to a saved, smaller one, for every model of the zoo.

CI runs all of it on the newest torch that can be installed, tested with or not.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import mvpfx
from tests.zoo import ZOO
from tests.zoo.entry import loss, output

pytestmark = pytest.mark.every_model
STEPS = 3


@pytest.mark.parametrize("name", ZOO)
def test_prepared_trained_converted_saved_and_loaded(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    model, batch = entry.model(), entry.batch(0)
    plain = copy.deepcopy(model)
    config = mvpfx.PruningConfig(criterion="magnitude", density=0.5)
    mvpfx.prepare(model.train(), config, example_inputs=batch)
    optimizer = torch.optim.SGD(mvpfx.parameter_groups(model, lr=1e-3))
    scheduler = mvpfx.SparsityScheduler(model, STEPS)
    for _ in range(STEPS):
        loss(model(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    masks = mvpfx.masks(model)
    kept, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    assert masks and abs(kept / total - 0.5) < 0.02
    with torch.no_grad():
        wanted = output(model.eval()(**batch))
        small = mvpfx.convert(model, example_inputs=batch)
        found = output(small(**batch))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4, equal_nan=True)
        mvpfx.save(small, tmp_path / "small")
        loaded = mvpfx.load(tmp_path / "small", None if entry.kind == "hf" else plain)
        assert torch.equal(output(loaded(**batch)).nan_to_num(), found.nan_to_num())
