"""Policies by name: `name` or `name:key=value,key=value`, the same in Python, YAML and on the command line."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any, Generic, TypeVar, get_type_hints

P = TypeVar("P")
C = TypeVar("C", bound=type)


class Registry(Generic[P]):
    """The policies of one kind, each a dataclass whose fields are its options.

    Example:
        >>> rules: Registry[object] = Registry("nonfinite")
        >>> @rules.register("skip")
        ... @dataclasses.dataclass
        ... class Skip:
        ...     max_consecutive: int = 20
        >>> rules.parse("skip:max_consecutive=5")
        Skip(max_consecutive=5)
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._policies: dict[str, type] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator that makes a dataclass known under a name."""

        def add(policy: C) -> C:
            self._policies[name] = policy
            return policy

        return add

    def names(self) -> list[str]:
        """The names that `parse` knows, sorted."""
        return sorted(self._policies)

    def parse(self, spec: str | P) -> P:
        """The policy that a text describes; a policy object is returned as it is.

        Raises:
            ValueError: the name or an option is unknown, or a value does not fit; the message tells which, and what
                would fit.
        """
        if not isinstance(spec, str):
            if type(spec) not in self._policies.values():
                raise ValueError(f"{self.kind}={spec!r} is no {self.kind} policy. {self._known()}")
            return spec
        name, _, options = spec.strip().partition(":")
        if name not in self._policies:
            raise ValueError(f"unknown {self.kind} policy {name!r}{nearest(name, self._policies)}. {self._known()}")
        policy = self._policies[name]
        hints = get_type_hints(policy)
        types = {field.name: hints[field.name] for field in dataclasses.fields(policy) if field.init}
        values: dict[str, Any] = {}
        for option in filter(None, (part.strip() for part in options.split(","))):
            key, separator, text = (part.strip() for part in option.partition("="))
            if not separator:
                raise ValueError(f"{self.kind}={spec!r}: {option!r} is not of the form key=value")
            if key not in types:
                known = f"Known: {', '.join(types)}" if types else "It takes no options"
                raise ValueError(f"{self.kind}={spec!r}: unknown option {key!r}{nearest(key, types)}. {known}")
            values[key] = _convert(f"{self.kind}={spec!r}: {key}", text, types[key])
        try:
            return policy(**values)  # type: ignore[no-any-return]
        except ValueError as error:
            raise ValueError(f"{self.kind}={spec!r}: {error}") from None

    def text(self, policy: P) -> str:
        """The text form of a policy, which `parse` turns back into an equal one."""
        name = next(name for name, known in self._policies.items() if known is type(policy))
        fields = dataclasses.fields(policy)  # type: ignore[arg-type]
        options = ",".join(f"{field.name}={getattr(policy, field.name)}" for field in fields if field.init)
        return f"{name}:{options}" if options else name

    def _known(self) -> str:
        return f"Known: {', '.join(self.names())}"


def nearest(name: str, known: Any) -> str:
    """`; did you mean 'x'?` for the known name closest to a misspelt one, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _convert(place: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{place}={text!r} must be true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{place}={text!r} must be of type {kind.__name__}") from None
