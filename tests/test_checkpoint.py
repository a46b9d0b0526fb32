"""Checkpoints: exact when resumed, and refused where model or parts do not fit."""

import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import mvpfx
from mvpfx.checkpoint import Checkpoint
from mvpfx.random_state import random_states, restore_random_states
from mvpfx.saved_config import CONFIG
from tests.models import build, loss
from tests.small_run import Run, raises, same


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    run = Run()
    run.steps(3)
    return mvpfx.save_checkpoint(tmp_path / "checkpoint-3", run.model, **run.parts)


@pytest.mark.parametrize("name", ["mlp", "bert", "tied", "gpt2"])
def test_a_resumed_run_is_the_run(name: str, tmp_path: Path) -> None:
    run = Run(name)
    run.steps(4)
    folder = tmp_path / "checkpoint-4"
    mvpfx.save_checkpoint(folder, run.model, **run.parts, extra={"epoch": 2, "seen": torch.ones(2)})
    expected = run.steps(3)

    other = Run(name, seed=1)
    other.steps(1)
    found = mvpfx.load_checkpoint(folder, other.model, **other.parts)
    assert found.step == 4
    assert found.extra["epoch"] == 2
    assert torch.equal(found.extra["seen"], torch.ones(2))
    assert other.steps(3) == expected
    assert same(other.snapshot(), run.snapshot())


@pytest.mark.parametrize("name", ["mlp", "bert", "tied"])
def test_a_dense_model_becomes_the_saved_one(name: str, tmp_path: Path) -> None:
    run = Run(name)
    run.steps(5)
    mvpfx.save_checkpoint(tmp_path / "5", run.model, scheduler=run.scheduler)
    model, batch = build(name, seed=1)
    state = torch.get_rng_state()
    mvpfx.load_checkpoint(tmp_path / "5", model)
    assert torch.equal(torch.get_rng_state(), state)
    run.model.eval()
    model.eval()
    with torch.no_grad():
        assert torch.equal(loss(model(**batch)), loss(run.model(**batch)))
    assert mvpfx.sparsity_table(model) == mvpfx.sparsity_table(run.model)
    assert mvpfx.pruning_config(tmp_path / "5").density == 0.2


def test_a_model_that_is_not_prepared_and_wrappers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    mvpfx.save_checkpoint(tmp_path / "1", nn.DataParallel(model), step=1)
    other = nn.Sequential(nn.Linear(3, 3))
    assert mvpfx.load_checkpoint(tmp_path / "1", other) == Checkpoint(1, None)
    assert torch.equal(next(other.parameters()), next(model.parameters()))
    path = tmp_path / "1"
    with raises(f"{path} has no {CONFIG}: its model was not prepared."):
        mvpfx.pruning_config(path)
    prepared = mvpfx.prepare(nn.Sequential(nn.Linear(3, 3)))
    with raises(
        f"Sequential is prepared, and the model in {path} was not. "
        "Load it into a model that is not prepared."
    ):
        mvpfx.load_checkpoint(path, prepared)


