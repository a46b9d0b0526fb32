"""PruningTrainer: vanilla where the masks are all ones, and exact when it is resumed."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import mvpfx
from mvpfx.mask import Mask
from mvpfx.swap import original_class
from tests.small_run import raises
from tests.trainers import (
    PRUNED,
    STEPS,
    arguments,
    examples,
    logged,
    metrics,
    model,
    of,
    pruning_trainer,
    same_state,
)
from tests.training import whole

pytestmark = pytest.mark.every_model
NAMES = ["BERT", "Llama", "ViT", "T5", "Whisper"]
TOLERANCE = 1e-5


def test_importing_mvpfx_does_not_import_transformers() -> None:
    code = (
        "import sys, mvpfx; assert 'transformers' not in sys.modules; "
        "print(mvpfx.hf.PruningTrainer.__name__, 'transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "PruningTrainer True\n"
    with raises("module 'mvpfx' has no attribute 'hg'", AttributeError):
        mvpfx.hg  # noqa: B018  # pyright: ignore


@pytest.mark.parametrize("name", NAMES)
def test_with_all_ones_masks_twenty_steps_are_those_of_vanilla(name: str, tmp_path: Path) -> None:
    data: Any = examples(name)
    changed: dict[str, Any] = {"save_strategy": "no", "weight_decay": 0.01}
    vanilla = Trainer(
        model(name),
        arguments(tmp_path, **changed),
        train_dataset=data,
        eval_dataset=data[:4],
    )
    vanilla.train()
    trainer = pruning_trainer(name, tmp_path, options={"config": whole()}, **changed)
    trainer.train()
    for what, steps in (("loss", STEPS), ("eval_loss", 2)):
        expected, found = logged(vanilla, what), logged(trainer, what)
        assert expected.keys() == found.keys()
        assert len(found) == steps
        assert list(found.values()) == pytest.approx(list(expected.values()), abs=TOLERANCE)
    assert set(logged(trainer, "density").values()) == {1.0}
    expected, found = (metrics(t.predict(data[:4]).metrics) for t in (vanilla, trainer))
    assert found["test_loss"] == pytest.approx(expected["test_loss"], abs=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_run(name: str, tmp_path: Path) -> None:
    run = pruning_trainer(name, tmp_path)
    run.train()
    resumed = pruning_trainer(name, tmp_path, seed=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert same_state(of(run), of(resumed))
    for what in ("loss", "grad_norm", "density", "eval_loss", "learning_rate"):
        assert logged(run, what) == logged(resumed, what)
    pairs = zip(masks(of(run)), masks(of(resumed)), strict=True)
    assert all(torch.equal(one.mask(), other.mask()) for one, other in pairs)

    loaded: Any = original_class(of(run))
    plain = loaded.from_pretrained(tmp_path / "checkpoint-20", config=of(run).config)
    dense = model(name)
    mvpfx.load_checkpoint(tmp_path / "checkpoint-20", dense)
    assert same_state(dense, of(run))
    own = {key: value for key, value in dense.state_dict().items() if "_mask.scores" not in key}
    assert all(torch.equal(value, own[key]) for key, value in plain.state_dict().items())


def masks(pruned: torch.nn.Module) -> list[Mask]:
    return [module for module in pruned.modules() if isinstance(module, Mask)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_density_follows_the_schedule_over_all_steps(accumulate: int, tmp_path: Path) -> None:
    changed: dict[str, Any] = {"gradient_accumulation_steps": accumulate, "save_strategy": "no"}
    trainer = pruning_trainer("BERT", tmp_path, **changed)
    trainer.train()
    units = sum(mask.units for mask in masks(of(trainer)))
    for step, found in logged(trainer, "density").items():
        asked = PRUNED.schedule(step, STEPS, 1.0, 0.2)
        assert found == pytest.approx(asked, abs=len(masks(of(trainer))) / units)
    optimizer: Any = trainer.optimizer
    group = optimizer.param_groups[-1]
    assert group["weight_decay"] == 0
    assert group["initial_lr"] == 1e-2
    assert {id(p) for p in group["params"]} == {id(m.scores) for m in masks(of(trainer))}


def test_logs_and_progress_bar_show_the_density(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed: dict[str, Any] = {"save_strategy": "no", "disable_tqdm": False, "max_steps": 10}
    pruning_trainer("BERT", tmp_path, **changed).train()
    printed = capsys.readouterr()
    assert "'density': '0.2" in printed.out + printed.err
    assert "density=0.2" in printed.err


def test_what_the_trainer_refuses(tmp_path: Path) -> None:
    bert = model("BERT")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"score_lr": -1.0}, ValueError, "score_lr must be at least 0; found -1.0."),
        ({"score_lr": "1"}, TypeError, "score_lr must be a number; found '1' (str)."),
        (
            {"distillation": mvpfx.Distillation()},
            ValueError,
            "distillation= needs a teacher to learn from. Pass teacher= too.",
        ),
        (
            {"teacher": bert},
            ValueError,
            "the teacher is the model that is trained. "
            "Pass a copy that was fine-tuned before: teacher=copy.deepcopy(model).",
        ),
    ]
    for options, error, message in cases:
        with raises(message, error):
            mvpfx.hf.PruningTrainer(bert, arguments(tmp_path), **options)
    mvpfx.prepare(bert)
    with raises(
        "BertForSequenceClassification was prepared with another configuration than config=. "
        "Leave config out, or pass a model that is not prepared."
    ):
        mvpfx.hf.PruningTrainer(bert, arguments(tmp_path), config=PRUNED)


def test_a_model_that_is_made_by_the_trainer_is_prepared(tmp_path: Path) -> None:
    data: Any = examples("BERT")
    trainer = mvpfx.hf.PruningTrainer(
        args=arguments(tmp_path, max_steps=4, save_strategy="no", eval_strategy="no"),
        model_init=lambda: model("BERT"),
        train_dataset=data,
        config=PRUNED,
    )
    trainer.train()
    assert logged(trainer, "density")[4] == pytest.approx(0.2, abs=1e-2)
