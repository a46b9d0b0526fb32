"""Building a model within the bounds of the file it comes from.

Modules are counted as they are put into others. What loops elsewhere is seen by a thread that
watches the builder's processor time and the memory of the process, and interrupts it. Nothing is
fetched meanwhile.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.nn.modules import module as torch_module

from mvpfx.file_limits import FileLimits

_EVERY_SECONDS = 0.01
_AT_ONCE_SECONDS = 0.3
"""Processor time that nobody is interrupted before, whatever the memory: it may be of others."""
_MEMORY = Path("/proc/self/statm")
_PAGE_BYTES = 4096


class _ExceededError(BaseException):
    """Not an `Exception`, so that nobody in between takes it for an error of theirs."""


@contextmanager
def bounded(limits: FileLimits) -> Generator[None]:
    """Build a model inside, in this thread.

    Raises:
        ValueError: it takes more than its limits.
    """
    watch = _Watch(limits)
    try:
        with _offline, watch:
            yield
    except _ExceededError:
        raise ValueError(f"{watch.reason}, more than its tensors can fill") from None


class _Watch:
    """Counts modules that this thread makes, and interrupts it when it takes too long."""

    def __init__(self, limits: FileLimits) -> None:
        self.reason = ""
        self._limits = limits
        self._builder = threading.get_ident()
        self._made = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> None:
        self._clock = _clock_of(self._builder)
        self._start, self._held = self._clock(), _resident()
        self._hook = torch_module.register_module_module_registration_hook(self._count)
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hook.remove()
        while not self._done.is_set() or self._thread.is_alive():
            try:
                self._done.set()
                self._thread.join()
            except _ExceededError:
                continue
        _interrupt(self._builder, None)  # one that is still on its way
        if self.reason and not isinstance(error, _ExceededError):
            raise _ExceededError

    def _count(self, module: Any, name: str, submodule: Any) -> None:
        if threading.get_ident() != self._builder:
            return
        self._made += 1
        if self._made > self._limits.modules:
            self.reason = f"it has more than {self._limits.modules} modules"
            raise _ExceededError

    def _look(self) -> None:
        while not self._done.wait(_EVERY_SECONDS):
            spent, grown = self._clock() - self._start, _resident() - self._held
            if spent > self._limits.seconds:
                self.reason = f"building it took more than {self._limits.seconds:.1f} seconds"
            elif spent > _AT_ONCE_SECONDS and grown > self._limits.grows:
                self.reason = f"building it took more than {self._limits.grows >> 20} MiB"
            else:
                continue
            _interrupt(self._builder, _ExceededError)
            self._done.wait(0.2)


class _Offline:
    """While one thread or another is inside, the hub's client fetches nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside, self._before = 0, False

    @property
    def _hub(self) -> Any:
        return importlib.import_module("huggingface_hub.constants")

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before, self._hub.HF_HUB_OFFLINE = self._hub.HF_HUB_OFFLINE, True
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._hub.HF_HUB_OFFLINE = self._before


_offline = _Offline()


def _interrupt(thread: int, error: type[BaseException] | None) -> None:
    """Raise an error in a thread, at its next step in Python; None takes back what is to come."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if error is None else ctypes.py_object(error)
    )


def _clock_of(thread: int) -> Callable[[], float]:
    """Seconds of the processor's time that a thread took; of the process where no system tells."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.process_time
    clock = time.pthread_getcpuclockid(thread)
    return lambda: time.clock_gettime(clock)


def _resident() -> int:
    """Bytes of memory that the process has; 0 where the system does not tell in this way."""
    try:
        return int(_MEMORY.read_text().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0
