"""Oracle in plain NumPy, written from the papers: pruning of two stacked matrices while they train.

The model is `y = x W1'^T W2'^T` with `W' = W * M` and the loss `mean (y - target)^2`, whose
gradients are written out by hand. Nothing here is shared with the package.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def cubic(step: int, total: int, warmup: int, cooldown: int, first: float, last: float) -> float:
    """Eq. 5."""
    if step < warmup:
        return first
    if step >= total - cooldown:
        return last
    return last + (first - last) * (1 - (step - warmup) / (total - cooldown - warmup)) ** 3


def top_v(scores: list[Array], count: int) -> list[Mask]:
    """Eq. 1 over all scores together; ties go to the lower index."""
    flat = np.concatenate([part.ravel() for part in scores])
    chosen = np.zeros(flat.size, dtype=np.bool_)
    chosen[np.argsort(-flat, kind="stable")[:count]] = True
    ends = np.cumsum([part.size for part in scores])[:-1]
    return [m.reshape(s.shape) for m, s in zip(np.split(chosen, ends), scores, strict=True)]


def expand(units: Mask, block: tuple[int, int]) -> Mask:
    """Each unit's value on all of its weights."""
    return np.kron(units, np.ones(block, dtype=np.bool_))


def reduce(matrix: Array, block: tuple[int, int]) -> Array:
    """Sum over each unit."""
    rows, cols = matrix.shape[0] // block[0], matrix.shape[1] // block[1]
    sums = np.zeros((rows, cols))
    for r in range(rows):
        for c in range(cols):
            part = matrix[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]]
            sums[r, c] = part.sum()
    return sums


def sigmoid(values: Array) -> Array:
    return 1 / (1 + np.exp(-values))


def hard_concrete(scores: Array, noise: Array | None = None) -> tuple[Array, Array]:
    """Louizos et al. 2018, Eq. 10 to 12: gates, and their derivatives with respect to the scores;
    without noise those of evaluation.
    """
    inner, inverse = scores, 1.0
    if noise is not None:
        noise = np.clip(noise, 1e-4, 1 - 1e-4)
        inner, inverse = (np.log(noise / (1 - noise)) + scores) * 1.5, 1.5
    open_ = sigmoid(inner)
    stretched = open_ * 1.2 - 0.1
    slope = np.where((stretched > 0) & (stretched < 1), 1.2 * inverse * open_ * (1 - open_), 0.0)
    return np.clip(stretched, 0, 1), slope


@dataclass
class Adam:
    """Kingma and Ba 2015, Algorithm 1; plain SGD where `plain` is set."""

    lr: float
    plain: bool
    steps: int = 0
    first: dict[int, Array] = field(default_factory=dict[int, Array])
    second: dict[int, Array] = field(default_factory=dict[int, Array])

    def update(self, values: list[Array], grads: list[Array]) -> None:
        self.steps += 1
        for i, (value, grad) in enumerate(zip(values, grads, strict=True)):
            if self.plain:
                value -= self.lr * grad
                continue
            self.first[i] = 0.9 * self.first.get(i, np.zeros_like(grad)) + 0.1 * grad
            self.second[i] = 0.999 * self.second.get(i, np.zeros_like(grad)) + 0.001 * grad**2
            first = self.first[i] / (1 - 0.9**self.steps)
            second = self.second[i] / (1 - 0.999**self.steps)
            value -= self.lr * first / (np.sqrt(second) + 1e-8)


