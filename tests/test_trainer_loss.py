"""What PruningTrainer adds to the loss: once per optimizer step, in training only."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

import mvpfx
from tests.small_run import raises
from tests.trainers import arguments, examples, logged, model, of, pruning_trainer, still

SOFT = mvpfx.PruningConfig(
    criterion="soft_movement",
    threshold=0.4,
    penalty_lambda=3.0,
    schedule=mvpfx.LinearSchedule(0, 0),
)
TAUGHT = mvpfx.Distillation(temperature=2.0, task_weight=0.3, logit_weight=0.7, hidden_weight=0.2)
QUIET: dict[str, Any] = {"save_strategy": "no", "eval_strategy": "no", "max_steps": 4}
PLAIN: dict[str, Any] = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def trained(name: str, folder: Path, batch: int, declared: bool | None, options: Any) -> nn.Module:
    """A model after four steps of four examples, in batches of `batch`, without dropout."""
    student = mvpfx.prepare(still(model(name)), SOFT)
    if declared is not None:
        student.__dict__["accepts_loss_kwargs"] = declared
    changed = {
        **QUIET,
        **PLAIN,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 4 // batch,
    }
    trainer = pruning_trainer(name, folder, prepared=student, options=options, **changed)
    trainer.train()
    assert "penalty" in trainer.state.log_history[0]
    return student


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize(("name", "declared"), [("Llama", None), ("BERT", False)])
def test_accumulated_batches_are_one_batch(
    name: str, declared: bool | None, taught: bool, tmp_path: Path
) -> None:
    # Not the hidden states: their means are over positions, and rows differ in padding.
    distillation = replace(TAUGHT, hidden_weight=0.0)
    options = {"teacher": model(name, 5), "distillation": distillation} if taught else {}
    whole = trained(name, tmp_path, 4, declared, options)
    parts = trained(name, tmp_path, 2, declared, options)
    for (key, one), two in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")


def test_the_loss_is_that_of_a_handwritten_loop(tmp_path: Path) -> None:
    """Label smoothing, penalty and teacher with hidden states, against plain torch."""
    data = examples("BERT", 8)
    teacher = still(model("BERT", 5))
    student = still(model("BERT"))
    own = copy.deepcopy(student)
    options: dict[str, Any] = {"teacher": teacher, "distillation": TAUGHT, "config": SOFT}
    changed = {**QUIET, **PLAIN, "max_steps": 2, "label_smoothing_factor": 0.1}
    trainer = mvpfx.hf.PruningTrainer(
        student,
        arguments(tmp_path, **changed),
        train_dataset=data,  # pyright: ignore[reportArgumentType]
        **options,
    )
    order: list[Tensor] = []
    student.register_forward_pre_hook(
        lambda module, args, kwargs: order.append(kwargs["input_ids"]), with_kwargs=True
    )
    trainer.train()

    mvpfx.prepare(own, SOFT)
    scheduler = mvpfx.SparsityScheduler(own, 2)
    groups = mvpfx.parameter_groups(own, lr=1e-3, weight_decay=0.0)
    optimizer = torch.optim.SGD(groups)
    rows = {tuple(row["input_ids"].tolist()): row for row in data}
    losses: list[float] = []
    for ids in order:
        chosen = [rows[tuple(row.tolist())] for row in ids]
        batch = {key: torch.stack([row[key] for row in chosen]) for key in chosen[0]}
        labels = batch.pop("labels")
        outputs = own(**batch, output_hidden_states=True)
        with torch.no_grad():
            target = teacher(**batch, output_hidden_states=True)
        task = nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.1)
        taught = mvpfx.distillation_loss(
            outputs, target, TAUGHT, labels=labels, attention_mask=batch["attention_mask"]
        )
        loss = TAUGHT.task_weight * task + taught + mvpfx.penalty(own)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    assert list(logged(trainer, "loss").values()) == pytest.approx(losses, abs=1e-5)
    for one, two in zip(of(trainer).parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_evaluation_is_of_the_task_alone(tmp_path: Path) -> None:
    data: Any = examples("BERT")
    student = mvpfx.prepare(model("BERT"), SOFT)
    options = {"teacher": model("BERT", 5), "distillation": TAUGHT}
    trainer = pruning_trainer("BERT", tmp_path, prepared=student, options=options, **QUIET)
    trainer.train()
    assert logged(trainer, "penalty")[4] > 0
    vanilla = Trainer(student, arguments(tmp_path), eval_dataset=data[:4])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(vanilla.evaluate()["eval_loss"])


def test_a_loss_of_ones_own_and_the_penalty(tmp_path: Path) -> None:
    def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return 0.0 * outputs.logits.sum()

    student = mvpfx.prepare(still(model("BERT")), SOFT)
    data: Any = examples("BERT")
    changed = {**QUIET, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = mvpfx.hf.PruningTrainer(
        student, arguments(tmp_path, **changed), train_dataset=data, compute_loss_func=own_loss
    )
    trainer.train()
    # The loss of a step is that before it, the penalty that after the step before.
    losses, penalties = logged(trainer, "loss"), logged(trainer, "penalty")
    assert losses[1] == 0
    assert [losses[i] for i in (2, 3, 4)] == pytest.approx([penalties[i] for i in (1, 2, 3)])


def test_multi_label_outputs_are_no_distribution(tmp_path: Path) -> None:
    student = model("BERT")
    student.config.problem_type = "multi_label_classification"  # pyright: ignore
    data: Any = [{**row, "labels": torch.tensor([0.0, 1.0])} for row in examples("BERT")]
    trainer = mvpfx.hf.PruningTrainer(
        student,
        arguments(tmp_path, **QUIET),
        train_dataset=data,
        teacher=model("BERT", 5),
    )
    with raises(
        "a teacher's distribution over classes is learned, and in multi-label classification there "
        "is none. Leave the teacher out, or override compute_loss."
    ):
        trainer.train()
