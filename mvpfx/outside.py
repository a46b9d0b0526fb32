"""What the Python code of a forward reads outside of its modules: globals, class attributes,
closures and default arguments.

Which code may run is found from the code alone: the functions of a region's modules, and whatever
functions those name, as far as they belong to neither torch nor the standard library. That is more
than one call runs, which costs a comparison and no more.
"""

from __future__ import annotations

import builtins
import functools
import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, cast

from torch import nn

from mvpfx.held_values import LONGEST, is_container, own_values, same, walk

_LIBRARIES = frozenset(("torch", "mvpfx", "numpy", "sympy", "functools")) | sys.stdlib_module_names
_MISSING = object()
_EMPTY = object()
_PATCHED = frozenset(("get_interface",))
"""What recordings put in the place of transformers' own; another thread may record."""
MOST_FUNCTIONS = 2000
"""Further functions are not looked at; no forward of a block names as many."""


class _Scope:
    """The globals of a function, as attributes of an object."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.__dict__ = names


Owner = type | ModuleType | _Scope


class Outside:
    """What the forwards of a region's modules may read besides what these hold.

    Attributes:
        caches: functions among them that keep their results, as `functools.lru_cache` does.
    """

    def __init__(self, module: nn.Module) -> None:
        code = _Code(module)
        self.caches = code.caches
        self._places = list(dict.fromkeys(code.places()))
        self._slots = [(_variables(owner).get, name) for owner, name in self._places]
        self._cells = code.cells
        self._functions = code.functions
        self._owners = [(owner, set(_variables(owner))) for owner in code.owners]
        self._values = self._now()
        held = enumerate(self._values)
        self._deep = {place: _deep(value) for place, value in held if _is_deep(value)}
        self._sizes = [cache.cache_info().misses for cache in self.caches]

    def holds(self) -> bool:
        """Whether all of it is what it was when this was made."""
        now = self._now()
        return same(now, self._values) and all(
            same(_deep(now[place]), then) for place, then in self._deep.items()
        )

    def restore(self) -> list[str]:
        """Undo what changed since this was made, but for what lies in containers; its names."""
        changed: list[str] = []
        for cache, misses in zip(self.caches, self._sizes, strict=True):
            if cache.cache_info().misses != misses:
                cache.cache_clear()  # it may hold a fake; nothing is lost but time
        for (owner, name), now, then in zip(self._places, self._now(), self._values, strict=False):
            if not same((now,), (then,)):
                changed.append(f"{_name(owner)}.{name}")
                setattr(owner, name, then)
        for owner, before in self._owners:
            for name in set(_variables(owner)) - before:
                if name.startswith("__"):  # __annotations__ and the like come when they are read
                    continue
                changed.append(f"{_name(owner)}.{name}")
                delattr(owner, name)
        for cell, then in zip(self._cells, self._values[len(self._slots) :], strict=True):
            if not same((_content(cell),), (then,)):
                changed.append("a variable of an enclosing function")
                cell.cell_contents = then
        return changed

    def containers(self) -> Iterator[tuple[str, Any]]:
        """The containers that it leads to, each with a name for people."""
        for function in self._functions:
            yield function.__name__, vars(function)
        seen: set[int] = set()
        for place in self._deep:
            name = self._slots[place][1] if place < len(self._slots) else "an enclosing function"
            for found in walk(self._values[place], seen):
                if is_container(found):
                    yield name, found

    def _now(self) -> list[Any]:
        values = [get(name, _MISSING) for get, name in self._slots]
        return values + [_content(cell) for cell in self._cells]


class _Code:
    """The functions that a region's forward may run, found by the names in their code.

    Attributes:
        cells: the variables of enclosing functions that they read.
        caches: the functions that keep their results.
        functions: all of them.
    """

    def __init__(self, module: nn.Module) -> None:
        self.classes: dict[type, None] = {}
        self.cells: list[CellType] = []
        self.caches: list[Any] = []
        self.functions: list[FunctionType] = []
        self._seen: set[int] = set()
        self._codes: list[tuple[CodeType, _Scope]] = []
        self._scopes: dict[int, _Scope] = {}
        self._names: set[str] = set()
        self._waiting: list[FunctionType] = []
        for part in module.modules():
            self._add_class(type(part))
            for _, value in own_values(part):
                self._add_object(value)
        self._follow(("forward", "__call__"))

    @property
    def owners(self) -> list[Owner]:
        """The classes and Python modules that the code could write to."""
        return [*self.classes, *dict.fromkeys(outer for _, outer in self._codes)]

    def places(self) -> Iterator[tuple[Owner, str]]:
        """What is read: a class or Python module, and a name in it."""
        for code, outer in self._codes:
            for name in code.co_names:
                value = vars(outer).get(name, _MISSING)
                if value is _MISSING:
                    continue
                yield outer, name
                if isinstance(value, (type, ModuleType)) and not _is_library(value):
                    yield from _attributes(value, code.co_names)
        for kind in self.classes:
            for name, value in vars(kind).items():
                own = name[:2] != "__" or isinstance(value, FunctionType)
                if name in self._names and own and name not in _PATCHED:
                    yield kind, name

    def _follow(self, names: tuple[str, ...]) -> None:
        fresh = set(names)
        while fresh or self._waiting:
            self._names |= fresh
            for kind in list(self.classes):  # more may be found on the way
                for name in self._names & vars(kind).keys():
                    self._add_object(vars(kind)[name])
            fresh = set()
            while self._waiting and len(self._codes) < MOST_FUNCTIONS:
                fresh |= self._read(self._waiting.pop()) - self._names

    def _read(self, function: FunctionType) -> set[str]:
        """Look at one function; the names in its code."""
        names: set[str] = set()
        self.functions.append(function)
        if vars(function).keys() - {"__wrapped__"}:
            self.cells.append(CellType(vars(function)))
        outer = self._scopes.setdefault(id(function.__globals__), _Scope(function.__globals__))
        for code in _nested(function.__code__):
            self._codes.append((code, outer))
            names.update(code.co_names)
            for name in code.co_names:
                self._add_object(function.__globals__.get(name))
        for cell in function.__closure__ or ():
            self.cells.append(cell)
            self._add_object(_content(cell))
        self._add_object(getattr(function, "__wrapped__", None))
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if _is_deep(default):
                self.cells.append(CellType(default))
        return names

    def _add_class(self, kind: type) -> None:
        for base in kind.__mro__:
            if base is not object and not _is_library(base):
                self.classes.setdefault(base)

    def _add_object(self, value: Any) -> None:
        """Let a function be looked at; of other objects the functions behind them."""
        if value is None or id(value) in self._seen or isinstance(value, (str, int, float)):
            return
        self._seen.add(id(value))
        if isinstance(value, FunctionType):
            if not _is_library(value):
                self._waiting.append(value)
        elif isinstance(value, (classmethod, staticmethod, MethodType)):
            self._add_object(cast("Any", value).__func__)
        elif isinstance(value, property):
            self._add_object(value.fget)
        elif isinstance(value, functools.partial):
            for inner in (cast("Any", value).func, *value.args, *value.keywords.values()):
                self._add_object(inner)
        elif isinstance(value, (dict, list, tuple)):
            held = dict.values(cast("Any", value)) if isinstance(value, dict) else value
            for inner in islice(held, LONGEST):
                self._add_object(inner)
        elif isinstance(value, functools._lru_cache_wrapper):  # pyright: ignore[reportPrivateUsage]
            self.caches.append(value)
            self._add_object(value.__wrapped__)
        elif not isinstance(value, (type, ModuleType, nn.Module)) and hasattr(value, "__dict__"):
            self._add_class(type(value))


def _attributes(value: Any, names: tuple[str, ...]) -> Iterator[tuple[Owner, str]]:
    """Where a class or module holds what code that names it may read of it."""
    owners = value.__mro__ if isinstance(value, type) else (value,)
    for owner in owners:
        if not _is_library(owner):
            for name in (vars(owner).keys() & set(names)) - _PATCHED:
                yield owner, name


def _nested(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _is_library(value: Any) -> bool:
    name = value.__name__ if isinstance(value, ModuleType) else value.__module__
    return str(name).partition(".")[0] in _LIBRARIES or value is builtins


def _is_deep(value: Any) -> bool:
    """Whether a value holds others that may change while it stays the same object."""
    if isinstance(value, (FunctionType, MethodType, type, ModuleType, nn.Module)):
        return False
    kind = type(value)
    if kind.__module__ == "builtins" or is_container(value):
        return is_container(value) and not isinstance(value, (str, bytes))
    return not _is_library(kind) and kind.__module__.partition(".")[0] != "transformers"


def _deep(value: Any) -> tuple[Any, ...]:
    found = walk(value, set())
    return tuple(type(each) if is_container(each) else each for each in found)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that has no value yet
        return _EMPTY


def _name(owner: Owner) -> str:
    return str(getattr(owner, "__name__", "globals"))


def _variables(owner: Owner) -> Mapping[str, Any]:
    return vars(owner)
