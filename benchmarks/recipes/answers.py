"""Answers as tokens and as text: labels of a feature, and the best answer of several features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.recipes.task import Array

BEST = 20
"""How many first tokens, and how many last ones, are put together to answers."""
MOST_TOKENS = 30
"""In an answer."""


def answer_tokens(starts: Array, ends: Array, begin: int, end: int) -> tuple[int, int] | None:
    """First and last token of the part `[begin, end)` of a context.

    Args:
        starts: first character of each token of a feature, -1 for those that are not of the
            context.
        ends: the character after its last one.
        begin: first character of the answer.
        end: the character after its last one.

    Returns:
        Both tokens; None where the feature does not hold the whole answer.
    """
    inside = np.flatnonzero(starts >= 0)
    if not len(inside) or begin < starts[inside[0]] or end > ends[inside[-1]]:
        return None
    touched = inside[(ends[inside] > begin) & (starts[inside] < end)]
    return (int(touched[0]), int(touched[-1])) if len(touched) else None


def best_span(
    starts: Array, ends: Array, start_logits: Array, end_logits: Array
) -> tuple[float, int, int] | None:
    """The best answer in one feature: its score and its part of the context.

    Of the `BEST` first and the `BEST` last tokens with the highest logits in the context, the pair
    with the highest sum, at most `MOST_TOKENS` long. Logits of padding, after the feature's tokens,
    do not count.

    Returns:
        Score, first character, and the character after the last; None where there is no pair.
    """
    inside = np.flatnonzero(starts >= 0)
    first = inside[np.argsort(-start_logits[inside], kind="stable")[:BEST]]
    last = inside[np.argsort(-end_logits[inside], kind="stable")[:BEST]]
    tokens = last[None, :] - first[:, None] + 1
    sums = start_logits[first][:, None] + end_logits[last][None, :]
    scores = np.where((tokens >= 1) & (tokens <= MOST_TOKENS), sums, -np.inf)
    if not np.isfinite(scores).any():
        return None
    row, column = np.unravel_index(int(scores.argmax()), scores.shape)
    return float(scores[row, column]), int(starts[first[row]]), int(ends[last[column]])


def best_answers(
    contexts: Sequence[str],
    rows: Sequence[int],
    starts: Sequence[Array],
    ends: Sequence[Array],
    start_logits: Sequence[Array],
    end_logits: Sequence[Array],
) -> list[str]:
    """The text of the best answer to each question, over all features of its context.

    Args:
        contexts: one for each question.
        rows: for each feature, the question it is of.
        starts: for each feature and token, the first character in the context, -1 outside of it.
        ends: likewise, the character after the last one.
        start_logits: for each feature and token.
        end_logits: likewise.

    Returns:
        One text for each question; an empty one where no feature has an answer.
    """
    best = [(-np.inf, "")] * len(contexts)
    for row, *feature in zip(rows, starts, ends, start_logits, end_logits, strict=True):
        found = best_span(*feature)
        if found is not None and found[0] > best[row][0]:
            score, begin, end = found
            best[row] = score, contexts[row][begin:end]
    return [text for _, text in best]
