"""Who else writes down what torch computes, or watches it: there plain operations have to run."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

from mvpfx.torch_private import (
    dispatch_modes,
    get_tracing_state,
    has_proxy_mode,
    is_jit_tracing,
    modes_off,
    set_tracing_state,
)


def is_traced() -> bool:
    """Whether somebody writes operations down: `torch.jit.trace`, the exporter of ONNX by way of
    TorchScript, OpenVINO, `make_fx`. Not `torch.compile` and `torch.export`, which know the
    operators of this package, and whose graphs would break at the questions below.
    """
    if torch.compiler.is_compiling():
        return False
    return is_jit_tracing() or (dispatch_modes() > 0 and has_proxy_mode())


def dispatch_modes_active() -> bool:
    """Whether a mode or a trace sees every operation: counts FLOPs, makes fakes, records."""
    return dispatch_modes() > 0 or is_jit_tracing()


@contextmanager
def untraced() -> Generator[None]:
    """Let no trace and no mode see what happens inside: it is a constant to them."""
    state = get_tracing_state()
    set_tracing_state(None)
    try:
        with modes_off():
            yield
    finally:
        set_tracing_state(state)
