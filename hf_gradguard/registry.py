"""Policies by name: `name` or `name:key=value,key=value`, the same in Python, YAML and on the command line."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from types import NoneType
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

P = TypeVar("P")
C = TypeVar("C", bound=type)


class Registry(Generic[P]):
    """The policies of one kind, each a dataclass whose fields are its options.

    Args:
        kind: what the policies are for, as the configuration calls it.
        absent: the name that stands for having none at all, if there is one.
        noun: what one of them is called in messages.

    Example:
        >>> rules: Registry[object] = Registry("nonfinite")
        >>> @rules.register("skip")
        ... @dataclasses.dataclass
        ... class Skip:
        ...     max_consecutive: int = 20
        >>> rules.parse("skip:max_consecutive=5")
        Skip(max_consecutive=5)
    """

    def __init__(self, kind: str, absent: str | None = None, noun: str = "policy") -> None:
        self.kind = kind
        self.absent = absent
        self._noun = noun
        self._policies: dict[str, type] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator that makes a dataclass known under a name."""

        def add(policy: C) -> C:
            if not dataclasses.is_dataclass(policy):
                raise TypeError(f"{policy.__name__} must be a dataclass: write @dataclass below @register({name!r})")
            self._policies[name] = policy
            return policy

        return add

    def names(self) -> list[str]:
        """The names that `parse_optional` knows, sorted."""
        return sorted([*self._policies, *([] if self.absent is None else [self.absent])])

    def classes(self) -> dict[str, type]:
        """The class of each policy by its name, sorted."""
        return dict(sorted(self._policies.items()))

    def parse_optional(self, spec: str | P) -> P | None:
        """As `parse`, and None for the name that stands for no policy."""
        return None if isinstance(spec, str) and spec.strip() == self.absent else self.parse(spec)

    def canonical(self, spec: str | P) -> str:
        """The text form of a policy given as text or as an object; raises ValueError as `parse` does."""
        policy = self.parse_optional(spec)
        return spec.strip() if policy is None or isinstance(spec, str) else self.text(policy)  # type: ignore[union-attr]

    def parse(self, spec: str | P) -> P:
        """The policy that a text describes; a policy object is returned as it is.

        Raises:
            ValueError: the name or an option is unknown, or a value does not fit; the message tells which, and what
                would fit.
        """
        if not isinstance(spec, str):
            if type(spec) not in self._policies.values():
                raise ValueError(f"{self.kind}={spec!r} is no {self.kind} {self._noun}. {self._known()}")
            return spec
        name, _, options = spec.strip().partition(":")
        if name == self.absent:
            raise ValueError(f"{self.kind}={spec!r}: {name!r} takes no options")
        if name not in self._policies:
            raise ValueError(f"unknown {self.kind} {self._noun} {name!r}{nearest(name, self.names())}. {self._known()}")
        try:
            return self._policies[name](**_values(self._policies[name], name, options))  # type: ignore[no-any-return]
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


def _values(policy: type, name: str, text: str) -> dict[str, Any]:
    """The options of a policy from their text, as its class takes them."""
    hints = get_type_hints(policy)
    fields = {field.name: field for field in dataclasses.fields(policy) if field.init}
    values: dict[str, Any] = {}
    for option in filter(None, (part.strip() for part in text.split(","))):
        key, separator, value = (part.strip() for part in option.partition("="))
        if not separator:
            raise ValueError(f"{option!r} is not of the form key=value")
        if key not in fields:
            known = f"Known: {', '.join(fields)}" if fields else "It takes no options"
            raise ValueError(f"unknown option {key!r}{nearest(key, fields)}. {known}")
        values[key] = _convert(key, value, hints[key])
    required = [key for key, field in fields.items() if _has_no_default(field)]
    if missing := [key for key in required if key not in values]:
        example = ",".join(f"{key}=…" for key in required)
        raise ValueError(f"{' and '.join(missing)} must be given: write {name}:{example}")
    return values


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(place: str, text: str, kind: Any) -> Any:
    kinds = [option for option in get_args(kind) if option is not NoneType]
    if get_origin(kind) is Literal:
        if text not in kinds:
            raise ValueError(f"{place}={text!r}{nearest(text, kinds)} must be one of {', '.join(kinds)}")
        return text
    if len(kinds) < len(get_args(kind)):  # a union with None
        return None if text.lower() == "none" else _convert(place, text, kinds[0])
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{place}={text!r} must be true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{place}={text!r} must be of type {kind.__name__}") from None
