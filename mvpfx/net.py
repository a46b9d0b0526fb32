"""The net under every optimisation: what fails inside is told, and the call runs without it.

Recording, planning and native kernels only make a call faster, so where one of them fails for a
program that nobody thought of, the module's own forward or torch's own operations serve. The reason
becomes a decision that `mvpfx.explain` shows, and is logged once. What the user has to mend is a
`RefusedError`, and passes.

With `MVPFX_NET=off` in the environment such faults are raised, as they are in the tests.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from mvpfx.recording import CaptureError

SWITCH = "MVPFX_NET"
"""Environment variable; "off" lets faults through."""

_logger = logging.getLogger("mvpfx")
_said: set[str] = set()
_PACKAGE = str(Path(__file__).parent)
_PASSING_ON = ("recorder.py", "interception.py", "leaves.py", "region.py", "swap.py", "mask.py")
"""Files that run what the user wrote, or operations of torch for it: what fails there on fakes may
be the program's own fault, or something that fakes cannot do."""


class RefusedError(ValueError):
    """What the user has to mend before a call can run; it passes through the net."""


class RefusedTypeError(TypeError):
    """The same of a dtype."""


def is_on() -> bool:
    """Whether faults are caught."""
    return os.environ.get(SWITCH, "").lower() != "off"


def caught(error: Exception, what: str) -> str:
    """The reason that is kept of a fault, logged where it is new.

    Args:
        error: that was raised inside.
        what: was being done.

    Raises:
        Exception: `error` itself, where the net is off or the user has to mend it.
    """
    if isinstance(error, (RefusedError, RefusedTypeError)) or not is_on():
        raise error
    first_line = str(error).partition("\n")[0]
    reason = f"{what} failed: {type(error).__name__}: {first_line}"
    if reason not in _said:
        _said.add(reason)
        advice = "The result is the same, computed more slowly. Please report this."
        _logger.warning("%s. %s", reason, advice, exc_info=error)
    return reason


@contextmanager
def guarded(what: str) -> Generator[None]:
    """Turn faults inside into the reason why there is no graph.

    Raises:
        CaptureError: with the reason.
        RefusedError: as it was raised.
    """
    try:
        yield
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(caught(error, what)) from error


def is_our_own(error: Exception) -> bool:
    """Whether an exception was raised by this package, and not by what it ran for the user."""
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    path = Path(last.tb_frame.f_code.co_filename)
    return str(path).startswith(_PACKAGE) and path.name not in _PASSING_ON
