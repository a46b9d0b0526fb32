"""Distillation against the formula, written out; what does not count; what is refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mvpfx
from mvpfx import Distillation, distillation_loss
from tests.small_run import raises
from tests.zoo import ZOO

LOGITS = Distillation(temperature=3.0, task_weight=0.0, logit_weight=1.0)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def divergence(own: Tensor, other: Tensor, temperature: float) -> float:
    """Row by row, from the definition."""
    total = 0.0
    for a, b in zip(own.reshape(-1, own.shape[-1]), other.reshape(-1, own.shape[-1]), strict=True):
        p, q = torch.softmax(b / temperature, -1), torch.softmax(a / temperature, -1)
        total += float((p * (p / q).log()).sum()) * temperature**2
    return total


def test_rows_of_classes() -> None:
    own, other = noise(5, 4), noise(5, 4, seed=1)
    expected = divergence(own, other, 3.0) / 5
    found = distillation_loss(own, other, LOGITS)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    half = distillation_loss({"logits": own}, {"logits": other}, Distillation(temperature=3.0))
    assert float(half) == pytest.approx(expected / 2, rel=1e-5)
    assert float(distillation_loss(own, own, LOGITS)) == pytest.approx(0, abs=1e-6)


def test_gradients_flow_to_the_student_alone() -> None:
    own, other = noise(3, 4).requires_grad_(), noise(3, 4, seed=1).requires_grad_()
    distillation_loss(own, other, LOGITS).backward()
    reference = own.detach().clone().requires_grad_()
    q, p = F.log_softmax(reference / 3, -1), F.softmax(other.detach() / 3, -1)
    (9 * F.kl_div(q, p, reduction="batchmean")).backward()
    torch.testing.assert_close(own.grad, reference.grad)
    assert other.grad is None


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("by", ["labels", "mask", "nothing", "labels of another shape"])
def test_positions_that_do_not_count_are_left_out(by: str, shifted: bool) -> None:
    own, other = noise(2, 5, 7), noise(2, 5, 7, seed=1)
    counts = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    given: dict[str, Tensor] = {}
    if by == "labels":
        given = {"labels": torch.where(counts, 3, -100), "attention_mask": torch.ones(2, 5)}
    elif by == "mask":
        given = {"attention_mask": counts.long()}
    else:
        counts = torch.ones(2, 5).bool()
        given = {"labels": torch.zeros(2, 9)} if by != "nothing" else {}
    if shifted and by in ("labels", "mask"):
        counts = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()
    expected = divergence(own[counts], other[counts], 3.0) / int(counts.sum())
    found = distillation_loss(own, other, LOGITS, shifted=shifted, **given)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_a_batch_in_which_nothing_counts_adds_nothing() -> None:
    own = noise(2, 3, 4).requires_grad_()
    labels = torch.full((2, 3), -100)
    loss = distillation_loss(own, noise(2, 3, 4, seed=1), LOGITS, labels=labels)
    loss.backward()
    assert float(loss.detach()) == 0
    assert own.grad is not None
    assert not own.grad.any()


def test_spans_of_answers_are_distributions_over_what_is_not_padding() -> None:
    names = ("start_logits", "end_logits")
    own = {name: noise(2, 5, seed=i) for i, name in enumerate(names)}
    other = {name: noise(2, 5, seed=9 + i) for i, name in enumerate(names)}
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = 0.0
    for name in names:
        for row, length in enumerate((3, 5)):
            expected += divergence(own[name][row, :length], other[name][row, :length], 3.0) / 4
    found = distillation_loss(own, other, LOGITS, attention_mask=mask)
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_states(kind: str) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    own = {"hidden_states": tuple(noise(2, 3, 4, seed=i) for i in range(3))}
    other = {"hidden_states": tuple(noise(2, 3, 4, seed=9 + i) for i in range(5))}
    how = Distillation(logit_weight=0, hidden_weight=2.0, hidden_loss=kind)

    def distance(pairs: list[tuple[int, int]]) -> float:
        total = 0.0
        for i, j in pairs:
            a = own["hidden_states"][i][mask.bool()].double()
            b = other["hidden_states"][j][mask.bool()].double()
            if kind == "mse":
                total += float((a - b).square().mean())
            else:
                cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
                total += float((1 - cosine).mean())
        return 2.0 * total / len(pairs)

    found = distillation_loss(own, other, how, attention_mask=mask)
    assert float(found) == pytest.approx(distance([(0, 0), (1, 2), (2, 4)]), rel=1e-5)
    chosen = Distillation(
        logit_weight=0, hidden_weight=2.0, hidden_loss=kind, layers=[(1, 3), (-1, -1)]
    )
    found = distillation_loss(own, other, chosen, attention_mask=mask)
    assert float(found) == pytest.approx(distance([(1, 3), (2, 4)]), rel=1e-5)


def test_encoder_and_decoder_states_count_where_they_are_read() -> None:
    """Encoder positions by the mask, decoder positions by the labels."""
    student, teacher = ZOO["T5"].model(), mvpfx.prepare(ZOO["T5"].model())
    batch = ZOO["T5"].batch(0)
    batch["labels"][0, -2:] = -100
    how = Distillation(logit_weight=0, hidden_weight=1.0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
        outputs = student.eval()(**batch, output_hidden_states=True)
        target = teacher.eval()(**batch, output_hidden_states=True)
    labels, mask = batch["labels"], batch["attention_mask"]
    terms: list[Tensor] = []
    for kind, counts in (("encoder", mask != 0), ("decoder", labels != -100)):
        pairs = zip(outputs[f"{kind}_hidden_states"], target[f"{kind}_hidden_states"], strict=True)
        terms += [(a - b)[counts].square().mean() for a, b in pairs]
    found = distillation_loss(outputs, target, how, labels=labels, attention_mask=mask)
    torch.testing.assert_close(found, torch.stack(terms).mean())


def test_weights_of_zero_ask_for_nothing() -> None:
    how = Distillation(task_weight=1.0, logit_weight=0.0)
    assert float(distillation_loss(noise(2, 2), noise(2, 3), how)) == 0


VALUES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"temperature": 0}, ValueError, "temperature must be above 0; found 0."),
    ({"temperature": "2"}, TypeError, "temperature must be a number; found '2' (str)."),
    ({"task_weight": -1}, ValueError, "task_weight must be at least 0; found -1."),
    (
        {"task_weight": 0, "logit_weight": 0},
        ValueError,
        "all weights of the distillation are 0, so there is nothing to learn.",
    ),
    (
        {"hidden_loss": "l1"},
        ValueError,
        'hidden_loss must be "mse" or "cosine"; found \'l1\'.',
    ),
    (
        {"layers": [(1,)]},
        TypeError,
        "layers must be pairs of whole numbers, (student, teacher); found (1,) among them.",
    ),
]


@pytest.mark.parametrize(("values", "error", "message"), VALUES)
def test_bad_values(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with raises(message, error):
        Distillation(**values)


STATES = {"hidden_states": (noise(2, 3, 4),) * 2}
HIDDEN = Distillation(logit_weight=0, hidden_weight=1.0)
OUTPUTS: list[tuple[Any, Any, Distillation, str]] = [
    (
        noise(2, 3),
        noise(2, 4),
        LOGITS,
        "logits are [2, 3] in the student and [2, 4] in the teacher. "
        "Take a teacher with the same classes, vocabulary and sequence length.",
    ),
    (
        noise(2, 1),
        noise(2, 1),
        LOGITS,
        "logits are [2, 1]: one class is no distribution to learn from. "
        "Distillation is for classification; leave the teacher out of a regression.",
    ),
    (
        {"logits": noise(2, 3)},
        {"loss": noise(1)},
        LOGITS,
        "the teacher's outputs have no logits; they have loss. "
        "Distillation compares logits, or start_logits and end_logits.",
    ),
    (
        {"last_hidden_state": noise(2, 3)},
        {},
        LOGITS,
        "the student's outputs have no logits; they have last_hidden_state. "
        "Distillation compares logits, or start_logits and end_logits.",
    ),
    (
        (noise(2, 3),),
        noise(2, 3),
        LOGITS,
        "distillation reads outputs by name, and found a tuple. "
        "Pass a transformers output (return_dict=True), a mapping, or the tensor of logits.",
    ),
    (
        {"logits": noise(2, 3)},
        STATES,
        HIDDEN,
        "hidden_weight is above 0 and the student's outputs have no hidden states. "
        "Call both models with output_hidden_states=True.",
    ),
    (
        STATES,
        {"logits": noise(2, 3)},
        HIDDEN,
        "the student has hidden_states and the teacher has none. "
        "Call the teacher with output_hidden_states=True too.",
    ),
    (
        STATES,
        {"hidden_states": (noise(2, 3, 6),) * 2},
        HIDDEN,
        "hidden_states[0] is [2, 3, 4] in the student and [2, 3, 6] in the teacher. Hidden states "
        "are compared as they are, without a projection: take a teacher of the same width, or "
        "hidden_weight=0.",
    ),
    (
        STATES,
        STATES,
        Distillation(hidden_weight=1.0, logit_weight=0, layers=[(0, 2)]),
        "layers has (0, 2), and the hidden_states of student and teacher are 2 and 2 in number, "
        "the embeddings being number 0.",
    ),
]


@pytest.mark.parametrize(("own", "other", "how", "message"), OUTPUTS)
def test_outputs_that_do_not_fit(own: Any, other: Any, how: Distillation, message: str) -> None:
    with raises(message):
        distillation_loss(own, other, how)
