"""Checkpoints of the Trainer: whole or absent, verified, and refused where they do not fit."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import mvpfx
from mvpfx.manifest import ADVICE, MANIFEST, verify_checkpoint
from mvpfx.mask import Mask
from tests.small_run import raises
from tests.test_manifest import cut, flip, remove
from tests.trainers import arguments, examples, logged, model, of, pruning_trainer, same_state

SHORT: dict[str, Any] = {"max_steps": 6, "save_steps": 3, "eval_strategy": "no"}
LONGER: dict[str, Any] = {**SHORT, "max_steps": 8}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    pruning_trainer("BERT", folder, **SHORT).train()
    return folder


@pytest.fixture
def saved(finished: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint of step 3."""
    return Path(shutil.copytree(finished / "checkpoint-3", tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("damage", [cut, flip, remove])
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.pt", "trainer_state.json", "pruning_scores.safetensors"],
)
def test_a_damaged_file_is_named_and_nothing_is_touched(
    name: str, damage: Any, saved: Path, tmp_path: Path
) -> None:
    message = damage(saved / name)
    trainer = pruning_trainer("BERT", tmp_path, **SHORT)
    before = {key: value.clone() for key, value in of(trainer).state_dict().items()}
    for resume in (True, str(saved)):
        with raises(message):
            trainer.train(resume_from_checkpoint=resume)
    after = of(trainer).state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_checkpoints_that_do_not_fit(finished: Path, tmp_path: Path) -> None:
    folder = finished / "checkpoint-3"
    options: dict[str, Any] = {"config": mvpfx.PruningConfig(density=0.3)}
    with raises(
        "BertForSequenceClassification was prepared with density=0.3, and the model in "
        f"{folder} with 0.2. Prepare it with mvpfx.pruning_config({str(folder)!r})."
    ):
        pruning_trainer("BERT", tmp_path, options=options, **SHORT).train(str(folder))
    with raises(
        "the saved run has total_steps=6, this one 8. "
        "Build SparsityScheduler(model, total_steps=6) to resume it."
    ):
        pruning_trainer("BERT", tmp_path, **LONGER).train(str(folder))
    loop = mvpfx.save_checkpoint(tmp_path / "checkpoint-1", mvpfx.prepare(model("BERT")), step=1)
    with raises(
        f"{loop} was saved by mvpfx.save_checkpoint and has no state of a Trainer. Load "
        "it with mvpfx.load_checkpoint, or resume from a checkpoint of a Trainer."
    ):
        pruning_trainer("BERT", tmp_path, **SHORT).train(str(loop))
    student = mvpfx.prepare(model("BERT"), mvpfx.pruning_config(folder))
    optimizer = torch.optim.AdamW(mvpfx.parameter_groups(student, lr=1e-3))
    with raises(
        f"{folder} was saved by transformers' Trainer, which resumes it: "
        f"trainer.train(resume_from_checkpoint={str(folder)!r}). Here it can be loaded into a "
        "model alone."
    ):
        mvpfx.load_checkpoint(folder, student, optimizer=optimizer)


def test_a_vanilla_checkpoint_is_refused(tmp_path: Path) -> None:
    data: Any = examples("BERT")
    Trainer(model("BERT"), arguments(tmp_path, **SHORT), train_dataset=data).train()
    folder = tmp_path / "checkpoint-6"
    with raises(
        f"{folder} has no {MANIFEST}, so it is no checkpoint that was saved whole. Pass a "
        "folder that mvpfx.save_checkpoint, PruningTrainer or PruningCallback wrote."
    ):
        pruning_trainer("BERT", tmp_path, **SHORT).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_the_optimizer_is_for_the_model_alone(tmp_path: Path) -> None:
    run = pruning_trainer("BERT", tmp_path, save_only_model=True, **SHORT)
    run.train()
    folder = tmp_path / "checkpoint-6"
    with raises(
        f"{folder} has no state of the optimizer, so the run cannot go on exactly. Save"
        " checkpoints with save_only_model=False, or load the model alone: "
        "mvpfx.load_checkpoint(folder, model)."
    ):
        pruning_trainer("BERT", tmp_path, **SHORT).train(resume_from_checkpoint=True)
    dense = model("BERT", 1)
    mvpfx.load_checkpoint(folder, dense)
    assert same_state(dense, of(run))


def test_a_save_that_is_interrupted_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Any, folder: str) -> None:
        assert os.listdir(folder)
        raise KeyboardInterrupt

    trainer = pruning_trainer("BERT", tmp_path, **SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == [".saving"]
    with raises(f"No valid checkpoint found in output directory ({tmp_path})"):
        trainer.train(resume_from_checkpoint=True)
    pruning_trainer("BERT", tmp_path, save_total_limit=1, **SHORT).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]
    assert verify_checkpoint(tmp_path / "checkpoint-6").step == 6


def test_the_best_model_has_the_masks_it_had(tmp_path: Path) -> None:
    scores = iter([1.0, 3.0, 2.0])

    def score(prediction: Any) -> dict[str, float]:
        return {"score": next(scores)}

    options = {"compute_metrics": score}
    changed: dict[str, Any] = {
        "max_steps": 9,
        "save_steps": 3,
        "eval_steps": 3,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "save_total_limit": 1,
    }
    run = pruning_trainer("BERT", tmp_path, options=options, **changed)
    run.train()
    best = tmp_path / "checkpoint-6"
    assert run.state.best_model_checkpoint == str(best)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]
    saved = model("BERT")
    mvpfx.load_checkpoint(best, saved)
    assert same_state(saved, of(run))
    pairs = zip(saved.modules(), of(run).modules(), strict=True)
    pairs = [(a, b) for a, b in pairs if isinstance(a, Mask) and isinstance(b, Mask)]
    assert all(a.density == b.density and torch.equal(a.mask(), b.mask()) for a, b in pairs)
    assert logged(run, "density")[9] < float(pairs[0][0].density or 0) < 1


def test_a_mixture_of_experts_resumes_under_its_own_names(tmp_path: Path) -> None:
    run = pruning_trainer("Mixtral", tmp_path, **SHORT)
    run.train()
    resumed = pruning_trainer("Mixtral", tmp_path, seed=1, **SHORT)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_state(of(run), of(resumed))


def test_a_saved_model_can_be_loaded_with_its_masks(tmp_path: Path) -> None:
    run = pruning_trainer("BERT", tmp_path, **SHORT)
    run.train()
    run.save_model(str(tmp_path / "model"))
    run.save_state()
    dense = model("BERT", 1)
    mvpfx.load_checkpoint(tmp_path / "model", dense)
    masks, state = mvpfx.masks(of(run)), dense.state_dict()
    for name, value in of(run).state_dict().items():
        assert torch.equal(state[name], value * masks.get(name, torch.tensor(1))), name
    assert mvpfx.sparsity_table(dense) == mvpfx.sparsity_table(of(run))
    message = (tmp_path / "model" / "model.safetensors").stat().st_size
    expected = cut(tmp_path / "model" / "model.safetensors")
    assert str(message) in expected
    assert expected.endswith(ADVICE)
    with raises(expected):
        mvpfx.load_checkpoint(tmp_path / "model", dense)
