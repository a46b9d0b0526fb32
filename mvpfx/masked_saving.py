"""What `save_pretrained` of a prepared model writes: masked weights, and nothing of ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from torch import Tensor, nn

_TRAINER = "transformers.trainer"
"""The module whose `_save_checkpoint` needs weights and scores as they are, to resume from them."""

MaskTensors = Callable[[nn.Module, Mapping[str, Tensor]], dict[str, Tensor]]


def saving(base_save: Callable[..., Any], masked: MaskTensors) -> Any:
    """The `save_pretrained` of a prepared model.

    `from_pretrained` knows no masks, so weights are written as the matmuls read them, those of a
    state dict that is given too. Only the checkpoints of a Trainer have them as they are.

    Args:
        base_save: of the model's own class.
        masked: from the model and its state dict to the same with masked weights.
    """

    def save_pretrained(
        self: nn.Module,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not _is_checkpoint():
            state_dict = masked(self, self.state_dict() if state_dict is None else state_dict)
        return base_save(self, save_directory, is_main_process, state_dict, *args, **kwargs)

    save_pretrained.__wrapped__ = base_save  # pyright: ignore[reportFunctionMemberAccess]
    save_pretrained.__doc__ = base_save.__doc__
    return save_pretrained


def _is_checkpoint() -> bool:
    """Whether a Trainer of transformers is saving what it may resume from."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        module = frame.f_globals.get("__name__")
        if frame.f_code.co_name == "_save_checkpoint" and module == _TRAINER:
            return True
        frame = frame.f_back
    return False
