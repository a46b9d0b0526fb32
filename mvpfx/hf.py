"""What needs transformers: a Trainer that prunes while it trains, a loader of old pruned models."""

# transformers annotates its Trainer in part only.
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_callback import ProgressCallback

from mvpfx.api import prepare
from mvpfx.checks import as_number
from mvpfx.config import PruningConfig
from mvpfx.distillation import Distillation, distillation_loss
from mvpfx.penalty import penalty
from mvpfx.pruned_folder import load_pruned
from mvpfx.pruning_callback import PruningCallback, separate_scores
from mvpfx.scheduler import masks_of
from mvpfx.state import find_state, mark_optimizer_built
from mvpfx.swap import original_class
from mvpfx.verified_trainer import VerifiedTrainer

__all__ = ["PruningCallback", "PruningTrainer", "load_pruned", "separate_scores"]


class PruningTrainer(VerifiedTrainer):
    """A Trainer that prunes: takes what `transformers.Trainer` takes, and what is below.

    - The model is prepared, if it is not yet.
    - The optimizer is the one that the arguments ask for, with a parameter group of its own for the
      scores. The learning-rate scheduler treats all groups alike, so warm-up and decay apply to
      `score_lr` too.
    - Gradients of weights are clipped to `max_grad_norm` as without pruning, those of scores by
      themselves; FSDP and DeepSpeed clip all of them together.
    - The masks move with every optimizer step; the schedule's fractions relate to all steps of the
      run. Logs and progress bar show the density.
    - In training, not in evaluation, the penalty of the criterion and what the teacher adds are
      part of the loss; under gradient accumulation they count once per optimizer step.
    - Checkpoints appear whole or not at all, are verified before they are resumed, and resume
      exactly. `from_pretrained` reads them, and finds the scores to be unexpected;
      `mvpfx.load_checkpoint(folder, model)` makes a dense model the pruned one.
    - With `load_best_model_at_end` the masks go back to where they were with the best weights.
      While the density falls the best is often an early, dense one: `eval_delay` in the arguments
      leaves those out.

    Args:
        model: to be trained, or already prepared; or use `model_init`.
        args: `TrainingArguments`.
        positional: further ones of `Trainer`, in its order.
        config: what to prune and how; `PruningConfig()` where it is None.
        score_lr: learning rate of the scores; 1e-2 in Sanh et al. 2020.
        teacher: a trained model with the same outputs, which is put into eval mode and not trained.
        distillation: temperature and weights; `Distillation()` where it is None.
        options: keyword arguments of `Trainer`.

    Raises:
        TypeError: if `score_lr` is no number.
        ValueError: if it is negative, the model was prepared with another configuration, or
            `distillation` comes without a teacher.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *positional: Any,
        config: PruningConfig | None = None,
        score_lr: float = 1e-2,
        teacher: nn.Module | None = None,
        distillation: Distillation | None = None,
        **options: Any,
    ) -> None:
        if as_number(score_lr, "score_lr") < 0:
            raise ValueError(f"score_lr must be at least 0; found {score_lr!r}.")
        if distillation is not None and teacher is None:
            raise ValueError("distillation= needs a teacher to learn from. Pass teacher= too.")
        if teacher is not None and teacher is model:
            raise ValueError(
                "the teacher is the model that is trained. "
                "Pass a copy that was fine-tuned before: teacher=copy.deepcopy(model)."
            )
        self.config, self.score_lr = config, score_lr
        self.distillation = distillation or Distillation()
        if model is not None:
            self._prepare(model)
        super().__init__(model, args, *positional, **options)
        if not any(isinstance(c, PruningCallback) for c in self.callback_handler.callbacks):
            self.add_callback(PruningCallback())
        self.teacher = teacher
        if teacher is not None:
            teacher.eval()
            if self.place_model_on_device:
                teacher.to(self.args.device)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As in `Trainer`; the new model is prepared."""
        return self._prepare(super().call_model_init(trial))

    def _prepare(self, model: nn.Module) -> nn.Module:
        state = find_state(model)
        if state is None or (state.report is not None and self.config is not None):
            return prepare(model, self.config)
        kind = original_class(model).__name__
        if state.report is not None:
            raise ValueError(
                f"{kind} was converted, and has no masks. To prune it further give config=; to "
                "train it on as it is use transformers.Trainer, after model.requires_grad_()."
            )
        if self.config is not None and state.config != self.config:
            raise ValueError(
                f"{kind} was prepared with another configuration than "
                "config=. Leave config out, or pass a model that is not prepared."
            )
        return model

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer of `Trainer`, with the scores in a group of their own.

        One that was given, as `optimizers=`, stays as it is.
        """
        given = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if not given:
            separate_scores(optimizer, self.trained, self.score_lr)
        mark_optimizer_built(self.trained)
        # Callbacks may be made anew when a checkpoint is resumed; they are complete by now.
        bars = (c for c in self.callback_handler.callbacks if isinstance(c, ProgressCallback))
        self.pruning.bars, self.pruning.seals = list(bars), False
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of `Trainer`; in training with what the teacher and the penalty add."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = dict(inputs)
        if self.teacher is not None and self.distillation.hidden_weight:
            batch["output_hidden_states"] = True
        given = dict(batch)
        loss, outputs = super().compute_loss(model, batch, True, num_items_in_batch)
        normalised = self._is_normalised(num_items_in_batch)
        if self.teacher is not None:
            share = self._share(inputs, num_items_in_batch) if normalised else 1.0
            taught = share * self._distilled(self.teacher, given, outputs)
            loss = self.distillation.task_weight * loss + taught
        batches = self.current_gradient_accumulation_steps if normalised else 1
        loss = loss + penalty(self.trained) / batches
        return (loss, outputs) if return_outputs else loss

    def _is_normalised(self, num_items_in_batch: Any) -> bool:
        """Whether the loss is one over all accumulated batches, and nothing divides it later."""
        declared = getattr(self, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return bool(declared)
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None

    def _share(self, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        """Which part of the step's labels are in this batch."""
        own: Any = self._get_num_items_in_batch([inputs], self.args.device)
        if own is None or num_items_in_batch is None:
            return 1 / self.current_gradient_accumulation_steps
        share = own / num_items_in_batch
        return share.flatten()[0] if isinstance(share, Tensor) else share

    def _distilled(self, teacher: nn.Module, batch: dict[str, Any], outputs: Any) -> Tensor:
        problem = getattr(getattr(self.model, "config", None), "problem_type", None)
        if problem == "multi_label_classification":
            raise ValueError(
                "a teacher's distribution over classes is learned, and in multi-label "
                "classification there is none. Leave the teacher out, or override compute_loss."
            )
        with torch.no_grad(), self.accelerator.autocast():
            taught = teacher(**batch)
        return distillation_loss(
            outputs,
            taught,
            self.distillation,
            labels=batch.get("labels"),
            attention_mask=batch.get("attention_mask"),
            shifted=self._shifts_labels(),
        )

    def _shifts_labels(self) -> bool:
        known = getattr(self, "_loss_shifts_labels", None)
        if known is not None:
            return bool(known)
        name = original_class(self.trained).__name__
        return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip weights as without pruning, and scores by themselves; returns the weights' norm."""
        scores, weights = self._grouped(model)
        if not scores:
            return super()._clip_grad_norm(model)
        limit = self.args.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(weights, limit)
        nn.utils.clip_grad_norm_(scores, limit)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        scores, weights = self._grouped(model)
        if grad_norm is None and scores:
            grad_norm = self.accelerator.clip_grad_norm_(weights, float("inf"))
        return super()._get_grad_norm(model, grad_norm)

    def _grouped(self, model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Scores and all else; no scores where an engine clips all that it shards as one."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return [], list(model.parameters())
        scores = [p for mask in masks_of(model) for p in mask.parameters()]
        known = {id(p) for p in scores}
        return scores, [p for p in model.parameters() if id(p) not in known]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, with the density, and the penalty where there is one."""
        if self.pruning.scheduler is not None:
            logs |= self.pruning.figures(self.trained)
        super().log(logs, *args, **kwargs)
