"""PruningConfig: what it takes, what it refuses, and which override wins."""

import copy
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from mvpfx.config import PruningConfig
from mvpfx.granularity import parse
from mvpfx.rule import Rule
from mvpfx.schedule import ConstantSchedule, CubicSchedule, LinearSchedule
from mvpfx.site import Site
from tests.toy_masks import raises

SITES = [
    Site("encoder.0.ffn.weight", (64, 64)),
    Site("encoder.0.attention.query.weight", (64, 64)),
    Site("encoder.1.ffn.weight", (64, 64)),
    Site("classifier.weight", (2, 64)),
    Site("lm_head.weight", (64, 64), aliases=("embeddings.tokens.weight",)),
]
DEFAULTS = [site.name for site in SITES[:3]]


def rules(overrides: dict[str, Any] | None = None, **fields: Any) -> dict[str, Rule]:
    return PruningConfig(overrides=overrides or {}, **fields).rules(SITES, DEFAULTS)


def test_the_default_does_the_sensible_thing() -> None:
    config = PruningConfig()
    assert (config.criterion, config.granularity, config.density) == ("movement", "element", 0.15)
    assert (config.scope, config.score_init, config.schedule) == (
        "local",
        None,
        CubicSchedule(warmup=0.1, cooldown=0.2),
    )
    wanted = Rule(score_init="sensitivity")
    assert config.rules(SITES, DEFAULTS) == dict.fromkeys(DEFAULTS, wanted)


def test_fields_reach_the_rules() -> None:
    found = rules(criterion="soft_movement", granularity=[32, 16], threshold=0.2, penalty_lambda=5)
    expected = Rule(
        criterion="soft_movement", granularity=parse((32, 16)), threshold=0.2, penalty_lambda=5.0
    )
    assert found == dict.fromkeys(DEFAULTS, expected)


NUMBERS_ABOVE = "density must be above 0 and at most 1: it is the fraction of units kept; found"
HOW = 'To leave a weight alone, use overrides={"its name": None}.'


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"criterion": "moving"},
            ValueError,
            'criterion "moving" is unknown. Use one of "movement", "soft_movement", "magnitude", '
            '"l0", "saliency", "ema_magnitude", "random", "platon", "second_order".',
        ),
        (
            {"granularity": "rows"},
            ValueError,
            'granularity "rows" is unknown. Use "element", "row", "column", "head", '
            '"channel", "hybrid", "N:M" with '
            'N below M, such as "2:4", or the (rows, cols) of a block, such as (32, 32).',
        ),
        (
            {"criterion": "platon", "criterion_options": {"beta": 0.9}},
            ValueError,
            'criterion "platon" has no option \'beta\'. It has "beta_1", "beta_2".',
        ),
        (
            {"criterion_options": {"beta": 0.9}},
            ValueError,
            'criterion "movement" has no option \'beta\'. It has "accumulate".',
        ),
        (
            {"criterion": "magnitude", "criterion_options": {"beta": 0.9}},
            ValueError,
            "criterion \"magnitude\" has no option 'beta'. It has none.",
        ),
        (
            {"criterion": "platon", "criterion_options": {"beta_1": 1.5}},
            ValueError,
            "criterion_options['beta_1'] must be from 0 to 1; found 1.5.",
        ),
        (
            {"criterion_options": 0.9},
            TypeError,
            "criterion_options must map names to numbers; found 0.9.",
        ),
        (
            {"granularity": "2:4", "density": 0.1},
            ValueError,
            'granularity "2:4" keeps 0.5 of the weights; found density=0.1. Leave density out.',
        ),
        (
            {"overrides": {"ffn": {"granularity": "2:4", "density": 0.15}}},
            ValueError,
            "overrides['ffn']: granularity \"2:4\" keeps 0.5 of the weights; found density=0.15. "
            "Leave density out.",
        ),
        ({"scope": "world"}, ValueError, 'scope "world" is unknown. Use "local" or "global".'),
        ({"scope": None}, TypeError, 'scope must be "local" or "global"; found None.'),
        ({"density": 0}, ValueError, f"{NUMBERS_ABOVE} 0. {HOW}"),
        ({"density": 1.5}, ValueError, f"{NUMBERS_ABOVE} 1.5. {HOW}"),
        ({"density": -0.1}, ValueError, f"{NUMBERS_ABOVE} -0.1. {HOW}"),
        ({"density": float("nan")}, ValueError, f"{NUMBERS_ABOVE} nan. {HOW}"),
        ({"density": "0.1"}, TypeError, "density must be a number; found '0.1' (str)."),
        ({"density": True}, TypeError, "density must be a number; found True (bool)."),
        ({"density": None}, TypeError, "density must be a number; found None (NoneType)."),
        (
            {"score_init": "ones"},
            ValueError,
            'score_init must be "sensitivity", "magnitude", "zero" or a number; '
            "found 'ones' (str).",
        ),
        (
            {"score_init": False},
            TypeError,
            'score_init must be "sensitivity", "magnitude", "zero" or a number; '
            "found False (bool).",
        ),
        ({"score_init": float("inf")}, ValueError, "score_init must be finite; found inf."),
        (
            {"threshold": 1},
            ValueError,
            "threshold must be above 0 and below 1: it is the cutoff of sigmoid(scores); found 1.",
        ),
        ({"penalty_lambda": -1}, ValueError, "penalty_lambda must be at least 0; found -1."),
        (
            {"schedule": "cubic"},
            TypeError,
            "schedule must be a Schedule, such as CubicSchedule(); found 'cubic'.",
        ),
        (
            {"overrides": ["ffn"]},
            TypeError,
            "overrides must map patterns to changed fields or None; found ['ffn'].",
        ),
        (
            {"overrides": {3: None}},
            TypeError,
            "an override's pattern must be text; found 3.",
        ),
        (
            {"overrides": {"ffn": 0.5}},
            TypeError,
            "overrides['ffn'] must be None, to leave the site alone, "
            "or the fields that change; found 0.5.",
        ),
        (
            {"overrides": {"ffn": {"sparsity": 0.5}}},
            ValueError,
            "overrides['ffn'] has no field 'sparsity'. It may change criterion, granularity, "
            "density, scope, score_init, threshold, penalty_lambda, criterion_options.",
        ),
        (
            {"overrides": {"ffn": {"density": 2}}},
            ValueError,
            f"overrides['ffn']: {NUMBERS_ABOVE} 2. {HOW}",
        ),
        (
            {"overrides": {"re:(": None}},
            ValueError,
            "overrides['re:('] is no valid regular expression: "
            "missing ), unterminated subpattern at position 0.",
        ),
    ],
)
def test_bad_values(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with raises(error, message):
        PruningConfig(**fields)


def test_frozen_and_independent_of_what_it_was_made_from() -> None:
    change: dict[str, Any] = {"density": 0.5}
    overrides: dict[str, Any] = {"classifier": change}
    config = PruningConfig(overrides=overrides)
    change["density"] = 0.9
    overrides["encoder"] = None
    assert config.overrides == {"classifier": {"density": 0.5}}
    with pytest.raises(FrozenInstanceError):
        config.density = 0.5  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError, match="does not support item assignment"):
        config.overrides["encoder"] = None  # pyright: ignore[reportIndexIssue]