@dataclass
class Run:
    """One fine-tuning run; `step` takes one optimizer step and then moves the schedule."""

    criterion: str
    weights: list[Array]
    scores: list[Array]
    block: tuple[int, int]
    density: float
    pooled: bool
    total: int
    warmup: int
    cooldown: int
    plain: bool
    lr: float = 1e-2
    score_lr: float = 1e-1
    threshold: float = 0.5
    penalty_lambda: float = 3.0
    steps: int = 0
    averages: dict[int, tuple[Array, Array]] = field(default_factory=dict[int, tuple[Array, Array]])
    fishers: list[Array] = field(default_factory=list[Array])
    damping: float = 3.0

    def __post_init__(self) -> None:
        self.weight_optimizer = Adam(self.lr, self.plain)
        self.score_optimizer = Adam(self.score_lr, self.plain)
        if self.criterion == "second_order":
            self.fishers = [np.zeros((w.size, w.size)) for w in self.weights]

    def scheduled(self, first: float, last: float) -> float:
        return cubic(self.steps, self.total, self.warmup, self.cooldown, first, last)

    def masks(self) -> list[Mask]:
        """The units that stay now."""
        if self.criterion == "soft_movement":
            passed = [sigmoid(s) > self.scheduled(0.0, self.threshold) for s in self.scores]
            floors = [max(1, round(0.005 * s.size)) for s in self.scores]
            return [
                p if p.sum() >= floor else top_v([s], floor)[0]
                for p, s, floor in zip(passed, self.scores, floors, strict=True)
            ]
        if self.criterion == "l0":
            return [hard_concrete(s)[0] > 0 for s in self.scores]
        ranked = self.scores
        if self.criterion == "magnitude":
            ranked = [reduce(np.abs(w), self.block) for w in self.weights]
        density = self.scheduled(1.0, self.density)
        if self.pooled:
            return top_v(ranked, round(density * sum(s.size for s in ranked)))
        return [top_v([s], round(density * s.size))[0] for s in ranked]

    def step(self, x: Array, target: Array, noise: list[Array]) -> None:
        factors: list[Any] = [expand(m, self.block).astype(float) for m in self.masks()]
        slopes: list[Any] = [1.0 for _ in self.scores]
        if self.criterion == "l0":
            gates = [hard_concrete(s, u) for s, u in zip(self.scores, noise, strict=True)]
            factors = [np.kron(gate, np.ones(self.block)) for gate, _ in gates]
            slopes = [slope for _, slope in gates]
        one, two = (w * m for w, m in zip(self.weights, factors, strict=True))
        hidden = x @ one.T
        error = 2 * (hidden @ two.T - target) / target.size
        masked_grads: list[Array] = [(error @ two).T @ x, error.T @ hidden]
        # Eq. 2, with the straight-through estimator: also where the mask is 0.
        movements = [
            reduce(g * w, self.block) for g, w in zip(masked_grads, self.weights, strict=True)
        ]
        grads: list[Array] = [g * m for g, m in zip(masked_grads, factors, strict=True)]
        self.weight_optimizer.update(self.weights, grads)
        self._score(movements, slopes)
        before = self.masks()
        if self.criterion == "second_order" and self.scheduled(1.0, self.density) > self.density:
            for fisher, g in zip(self.fishers, grads, strict=True):
                fisher *= 0.99
                fisher += 0.01 * np.outer(g, g)
        self.steps += 1
        density, last = (
            cubic(s, self.total, self.warmup, self.cooldown, 1.0, self.density)
            for s in (self.steps, self.steps - 1)
        )
        if self.criterion == "second_order" and density != last:
            self._cut(before)

    def _score(self, movements: list[Array], slopes: list[Any]) -> None:
        """What the criterion makes of `dL/dW' * W`, summed over the units, and of new weights."""
        if self.criterion in ("movement", "soft_movement", "l0"):
            score_grads = [m * slope for m, slope in zip(movements, slopes, strict=True)]
            for grad, s in zip(score_grads, self.scores, strict=True):
                grad += self._penalty_slope(s) / len(self.scores) / s.size
            self.score_optimizer.update(self.scores, score_grads)
        for i, s in enumerate(self.scores):
            if self.criterion == "saliency":
                s += np.abs(movements[i])
            if self.criterion == "ema_magnitude":
                now = reduce(np.abs(self.weights[i]), self.block) / np.prod(self.block)
                s[:] = 0.9 * s + 0.1 * now
            if self.criterion == "platon":
                zeros = np.zeros_like(s)
                sensitivity, uncertainty = self.averages.get(i, (zeros, zeros))
                change = np.abs(movements[i])
                sensitivity = 0.85 * sensitivity + 0.15 * change
                uncertainty = 0.95 * uncertainty + 0.05 * np.abs(change - sensitivity)
                self.averages[i] = sensitivity, uncertainty
                s[:] = sensitivity * uncertainty

    def _cut(self, before: list[Mask]) -> None:
        """Kurtic et al. 2022, Eq. 4 and 5, with the inverses that are written there."""
        inverses: list[Array] = []
        for i, (w, kept) in enumerate(zip(self.weights, before, strict=True)):
            inverse, stays = self._inverse(i, w, expand(kept, self.block)), kept.ravel()
            inverses.append(inverse)
            units = np.arange(w.size).reshape(w.shape)
            for unit in np.ndindex(self.scores[i].shape):
                (r, c), (rows, cols) = unit, self.block
                loss = 0.0
                for piece in units[r * rows : (r + 1) * rows, c * cols : (c + 1) * cols]:
                    own = w.ravel()[piece]
                    loss += 0.5 * own @ np.linalg.inv(inverse[np.ix_(piece, piece)]) @ own
                self.scores[i][unit] = loss if stays.reshape(kept.shape)[unit] else -1.0
        for w, old, new, inverse in zip(self.weights, before, self.masks(), inverses, strict=True):
            gone = np.flatnonzero(expand(old & ~new, self.block))
            if gone.size:
                pull = np.linalg.inv(inverse[np.ix_(gone, gone)]) @ w.ravel()[gone]
                change = -(inverse[:, gone] @ pull).reshape(w.shape)
                w += change * expand(new, self.block)

    def _inverse(self, i: int, weight: Array, kept: Mask) -> Array:
        """Of the damped Fisher matrix of each 50 neighbours, or the most whole pieces of units."""
        fisher = self.fishers[i] / (1 - 0.99**self.steps) * np.outer(kept, kept)
        size = 50 // self.block[1] * self.block[1]
        block = np.arange(weight.size) // size
        inverse = np.zeros_like(fisher)
        for b in range(block.max() + 1):
            at = np.flatnonzero(block == b)
            inner = fisher[np.ix_(at, at)]
            damping = max(self.damping, 1e-6 * inner.diagonal().max())
            inverse[np.ix_(at, at)] = np.linalg.inv(inner + damping * np.eye(at.size))
        return inverse

    def _penalty_slope(self, scores: Array) -> Array:
        if self.criterion == "soft_movement":
            factor, shift = self.scheduled(0.0, self.threshold) / self.threshold, 0.0
        elif self.criterion == "l0":
            factor, shift = self.scheduled(0.0, 1.0), 2 / 3 * np.log(0.1 / 1.1)
        else:
            return np.zeros_like(scores)
        paid = sigmoid(scores - shift)
        return self.penalty_lambda * factor * paid * (1 - paid)
