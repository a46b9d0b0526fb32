"""The states of all random generators, as plain data: python, NumPy, torch on CPU and on GPUs."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """The states now; `torch.save` and `torch.load(weights_only=True)` keep them."""
    numpy_state: Any = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Continue every generator where `random_states` was called.

    Warns where the states are of another number of GPUs, whose generators then stay as they are.
    """
    random.setstate(states["python"])
    numpy_state = states["numpy"]
    key = numpy_state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})
    torch.set_rng_state(states["torch"])
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(states["cuda"]) == devices:
        if devices:
            torch.cuda.set_rng_state_all(states["cuda"])
        return
    warnings.warn(
        f"the checkpoint has the random states of {len(states['cuda'])} GPUs and this machine has "
        f"{devices}, so random numbers on GPUs do not continue: the resumed run is not exact.",
        stacklevel=3,
    )
