"""Standing in front of a method of one object, for a while."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from typing import Any


class _Absent(enum.Enum):
    # A copy of an enumeration's member is the member itself.
    ABSENT = enum.auto()


class StandIn:
    """A replacement for a method of one object, until `remove`.

    Only the object is touched, never its class: other objects of the class do not notice. It composes with others:
    a method that somebody has wrapped before, on the object or at any time on its class, is what `original` calls; and
    if somebody wraps the object's method after us, `remove` leaves their wrapper in place and our part of it passes
    through.

    Args:
        owner: the object.
        name: its method.
        replacement: called as `replacement(original, *args, **kwargs)`.
    """

    def __init__(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        self._owner = owner  # as a bound method has it: `Trainer(...).train()` must find it alive
        self._name = name
        self._replacement: Callable[..., Any] | None = replacement
        self._before = _standing(vars(owner).get(name, _Absent.ABSENT))
        setattr(owner, name, self)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What would be called without us."""
        if self._before is not _Absent.ABSENT:
            return self._before(*args, **kwargs)
        return getattr(type(self._owner), self._name)(self._owner, *args, **kwargs)

    def stands_before(self, shipped: type) -> bool:
        """Whether the method behind us is the one that this class is shipped with, which nobody has overridden or
        wrapped."""
        defining = next(base for base in type(self._owner).__mro__ if self._name in vars(base))
        code = getattr(vars(shipped)[self._name], "__code__", None)
        shipped_in = getattr(sys.modules[shipped.__module__], "__file__", None)
        return (
            self._before is _Absent.ABSENT
            and defining is shipped
            and code is not None
            and code.co_filename == shipped_in
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._replacement is None:
            return self.original(*args, **kwargs)
        return self._replacement(self.original, *args, **kwargs)

    def __reduce__(self) -> Any:
        # A copy of the owner is not ours to stand in front of: it gets what is behind us.
        if self._before is _Absent.ABSENT:
            return getattr, (self._owner, self._name)
        return _same, (self._before,)

    def remove(self) -> None:
        """Puts back what was there; calling it again does nothing."""
        owner = self._owner
        if self._replacement is None:
            return
        self._replacement = None
        if vars(owner).get(self._name) is not self:
            return
        before = _standing(self._before)
        if before is _Absent.ABSENT:
            delattr(owner, self._name)
        else:
            setattr(owner, self._name, before)


def _same(method: Any) -> Any:
    return method


def _standing(method: Any) -> Any:
    """What is left of a method's wrappers without those of ours that have been removed."""
    while isinstance(method, StandIn) and method._replacement is None:
        method = method._before
    return method
