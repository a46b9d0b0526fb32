"""Random graphs through prepare, random masks and convert: the function stays what it is."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import mvpfx
from tests.dead_units import unexplained
from tests.random_graphs import RandomGraph


def check(seed: int, images: bool, density: float, granularity: str) -> None:
    """Prepare one model, prune it at random, convert it, and compare."""
    model = RandomGraph(seed, images).double().eval()
    example = model.example().double()
    config = mvpfx.PruningConfig(
        criterion="random",
        criterion_options={"seed": seed},
        granularity=granularity,
        density=density,
        schedule=mvpfx.ConstantSchedule(),
    )
    mvpfx.prepare(model, config, example_inputs=example)
    mvpfx.SparsityScheduler(model, total_steps=1)
    small = mvpfx.convert(model, example_inputs=example, lowering="dense")
    with torch.no_grad():
        expected, found = model(example), small(example)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert unexplained(small) == []


DRAWN = given(
    seed=st.integers(0, 2**20),
    images=st.booleans(),
    density=st.sampled_from((0.75, 0.5, 0.25, 0.1)),
    granularity=st.sampled_from(("row", "column")),
)
QUIET = (HealthCheck.too_slow, HealthCheck.data_too_large)


@settings(max_examples=8, deadline=None, suppress_health_check=QUIET, derandomize=True)
@DRAWN
def test_a_few(seed: int, images: bool, density: float, granularity: str) -> None:
    check(seed, images, density, granularity)


@pytest.mark.slow
@settings(
    max_examples=1000,
    deadline=None,
    suppress_health_check=QUIET,
    derandomize=True,
    phases=(Phase.generate,),
)
@DRAWN
def test_a_thousand(seed: int, images: bool, density: float, granularity: str) -> None:
    check(seed, images, density, granularity)
