"""Distillation: a teacher's outputs as a second target beside the labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvpfx.checks import as_number

IGNORED = -100
"""The label of what does not count towards a loss, as in torch and transformers."""
_STATES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")


@dataclass(frozen=True)
class Distillation:
    """How a teacher's outputs enter the loss.

    `task_weight * task loss + logit_weight * T^2 * KL(teacher || student)
    + hidden_weight * distance of hidden states`. The combination of the first two is that of
    Sanh et al. 2020, section 6, with the softened distributions of Hinton et al. 2014; their
    runs use 0.5 and 0.5, `T = 2`.

    Attributes:
        temperature: `T`, which both logits are divided by; the square keeps gradients as large.
        task_weight: of the loss on labels.
        logit_weight: of the divergence from the teacher's distribution.
        hidden_weight: of the distance between hidden states; 0 leaves them alone.
        hidden_loss: "mse", mean squared difference, or "cosine", 1 - cosine of each position.
        layers: pairs (student, teacher) of indices into hidden states, 0 being the embeddings.
            Without it the student's layers are spread evenly over the teacher's.

    Raises:
        TypeError: if a number is none, or `layers` are no pairs of whole numbers.
        ValueError: if one is out of range, or all weights are 0.
    """

    temperature: float = 2.0
    task_weight: float = 0.5
    logit_weight: float = 0.5
    hidden_weight: float = 0.0
    hidden_loss: str = "mse"
    layers: Sequence[tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        if as_number(self.temperature, "temperature") <= 0:
            raise ValueError(f"temperature must be above 0; found {self.temperature!r}.")
        weights = {n: getattr(self, n) for n in ("task_weight", "logit_weight", "hidden_weight")}
        for name, value in weights.items():
            if as_number(value, name) < 0:
                raise ValueError(f"{name} must be at least 0; found {value!r}.")
        if not any(weights.values()):
            raise ValueError("all weights of the distillation are 0, so there is nothing to learn.")
        if self.hidden_loss not in ("mse", "cosine"):
            raise ValueError(f'hidden_loss must be "mse" or "cosine"; found {self.hidden_loss!r}.')
        pairs: Sequence[Any] = self.layers or ()
        for pair in pairs:
            whole = [isinstance(index, int) and not isinstance(index, bool) for index in pair]
            if whole != [True, True]:
                raise TypeError(
                    "layers must be pairs of whole numbers, (student, teacher); "
                    f"found {pair!r} among them."
                )


def distillation_loss(
    student_outputs: Any,
    teacher_outputs: Any,
    distillation: Distillation | None = None,
    *,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    shifted: bool = False,
) -> Tensor:
    """What a teacher adds to the loss; the loss on labels is yours to add.

    `loss = d.task_weight * outputs.loss + distillation_loss(outputs, teacher_outputs, d, ...)`

    The divergence is over `logits`, or the mean of those over `start_logits` and `end_logits`. What
    does not count is left out: positions whose label is -100, else those that `attention_mask`
    pads. Multi-label outputs, which are no distribution, are not for this loss.

    Shapes: `[B]` rows, `[B, S]` positions, `[..., C]` classes, `[B, S, H]` hidden states.

    Args:
        student_outputs: a transformers output, or a mapping with the same keys.
        teacher_outputs: likewise, computed on the same batch without gradients.
        distillation: temperature and weights; `Distillation()` where it is None.
        labels: of the task, `[B]` or `[B, S]`; -100 does not count.
        attention_mask: `[B, S]`, 0 where padded; used where its shape is that of the positions.
        shifted: whether position `i` predicts label `i + 1`, as in causal language models.

    Returns:
        A float32 scalar: means over what counts in this batch. Like the loss, divide it by the
        number of batches where gradients are accumulated.

    Raises:
        ValueError: student and teacher outputs do not fit one another, or lack what is compared.
    """
    how = Distillation() if distillation is None else distillation
    student, teacher = _as_mapping(student_outputs), _as_mapping(teacher_outputs)
    total: Tensor | None = None
    if how.logit_weight:
        logits = _logit_term(student, teacher, how, labels, attention_mask, shifted)
        total = how.logit_weight * logits
    if how.hidden_weight:
        hidden = how.hidden_weight * _hidden_term(student, teacher, how, labels, attention_mask)
        total = hidden if total is None else total + hidden
    if total is None:
        tensors = (value for value in student.values() if isinstance(value, Tensor))
        total = torch.zeros((), device=next(tensors).device)
    return total


def _logit_term(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    how: Distillation,
    labels: Tensor | None,
    attention_mask: Tensor | None,
    shifted: bool,
) -> Tensor:
    if "start_logits" in student:
        ends = [_pair(student, teacher, name) for name in ("start_logits", "end_logits")]
        terms = [_spans(own, other, how.temperature, attention_mask) for own, other in ends]
        return torch.stack(terms).mean()
    own, other = _pair(student, teacher, "logits")
    if own.shape[-1] < 2:
        raise ValueError(
            f"logits are {list(own.shape)}: one class is no distribution to learn from. "
            "Distillation is for classification; leave the teacher out of a regression."
        )
    counts = _counting(own.shape[:-1], labels, attention_mask, shifted)
    divergence = _divergence(own, other, how.temperature)
    if counts is None:
        return divergence.mean()
    return divergence.masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1)


def _divergence(own: Tensor, other: Tensor, temperature: float) -> Tensor:
    """`T^2 * KL(softmax(other / T) || softmax(own / T))` over the last dim, in float32."""
    student = F.log_softmax(own.float() / temperature, dim=-1)
    teacher = F.log_softmax(other.detach().float() / temperature, dim=-1)
    # Where the teacher gives no probability at all (padding) there is nothing to learn.
    terms = torch.where(teacher == -torch.inf, 0.0, teacher.exp() * (teacher - student))
    return temperature**2 * terms.sum(-1)


def _spans(own: Tensor, other: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    """The mean over rows, of distributions over positions; padding takes no part in them."""
    if mask is not None and mask.shape == own.shape:
        lowest = torch.finfo(torch.float32).min
        own, other = (x.float().masked_fill(mask == 0, lowest) for x in (own, other))
    return _divergence(own, other, temperature).mean()


def _counting(
    shape: torch.Size, labels: Tensor | None, attention_mask: Tensor | None, shifted: bool
) -> Tensor | None:
    """Which rows or positions count, bool of `shape`; None for all of them."""
    if labels is not None and labels.shape == shape:
        counts = labels != IGNORED
        return F.pad(counts[..., 1:], (0, 1)) if shifted else counts
    if attention_mask is not None and attention_mask.shape == shape:
        counts = attention_mask != 0
        return F.pad(counts[..., 1:], (0, 1)) if shifted else counts
    return None


def _hidden_term(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    how: Distillation,
    labels: Tensor | None,
    attention_mask: Tensor | None,
) -> Tensor:
    """The mean over layers of the distance between their states."""
    terms: list[Tensor] = []
    for kind in (name for name in _STATES if student.get(name) is not None):
        if teacher.get(kind) is None:
            raise ValueError(
                f"the student has {kind} and the teacher has none. "
                "Call the teacher with output_hidden_states=True too."
            )
        own, other = student[kind], teacher[kind]
        counts = attention_mask
        if kind == "decoder_hidden_states":
            counts = None if labels is None else labels != IGNORED
        for i, j in _layers(how.layers, len(own), len(other), kind):
            terms.append(_distance(own[i], other[j], how.hidden_loss, counts, f"{kind}[{i}]"))
    if not terms:
        raise ValueError(
            "hidden_weight is above 0 and the student's outputs have no hidden states. "
            "Call both models with output_hidden_states=True."
        )
    return torch.stack(terms).mean()


def _layers(
    layers: Sequence[tuple[int, int]] | None, own: int, other: int, kind: str
) -> Iterator[tuple[int, int]]:
    """Pairs of indices: as told, else embeddings, last layers, and all between spread evenly."""
    for i, j in layers or ():
        if not (-own <= i < own and -other <= j < other):
            raise ValueError(
                f"layers has {(i, j)}, and the {kind} of student and teacher are {own} and {other} "
                "in number, the embeddings being number 0."
            )
    pairs = ((i, round(i * (other - 1) / max(own - 1, 1))) for i in range(own))
    yield from layers or pairs


def _distance(own: Tensor, other: Tensor, kind: str, counts: Tensor | None, name: str) -> Tensor:
    if own.shape != other.shape:
        raise ValueError(
            f"{name} is {list(own.shape)} in the student and {list(other.shape)} in the teacher. "
            "Hidden states are compared as they are, without a projection: take a teacher of the "
            "same width, or hidden_weight=0."
        )
    own, other = own.float(), other.detach().float()
    if kind == "cosine":
        distance = 1 - F.cosine_similarity(own, other, dim=-1)
    else:
        distance = (own - other).square().mean(-1)
    if counts is None or counts.shape != distance.shape:
        return distance.mean()
    weights = (counts != 0).to(distance.dtype)
    return (distance * weights).sum() / weights.sum().clamp(min=1)


def _pair(
    student: Mapping[str, Any], teacher: Mapping[str, Any], name: str
) -> tuple[Tensor, Tensor]:
    """One output of both, of the same shape."""
    for who, outputs in (("student", student), ("teacher", teacher)):
        if outputs.get(name) is None:
            raise ValueError(
                f"the {who}'s outputs have no {name}; they have {', '.join(outputs) or 'nothing'}. "
                "Distillation compares logits, or start_logits and end_logits."
            )
    own, other = student[name], teacher[name]
    if own.shape != other.shape:
        raise ValueError(
            f"{name} are {list(own.shape)} in the student and {list(other.shape)} in the teacher. "
            "Take a teacher with the same classes, vocabulary and sequence length."
        )
    return own, other


def _as_mapping(outputs: Any) -> Mapping[str, Any]:
    if isinstance(outputs, Tensor):
        return {"logits": outputs}
    if not isinstance(outputs, Mapping):
        raise ValueError(
            f"distillation reads outputs by name, and found a {type(outputs).__name__}. "
            "Pass a transformers output (return_dict=True), a mapping, or the tensor of logits."
        )
    return {str(name): value for name, value in outputs.items()}
