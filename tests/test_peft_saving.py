"""Checkpoints of models with both masks and adapters, and resuming from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mvpfx
from mvpfx.scheduler import refresh_weights
from tests.adapters import ORDERS, both, peft, train_scores, with_adapters
from tests.trainers import PRUNED, logged, of, pruning_trainer, same_state
from tests.training import assert_equal, whole
from tests.zoo import ZOO
from tests.zoo.entry import output


@pytest.mark.parametrize("order", ORDERS)
def test_a_checkpoint_holds_weights_adapters_and_scores(order: str, tmp_path: Path) -> None:
    model, batch = both(order).eval(), ZOO["BERT"].batch(0)
    mvpfx.save_checkpoint(tmp_path / "all", model, step=1)
    other = both(order).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    mvpfx.load_checkpoint(tmp_path / "all", other)
    refresh_weights(other)
    assert torch.equal(output(other(**batch)), output(model(**batch)))


@pytest.mark.parametrize("order", ORDERS)
def test_a_trainer_resumes_adapters_and_scores(order: str, tmp_path: Path) -> None:
    def model() -> Any:
        if order == "adapters first":
            return with_adapters(ZOO["BERT"].model())
        prepared = with_adapters(mvpfx.prepare(ZOO["BERT"].model(), PRUNED))
        train_scores(prepared)
        return prepared

    changed: dict[str, Any] = {"options": {"config": PRUNED}, "max_steps": 6, "save_steps": 3}
    changed["eval_strategy"] = "no"
    run = pruning_trainer("BERT", tmp_path, prepared=model(), **changed)
    run.train()
    other = model()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".lora_" in name or name.endswith(".scores"):
                parameter.zero_()
    resumed = pruning_trainer("BERT", tmp_path, prepared=other, **changed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_state(of(run), of(resumed))
    assert logged(run, "loss") == logged(resumed, "loss")
    assert logged(run, "density") == logged(resumed, "density")
    assert logged(run, "density")[6] == pytest.approx(0.2, abs=1e-2)


def test_save_pretrained_writes_the_adapters_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    both("adapters first").save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved and all(".lora_" in name for name in saved)
    again = peft.PeftModel.from_pretrained(
        mvpfx.prepare(ZOO["BERT"].model(), whole()), str(tmp_path)
    )
    wanted = with_adapters(ZOO["BERT"].model()).eval()
    batch = ZOO["BERT"].batch(0)
    assert_equal(output(again.eval()(**batch)), output(wanted(**batch)))
