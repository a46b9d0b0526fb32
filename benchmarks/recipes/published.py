"""The figures that the authors published, to be measured against.

BERT-base-uncased on the dev sets, in percent (Sanh et al. 2020, Table 2 without a teacher, Table 3
with one).
"""

from __future__ import annotations

from typing import Any

from benchmarks.recipes.settings import Settings

METRICS = {
    "squad": ("exact_match", "f1"),
    "mnli": ("accuracy_matched", "accuracy_mismatched"),
    "qqp": ("accuracy", "f1"),
}
CRITERIA = ("magnitude", "l0", "movement", "soft_movement")
TABLE_2 = {
    ("squad", 0.10): ((67.7, 78.5), (69.9, 80.1), (71.9, 81.7), (71.3, 81.5)),
    ("squad", 0.03): ((40.1, 54.5), (61.6, 73.6), (65.2, 76.3), (69.6, 79.9)),
    ("mnli", 0.10): ((77.8, 79.0), (77.9, 78.5), (79.3, 79.5), (80.7, 81.2)),
    ("mnli", 0.03): ((68.9, 69.8), (75.2, 75.6), (76.1, 76.7), (79.0, 79.7)),
    ("qqp", 0.10): ((78.8, 75.1), (87.6, 81.9), (89.1, 85.5), (90.2, 86.8)),
    ("qqp", 0.03): ((72.1, 58.4), (86.5, 81.1), (85.6, 81.0), (89.2, 85.5)),
}
TABLE_3 = {
    ("squad", 0.10): ((70.2, 80.1), (72.4, 81.9), (75.6, 84.3), (76.6, 84.9)),
    ("squad", 0.03): ((45.5, 59.6), (65.5, 75.9), (67.5, 78.0), (72.9, 82.4)),
    ("mnli", 0.10): ((78.3, 79.3), (78.7, 79.8), (80.1, 80.4), (81.2, 81.8)),
    ("mnli", 0.03): ((69.4, 70.6), (76.2, 76.5), (76.5, 77.4), (79.6, 80.2)),
    ("qqp", 0.10): ((79.8, 65.0), (88.1, 82.8), (89.7, 86.2), (90.5, 87.1)),
    ("qqp", 0.03): ((72.4, 57.8), (87.1, 82.0), (86.1, 81.5), (89.3, 85.6)),
}


def published(settings: Settings) -> dict[str, Any] | None:
    """The paper's figures for the task, criterion and density of a run; None where there is none.

    They are of single weights, ranked within each weight.
    """
    table = TABLE_2 if settings.teacher is None else TABLE_3
    row = table.get((settings.task, settings.density))
    plain = settings.granularity == "element" and settings.scope == "local"
    if row is None or not plain or settings.criterion not in CRITERIA:
        return None
    figures = row[CRITERIA.index(settings.criterion)]
    number = 2 if settings.teacher is None else 3
    return {
        **dict(zip(METRICS[settings.task], figures, strict=True)),
        "source": f"Sanh et al. 2020, Table {number}",
    }
