"""Native libraries: how one that was built with the package is found, and known to be right."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

NAME = "_native"


@dataclass(frozen=True)
class Interface:
    """What Python knows of a library.

    Attributes:
        functions: name -> C type of the result, and of the arguments.
        version_function: name of the one that tells the version of the library's sources.
        version: that these are written down for; one more whenever a function or a struct changes.
    """

    functions: Mapping[str, tuple[object, tuple[object, ...]]]
    version_function: str
    version: int

    def open(self, path: Path) -> ctypes.CDLL | None:
        """The library in one file, with the types of its functions; None where it is another one,
        or was built from another version of its sources.
        """
        try:
            found = ctypes.CDLL(str(path))
            version = getattr(found, self.version_function)
            version.restype, version.argtypes = ctypes.c_int, ()
            if version() != self.version:
                return None
            for name, (result, arguments) in self.functions.items():
                function = getattr(found, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError):
            return None
        return found

    def find(self, folder: Path) -> ctypes.CDLL | None:
        """The library that was built into a folder; None where it was not, or cannot be loaded."""
        paths = (folder / f"{NAME}{suffix}" for suffix in EXTENSION_SUFFIXES)
        return next((self.open(path) for path in paths if path.is_file()), None)
