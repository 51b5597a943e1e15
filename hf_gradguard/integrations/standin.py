"""Standing in front of a method of one object, for a while."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

_ABSENT = object()


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
        self._owner = owner
        self._name = name
        self._replacement: Callable[..., Any] | None = replacement
        self._before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, self)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What would be called without us."""
        if self._before is not _ABSENT:
            return self._before(*args, **kwargs)
        return getattr(type(self._owner), self._name)(self._owner, *args, **kwargs)

    def stands_before_stock(self) -> bool:
        """Whether the method behind us is the one that its library ships, wrapped by nobody."""
        defining = next(base for base in type(self._owner).__mro__ if self._name in vars(base))
        code = getattr(vars(defining)[self._name], "__code__", None)
        shipped_in = sys.modules[defining.__module__].__file__
        return self._before is _ABSENT and code is not None and code.co_filename == shipped_in

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._replacement is None:
            return self.original(*args, **kwargs)
        return self._replacement(self.original, *args, **kwargs)

    def remove(self) -> None:
        """Puts back what was there; calling it again does nothing."""
        if self._replacement is None:
            return
        self._replacement = None
        if vars(self._owner).get(self._name) is not self:
            return
        if self._before is _ABSENT:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._before)
