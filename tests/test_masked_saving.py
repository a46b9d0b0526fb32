"""`save_pretrained` of a prepared model: what plain transformers loads computes the same."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer

import mvpfx
from mvpfx.hf import PruningCallback
from mvpfx.scheduler import masks_of
from tests.models import build, output
from tests.test_masked_models import randomize
from tests.trainers import PRUNED, arguments, examples, of, pruning_trainer
from tests.trainers import model as zoo_model

NOW = mvpfx.ConstantSchedule()
FIELDS: dict[str, dict[str, Any]] = {
    "element": {"density": 0.3},
    "blocks": {"density": 0.5, "granularity": (4, 8)},
    "global": {"density": 0.3, "scope": "global"},
    "threshold": {"criterion": "soft_movement", "threshold": 0.6, "penalty_lambda": 1.0},
    "gates": {"criterion": "l0", "penalty_lambda": 1.0},
    "magnitude": {"density": 0.3, "criterion": "magnitude"},
}


def pruned(name: str, **fields: Any) -> tuple[Any, Any]:
    model, batch = build(name)
    mvpfx.prepare(model, mvpfx.PruningConfig(schedule=NOW, **fields), example_inputs=batch)
    if any(mask.scores is not None for mask in masks_of(model)):
        randomize(model)
        with torch.no_grad():
            for mask in masks_of(model):
                mask.require_scores().sub_(0.5).mul_(6)
    return model.eval(), batch


def outputs(model: nn.Module, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return output(model(**batch))


def assert_plain(folder: Path, model: Any, batch: Any) -> None:
    """What transformers loads, with nothing left over, computes what the prepared model does."""
    loaded, info = mvpfx.swap.original_class(model).from_pretrained(  # pyright: ignore[reportAttributeAccessIssue]
        folder, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(outputs(loaded.eval(), batch), outputs(model, batch))


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_masks_are_in_the_weights(fields: dict[str, Any], tmp_path: Path) -> None:
    model, batch = pruned("bert", **fields)
    raw = {name: value.clone() for name, value in model.state_dict().items()}
    model.train().save_pretrained(tmp_path)
    assert all(mask.training for mask in masks_of(model))
    assert_plain(tmp_path, model.eval(), batch)
    assert all(torch.equal(value, raw[name]) for name, value in model.state_dict().items())
    dense = outputs(build("bert")[0].eval(), batch)
    assert not torch.allclose(outputs(model, batch), dense)  # the masks do something


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("gpt2", "sharded"),
        ("llama", "state_dict="),
        ("vit", "masked state_dict="),
        ("distilbert", "positional"),
    ],
)
def test_other_ways_to_save(name: str, how: str, tmp_path: Path) -> None:
    model, batch = pruned(name, density=0.3)
    if how == "sharded":
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    elif how == "positional":
        model.save_pretrained(tmp_path, True, model.state_dict())
    elif how == "state_dict=":
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
    else:
        state = model.state_dict()
        masked = {n: state[n] * mask for n, mask in mvpfx.masks(model).items()}
        model.save_pretrained(tmp_path, state_dict={**state, **masked})
    assert_plain(tmp_path, model, batch)


def test_a_part_of_the_model(tmp_path: Path) -> None:
    model, _ = pruned("bert", density=0.3)
    model.bert.save_pretrained(tmp_path)
    loaded: Any = type(build("bert")[0]).from_pretrained(tmp_path)  # pyright: ignore
    for name, mask in mvpfx.masks(model).items():
        assert torch.equal(loaded.get_parameter(name) != 0, mask), name


def test_a_tied_weight_that_is_also_read_unmasked_is_refused(tmp_path: Path) -> None:
    model: Any = build("gpt2")[0]
    assert model.lm_head.weight is model.transformer.wte.weight
    mvpfx.prepare(model, density=0.3, schedule=NOW, overrides={"lm_head": {}})
    with pytest.raises(ValueError, match=r"is read as it is, and under another name with a mask"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("trainer", ["Trainer", "PruningTrainer"])
def test_checkpoints_have_raw_weights_and_saved_models_masked_ones(
    trainer: str, tmp_path: Path
) -> None:
    short: dict[str, Any] = {"max_steps": 6, "save_steps": 6, "eval_strategy": "no"}
    if trainer == "PruningTrainer":
        run: Any = pruning_trainer("BERT", tmp_path / "run", **short)
    else:
        model = mvpfx.prepare(zoo_model("BERT"), PRUNED)
        optimizer = torch.optim.AdamW(mvpfx.parameter_groups(model, lr=1e-3))
        data: Any = examples("BERT")
        run = Trainer(
            model, arguments(tmp_path / "run", **short), train_dataset=data,
            callbacks=[PruningCallback()], optimizers=(optimizer, None),
        )  # fmt: skip
    run.train()
    run.save_model(str(tmp_path / "model"))
    checkpoint = load_file(tmp_path / "run" / "checkpoint-6" / "model.safetensors")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    for name, mask in mvpfx.masks(of(run)).items():
        assert torch.equal(checkpoint[name], of(run).get_parameter(name)), name
        assert torch.equal(saved[name], checkpoint[name] * mask), name
        assert 0.1 < float(mask.float().mean()) < 0.9
    assert not any("_mask." in name for name in saved)
