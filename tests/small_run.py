"""A small run with everything that a checkpoint can hold, for the tests of checkpoints."""

import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mvpfx
from tests.models import build, loss

CONFIGURATION = mvpfx.PruningConfig(density=0.2, overrides={"re:.*value.*": {"density": 0.5}})
TOTAL = 10


class Run:
    """A model of the toy zoo in training, with everything a checkpoint can hold."""

    def __init__(self, name: str = "mlp", seed: int = 0, total: int = TOTAL) -> None:
        self.model, _ = build(name, seed)
        _, self.batch = build(name)
        config = CONFIGURATION if name == "bert" else mvpfx.PruningConfig(density=0.2)
        mvpfx.prepare(self.model, config)
        self.scheduler = mvpfx.SparsityScheduler(self.model, total)
        self.optimizer = torch.optim.AdamW(mvpfx.parameter_groups(self.model, lr=1e-2))
        self.lr_scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.1, total)

    @property
    def parts(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "lr_scheduler": self.lr_scheduler,
        }

    def step(self) -> float:
        noise = random.random() + float(np.random.rand())
        value = loss(self.model(**self.batch)) * (1 + 0.01 * noise)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.lr_scheduler.step()
        return value.item()

    def steps(self, count: int) -> list[float]:
        return [self.step() for _ in range(count)]

    def snapshot(self) -> list[Any]:
        states = [self.model.state_dict(), self.optimizer.state_dict()["state"]]
        tensors = [value.clone() for value in flat(states)]
        return [*tensors, self.scheduler.state_dict(), self.lr_scheduler.state_dict()]


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in flat(item)]
    return [tensor for item in value for tensor in flat(item)] if isinstance(value, list) else []


def same(found: list[Any], expected: list[Any]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(found, expected, strict=True)
    )


def raises(message: str, error: type[Exception] = ValueError) -> Any:
    return pytest.raises(error, match=f"^{re.escape(message)}$")
