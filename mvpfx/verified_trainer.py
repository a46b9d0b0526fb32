"""VerifiedTrainer: a Trainer whose checkpoints are whole, and verified before they are loaded.

Imports transformers, so nothing but `mvpfx.hf` imports this module.
"""

# transformers annotates its Trainer in part only.
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    get_last_checkpoint,
    rotate_checkpoints,
)

from mvpfx.manifest import Manifest, settled, take_place, verify_checkpoint
from mvpfx.model_state import read_scores, read_state, save_scores, split_scores
from mvpfx.pruning_callback import PruningCallback
from mvpfx.saved_config import check_config, read_config

_STAGING = ".saving"
_MODEL = ("model*.safetensors*", "adapter_*", "config.json", "pruning_*")
"""The files of a model; others in its folder may change while it stays."""


class VerifiedTrainer(Trainer):
    """What `PruningTrainer` does about checkpoints; what it trains is not its business."""

    _staged = False

    @property
    def trained(self) -> nn.Module:
        """The model, not None."""
        assert self.model is not None
        return self.model

    @property
    def pruning(self) -> PruningCallback:
        """The callback that moves the masks."""
        callbacks = self.callback_handler.callbacks
        return next(c for c in callbacks if isinstance(c, PruningCallback))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; a checkpoint is verified before anything is loaded from it.

        Raises:
            ValueError: a file of the checkpoint is missing, cut short, corrupted or foreign, or it
                is of another model, configuration or number of steps.
        """
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            folder = str(settled(Path(folder)))
            files = self._verified(folder).files
            if not any(name.startswith("optimizer") for name in files) and self._is_plain:
                raise ValueError(
                    f"{folder} has no state of the optimizer, so the run cannot go on exactly. Save"
                    " checkpoints with save_only_model=False, or load the model alone: "
                    "mvpfx.load_checkpoint(folder, model)."
                )
        return super().train(folder or resume_from_checkpoint, *args, **kwargs)

    def _verified(self, folder: str) -> Manifest:
        manifest = verify_checkpoint(folder)
        if manifest.writer == "loop":
            raise ValueError(
                f"{folder} was saved by mvpfx.save_checkpoint and has no state of a Trainer. Load "
                "it with mvpfx.load_checkpoint, or resume from a checkpoint of a Trainer."
            )
        check_config(self.trained, read_config(Path(folder), manifest), Path(folder))
        return manifest

    @property
    def _is_plain(self) -> bool:
        """Whether checkpoints hold the model's whole state, in files that are read here."""
        special = self.is_deepspeed_enabled or self.is_fsdp_enabled
        return not special and not hasattr(self.model, "peft_config")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        manifest = self._verified(resume_from_checkpoint)
        if self._is_plain:
            self.trained.load_state_dict(read_state(self.trained, folder, manifest))
            return
        scores = self._adapted_scores(folder)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.trained.load_state_dict(scores, strict=False)

    def _adapted_scores(self, folder: Path) -> dict[str, Tensor]:
        """The scores beside the adapters of PEFT, which saves nothing else of a model."""
        return read_scores(self.trained, folder) if hasattr(self.model, "peft_config") else {}

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        manifest = self._verified(best)
        if self._is_plain:
            self.trained.load_state_dict(read_state(self.trained, Path(best), manifest))
        else:
            scores = self._adapted_scores(Path(best))
            super()._load_best_model()
            self.trained.load_state_dict(scores, strict=False)
        assert self.pruning.scheduler is not None and manifest.schedule is not None
        self.pruning.scheduler.load_state_dict(manifest.schedule)

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return str(Path(run) / _STAGING) if self._staged else run

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write what `Trainer` writes into a hidden folder, and rename that when it is whole."""
        run = Path(self._get_output_dir(trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged = run / _STAGING / folder.name
        if self.args.should_save:
            shutil.rmtree(staged.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staged = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staged = False
        best_is_this = self.state.best_model_checkpoint == str(staged)
        if best_is_this:
            self.state.best_model_checkpoint = str(folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if best_is_this:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            self.pruning.seal(staged, self.trained, self.state.global_step, "trainer")
            take_place(staged, folder)
            shutil.rmtree(staged.parent, ignore_errors=True)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run), self.args.save_total_limit, best, use_mtime=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staged:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the model as `Trainer` does, its scores and its configuration beside it."""
        folder = Path(output_dir or str(self.args.output_dir))
        dense, scores = split_scores(
            self.trained.state_dict() if state_dict is None else state_dict
        )
        super()._save(str(folder), dense)
        if self.args.should_save:
            save_scores(scores, folder)
            if not self._staged:
                self.pruning.seal(folder, self.trained, self.state.global_step, "trainer", _MODEL)