def test_random_states_continue() -> None:
    states = random_states()
    numbers = [random.random(), np.random.rand(), torch.rand(2).tolist()]
    restore_random_states(states)
    assert [random.random(), np.random.rand(), torch.rand(2).tolist()] == numbers
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    message = (
        f"the checkpoint has the random states of {count + 1} GPUs and this machine has {count}, "
        "so random numbers on GPUs do not continue: the resumed run is not exact."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        restore_random_states({**states, "cuda": [torch.zeros(1)] * (count + 1)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore_random_states(states)


OTHERS: list[tuple[Callable[[], nn.Module], str]] = [
    (
        lambda: mvpfx.prepare(build("mlp")[0]),
        "Sequential was prepared with density=0.15, and the model in {0} with 0.2. Prepare it with "
        "mvpfx.pruning_config('{0}').",
    ),
    (
        lambda: nn.Sequential(nn.Linear(16, 64)),
        "{0} holds 3.bias, which Sequential does not have. Build the model as it was when saved.",
    ),
    (
        lambda: nn.Sequential(*build("mlp")[0].children(), nn.Linear(4, 4)),
        "{0} has no 6.weight, which Sequential needs. Build the model as it was when saved.",
    ),
    (
        lambda: nn.Sequential(nn.Linear(16, 8), *list(build("mlp")[0].children())[1:]),
        "0.weight is [64, 16] in {0} and [8, 16] in Sequential. "
        "Build the model as it was when saved.",
    ),
    (
        lambda: build("mlp")[0].double(),
        "0.weight is float32 in {0} and float64 in Sequential, so the run would not continue "
        "exactly. Build the model in float32.",
    ),
    (
        lambda: mvpfx.convert(build("mlp")[0]),
        "Sequential was made by mvpfx.convert, and {0} is of a model in training. Load it into the "
        "model that mvpfx.convert was given.",
    ),
]


@pytest.mark.parametrize("case", range(len(OTHERS)))
def test_another_model_is_refused_before_it_is_touched(case: int, saved: Path) -> None:
    build_other, message = OTHERS[case]
    model = build_other()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with raises(message.format(saved)):
        mvpfx.load_checkpoint(saved, model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_sites_that_the_other_model_does_not_have(tmp_path: Path) -> None:
    model, batch = build("functional_mlp")
    mvpfx.prepare(model, example_inputs=batch)
    folder = mvpfx.save_checkpoint(tmp_path / "1", model, step=1)
    other = mvpfx.prepare(build("functional_mlp")[0])
    with raises(
        f"{folder} holds bank_mask.scores, which FunctionalMLP does not have. Prepare the model as "
        "it was when saved: mvpfx.prepare(model, mvpfx.pruning_config(folder)), with "
        "example_inputs= if it was given then."
    ):
        mvpfx.load_checkpoint(folder, other)


def test_parts_that_do_not_fit(saved: Path) -> None:
    run = Run(seed=1)
    model = run.model
    before = run.snapshot()
    plain = torch.optim.AdamW(model.parameters())
    momentum = torch.optim.SGD(model.parameters())
    short = mvpfx.SparsityScheduler(model, 7)
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"optimizer": run.optimizer, "scheduler": run.scheduler},
            f"{saved} was saved with lr_scheduler=, and the run would not go on exactly without "
            "it. Pass it here too, or load the model alone.",
        ),
        (
            {**run.parts, "optimizer": plain},
            f"the optimizer has groups of [9] parameters, and the one in {saved} of [3, 3, 3]. "
            "Build it as it was when saved, after mvpfx.prepare.",
        ),
        (
            {**run.parts, "lr_scheduler": momentum},
            f"the lr_scheduler in {saved} has the state _get_lr_called_within_step, _is_initial, "
            "_last_lr, _step_count, base_lrs, end_factor, last_epoch, start_factor, total_iters, "
            "and this one param_groups, state. Build it as it was when saved.",
        ),
        (
            {**run.parts, "scheduler": short},
            "the saved run has total_steps=10, this one 7. "
            "Build SparsityScheduler(model, total_steps=10) to resume it.",
        ),
    ]
    short.load_state_dict({"step_count": 0, "total_steps": 7})
    for parts, message in cases:
        with raises(message):
            mvpfx.load_checkpoint(saved, model, **parts)
    alone = mvpfx.save_checkpoint(saved.parent / "4", model, step=4)
    with raises(
        f"{alone} was saved without optimizer=, so it cannot go on. "
        "Leave it out here, or load the model alone."
    ):
        mvpfx.load_checkpoint(alone, model, optimizer=plain)
    assert same(run.snapshot(), before)


def test_what_cannot_be_saved_is_refused_at_once(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with raises("save_checkpoint needs step=, the optimizer steps taken so far."):
        mvpfx.save_checkpoint(tmp_path / "1", model)
    with raises("step must be a whole number; found 1.0 (float).", TypeError):
        mvpfx.save_checkpoint(tmp_path / "1", model, step=1.0)  # pyright: ignore[reportArgumentType]
    with raises(
        "extra, or the state of optimizer or lr_scheduler, holds something other than plain data "
        "and tensors: torch.nn.modules.linear.Linear. Save its state_dict() or its values instead.",
        TypeError,
    ):
        mvpfx.save_checkpoint(tmp_path / "1", model, step=1, extra=model)
    stateful = Extra()
    with raises(
        "_extra_state in the state of Extra is a dict, and a checkpoint stores tensors. "
        "Keep it in extra= of save_checkpoint.",
        TypeError,
    ):
        mvpfx.save_checkpoint(tmp_path / "1", stateful, step=1)
    assert list(tmp_path.iterdir()) == []


class Extra(nn.Module):
    """A module that keeps more than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}


@pytest.mark.parametrize("prepared", [False, True])
def test_labels_are_those_of_the_checkpoint(prepared: bool, tmp_path: Path) -> None:
    def made(**labels: Any) -> Any:
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = BertConfig(vocab_size=9, intermediate_size=16, **small, **labels)
        return BertForSequenceClassification(config)

    names = {0: "no", 1: "yes"}
    model = made(id2label=names, label2id={"no": 0, "yes": 1})
    if prepared:
        mvpfx.prepare(model, density=0.5)
    mvpfx.save_checkpoint(tmp_path / "c-1", model, step=1)
    other = made(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
    mvpfx.load_checkpoint(tmp_path / "c-1", other)
    assert other.config.id2label == names and other.config.label2id == {"no": 0, "yes": 1}
    plain = made()
    mvpfx.save_checkpoint(tmp_path / "c-2", plain, step=1)
    mvpfx.load_checkpoint(tmp_path / "c-2", again := made(id2label=names))
    assert again.config.id2label == plain.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
