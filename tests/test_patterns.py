"""Patterns: what they match, which of them wins, and what is refused."""

from typing import Any

import pytest

from tests.test_config import DEFAULTS, rules
from tests.toy_masks import raises


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("encoder.0.ffn.weight", DEFAULTS[1:]),
        ("encoder.0.ffn", DEFAULTS[1:]),
        ("encoder.0", DEFAULTS[2:]),
        ("encoder", []),
        ("re:.*ffn", DEFAULTS[1:2]),
        (r"re:encoder\.\d\.ffn\.weight", DEFAULTS[1:2]),
    ],
)
def test_what_a_pattern_matches(pattern: str, left: list[str]) -> None:
    assert list(rules({pattern: None})) == left


@pytest.mark.parametrize(
    "pattern", ["embeddings.tokens.weight", "embeddings", "lm_head", "re:emb.*"]
)
def test_a_tied_weight_answers_to_all_its_names(pattern: str) -> None:
    found = rules({pattern: {"density": 0.5}})
    assert found["lm_head.weight"].density == 0.5


def test_fields_add_a_site() -> None:
    assert list(rules({"classifier": {}})) == [*DEFAULTS, "classifier.weight"]


def test_the_more_specific_wins_field_by_field() -> None:
    overrides = {
        "encoder.0.ffn.weight": {"density": 0.5},
        "encoder.0.ffn": {"density": 0.4, "scope": "global"},
        "encoder.0": {"density": 0.3, "criterion": "magnitude"},
        "encoder": {"density": 0.2, "score_init": 1},
        "re:.*": {"density": 0.1, "threshold": 0.3},
    }
    found = rules(overrides)
    first = found["encoder.0.ffn.weight"]
    assert (first.density, first.scope, first.criterion) == (0.5, "global", "magnitude")
    assert (first.score_init, first.threshold) == (1.0, 0.3)
    assert found["encoder.0.attention.query.weight"].density == 0.3
    assert found["encoder.1.ffn.weight"].density == 0.2
    assert found["classifier.weight"].density == 0.1


def test_none_and_fields_at_different_levels() -> None:
    assert list(rules({"encoder": None, "encoder.1": {}})) == ["encoder.1.ffn.weight"]
    found = rules({"encoder": {"density": 0.5}, "encoder.1": None})
    assert list(found) == DEFAULTS[:2]
    assert found[DEFAULTS[0]].density == 0.5


def test_equal_wishes_do_not_collide() -> None:
    found = rules({"re:.*ffn": {"density": 0.5}, "re:encoder.*": {"density": 0.5}})
    assert found[DEFAULTS[0]].density == 0.5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"re:.*ffn": {"density": 0.5}, "re:encoder.*": {"density": 0.4, "scope": "global"}},
            "overrides 're:.*ffn' and 're:encoder.*' both match encoder.0.ffn.weight and disagree: "
            "density is 0.5 in one and 0.4 in the other. "
            "Narrow one of the two, or add a more specific override that decides.",
        ),
        (
            {"re:.*ffn": {}, "re:encoder.*": None},
            "overrides 're:.*ffn' and 're:encoder.*' both match encoder.0.ffn.weight and disagree: "
            "one leaves it alone (None), the other prunes it. "
            "Narrow one of the two, or add a more specific override that decides.",
        ),
        (
            {"lm_head": {"density": 0.5}, "embeddings.tokens": {"density": 0.4}},
            "overrides 'lm_head' and 'embeddings.tokens' both match lm_head.weight and disagree: "
            "density is 0.5 in one and 0.4 in the other. "
            "Narrow one of the two, or add a more specific override that decides.",
        ),
    ],
)
def test_collisions(overrides: dict[str, Any], message: str) -> None:
    with raises(ValueError, message):
        rules(overrides)


def test_a_more_specific_override_decides_a_collision() -> None:
    overrides: dict[str, Any] = {
        "re:.*ffn": {"density": 0.5},
        "re:.*0.*": {"density": 0.4},
        "encoder.0.ffn": {"density": 0.3},
    }
    assert rules(overrides)[DEFAULTS[0]].density == 0.3


USE = (
    "Use the name of a parameter or module, the beginning of one up to a dot, "
    'or "re:" and a regular expression for the whole name.'
)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        (
            "encoder.0.fnn",
            'Close names: "encoder.0.ffn", "encoder.1.ffn", "encoder.0".',
        ),
        ("re:.*mlp.*", None),
        (
            "qqqq",
            'Sites: "encoder.0.ffn.weight", "encoder.0.attention.query.weight", '
            '"encoder.1.ffn.weight".',
        ),
        ("encoder.0.f", None),
    ],
)
def test_a_pattern_that_matches_nothing(pattern: str, hint: str | None) -> None:
    with pytest.raises(ValueError) as caught:
        rules({pattern: None})
    start = f"overrides[{pattern!r}] matches none of the 5 weights that can be pruned. "
    text = str(caught.value)
    assert text.startswith(start)
    assert text.endswith(USE)
    if hint is not None:
        assert text == f"{start}{hint} {USE}"
