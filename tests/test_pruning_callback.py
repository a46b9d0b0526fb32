"""PruningCallback in a Trainer of one's own, and the errors it makes."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

import mvpfx
from mvpfx.hf import PruningCallback, separate_scores
from mvpfx.manifest import verify_checkpoint
from mvpfx.pruning_callback import density
from mvpfx.scheduler import masks_of
from tests.small_run import raises
from tests.trainers import PRUNED, arguments, examples, logged, model, of, same_state

SHORT: dict[str, Any] = {"max_steps": 6, "save_steps": 3, "eval_strategy": "no"}
REMEDY = (
    "Make it with torch.optim.AdamW(mvpfx.parameter_groups(model, lr=...)), or return "
    "mvpfx.hf.separate_scores(super().create_optimizer(), self.model) from create_optimizer of "
    "your Trainer."
)
SITE = "bert.encoder.layer.0.attention.self.query.weight"


class Own(Trainer):
    """Somebody's Trainer, as the documentation has it."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        return separate_scores(super().create_optimizer(*args, **kwargs), of(self))


def own_trainer(folder: Path, seed: int | None = None, **changed: Any) -> Own:
    data: Any = examples("BERT")
    student = mvpfx.prepare(model("BERT", seed), PRUNED)
    values = arguments(folder, **{**SHORT, **changed})
    return Own(student, values, train_dataset=data, callbacks=[PruningCallback()])


@pytest.mark.parametrize("restore", [False, True])
def test_a_trainer_of_ones_own_prunes_and_resumes(
    restore: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = own_trainer(tmp_path)
    run.train()
    assert logged(run, "density")[6] == pytest.approx(0.2, abs=1e-2)
    assert "'density': '0.2" in capsys.readouterr().out
    resumed = own_trainer(tmp_path, seed=1, restore_callback_states_from_checkpoint=restore)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_state(of(run), of(resumed))
    for what in ("loss", "density"):
        assert logged(run, what) == logged(resumed, what)
    manifest = verify_checkpoint(tmp_path / "checkpoint-6")
    assert (manifest.writer, manifest.step) == ("callback", 6)
    dense = model("BERT", 2)
    mvpfx.load_checkpoint(tmp_path / "checkpoint-6", dense)
    assert same_state(dense, of(run))
    assert density(masks_of(dense)) == logged(run, "density")[6]


def test_the_callback_is_used_once_in_a_pruning_trainer(tmp_path: Path) -> None:
    own = PruningCallback()
    trainer = mvpfx.hf.PruningTrainer(model("BERT"), arguments(tmp_path, **SHORT), callbacks=[own])
    assert trainer.pruning is own
    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, PruningCallback)]
    assert found == [own]


def test_an_optimizer_that_does_not_learn_the_scores_is_refused(tmp_path: Path) -> None:
    data: Any = examples("BERT")
    student = mvpfx.prepare(model("BERT"), PRUNED)
    weights = [p for name, p in student.named_parameters() if "scores" not in name]
    scores = [p for name, p in student.named_parameters() if "scores" in name]
    missing = f"the optimizer does not have the scores of {SITE}, so its mask would never move. "
    shared = (
        f"the scores of {SITE} share their parameter group with weights, or decay: they need a "
        "learning rate of their own and no weight decay. "
    )
    decayed = [{"params": weights}, {"params": scores, "weight_decay": 0.01}]
    cases: list[tuple[Any, str]] = [
        (torch.optim.SGD(weights), missing + REMEDY),
        (torch.optim.SGD(student.parameters()), shared + REMEDY),
        (torch.optim.SGD(decayed), shared + REMEDY),
        (None, shared + REMEDY),
    ]
    for optimizer, message in cases:
        trainer = Trainer(
            student,
            arguments(tmp_path, **SHORT),
            train_dataset=data,
            callbacks=[PruningCallback()],
            optimizers=(optimizer, None),
        )
        with raises(message):
            trainer.train()


def test_a_model_that_is_not_prepared(tmp_path: Path) -> None:
    data: Any = examples("BERT")
    trainer = Trainer(
        model("BERT"),
        arguments(tmp_path, **SHORT),
        train_dataset=data,
        callbacks=[PruningCallback()],
    )
    with raises(
        "BertForSequenceClassification has no masks to schedule. "
        "Call mvpfx.prepare(model) before SparsityScheduler(model, ...); where its matmuls are "
        "functional, with example_inputs=."
    ):
        trainer.train()


def test_a_checkpoint_from_before_the_callback(tmp_path: Path) -> None:
    data: Any = examples("BERT")
    values = arguments(tmp_path, **SHORT)
    Trainer(model("BERT"), values, train_dataset=data).train()
    trainer = own_trainer(tmp_path)
    folder = tmp_path / "checkpoint-3"
    (folder / "optimizer.pt").unlink()
    with raises(
        "the checkpoint of step 3 was saved without PruningCallback, so scores and schedule of the "
        "run are not in it. Resume from a checkpoint that was saved with it."
    ):
        trainer.train(resume_from_checkpoint=str(folder))


def test_scores_are_moved_to_their_own_group_before_the_first_step() -> None:
    student = mvpfx.prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1.0, weight_decay=0.1)
    assert separate_scores(optimizer, student, 0.5) is optimizer
    first, second = optimizer.param_groups
    assert len(first["params"]) == 4
    assert (len(second["params"]), second["lr"], second["weight_decay"]) == (2, 0.5, 0.0)
    student(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    with raises(
        "the optimizer has taken steps already, and its state belongs to its groups. "
        "Call separate_scores right after the optimizer is made."
    ):
        separate_scores(optimizer, student)


@pytest.mark.parametrize(
    "kind", [torch.optim.Adagrad, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD]
)
def test_state_from_the_start_is_no_step(kind: Any) -> None:
    student = mvpfx.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    optimizer = separate_scores(kind(student.parameters(), lr=0.1), student, 0.5)
    scores = [p.clone() for p in optimizer.param_groups[1]["params"]]
    student(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    pairs = zip(optimizer.param_groups[1]["params"], scores, strict=True)
    assert [bool((now != then).any()) for now, then in pairs] == [True, True]
    with (
        raises(
            "the optimizer has taken steps already, and its state belongs to its groups. "
            "Call separate_scores right after the optimizer is made."
        )
        if kind is not torch.optim.SGD
        else nullcontext()
    ):
        separate_scores(optimizer, student)