CONFIGS = [
    PruningConfig(),
    PruningConfig(granularity=(32, 8), schedule=LinearSchedule(10, 0.3), score_init=0.5),
    PruningConfig(
        schedule=ConstantSchedule(),
        overrides={"classifier": None, "re:.*ffn": {"granularity": (4, 4), "density": 1}, "a": {}},
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trips(config: PruningConfig) -> None:
    assert PruningConfig.from_json(config.to_json()) == config
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("[]", TypeError, "a configuration must be a JSON object; found []."),
        (
            '{"amount": 0.5}',
            ValueError,
            "a configuration has no field 'amount'. It has criterion, granularity, density, "
            "params, flops, scope, score_init, schedule, threshold, penalty_lambda, "
            "criterion_options, allow_unremovable, overrides.",
        ),
        ("density", ValueError, "Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_bad_json(text: str, error: type[Exception], message: str) -> None:
    with raises(error, message):
        PruningConfig.from_json(text)


def test_fields_missing_in_json_have_their_defaults() -> None:
    assert PruningConfig.from_json('{"density": 0.5}') == PruningConfig(density=0.5)


def test_a_block_that_does_not_tile_names_the_site() -> None:
    message = (
        "classifier.weight is 2 x 64, which 32 x 32 blocks do not tile (2 = 0 * 32 + 2).\n"
        "Use a block height that divides 2, or leave the site out: "
        'overrides={"classifier": None}'
    )
    with raises(ValueError, message):
        rules({"classifier": {}}, granularity=(32, 32))
    assert list(rules({"classifier": None}, granularity=(32, 32))) == DEFAULTS


def test_n_of_m_sets_the_density_of_its_sites() -> None:
    sites = [Site("ffn.weight", (8, 8)), Site("out.weight", (8, 8))]
    config = PruningConfig(density=0.1, overrides={"ffn": {"granularity": "2:4"}})
    rules = config.rules(sites, [site.name for site in sites])
    assert [rule.density for rule in rules.values()] == [0.5, 0.1]
    assert PruningConfig.from_json(config.to_json()) == config
    assert (
        PruningConfig(granularity="1:4").rules(sites, ["ffn.weight"])["ffn.weight"].density == 0.25
    )


def test_n_of_m_needs_a_criterion_that_ranks() -> None:
    config = PruningConfig(criterion="soft_movement", granularity="2:4")
    message = (
        'ffn.weight: criterion "soft_movement" keeps what its scores say, and granularity "2:4" a '
        'number of each group. Use a criterion that ranks, such as "movement".'
    )
    with raises(ValueError, message):
        config.rules([Site("ffn.weight", (8, 8))], ["ffn.weight"])


def test_an_override_of_the_criterion_starts_without_options() -> None:
    sites = [Site("ffn.weight", (8, 8)), Site("out.weight", (8, 8))]
    config = PruningConfig(
        criterion="ema_magnitude",
        criterion_options={"beta": 0.5},
        overrides={"ffn": {"criterion": "platon"}},
    )
    rules = config.rules(sites, [site.name for site in sites])
    assert [dict(rule.criterion_options) for rule in rules.values()] == [{}, {"beta": 0.5}]
