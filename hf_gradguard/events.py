"""What the guard has to say: one `Event` for each thing found or done."""

from __future__ import annotations

from dataclasses import dataclass
from sys import intern
from typing import Any

ROUTINE = frozenset({"clipped", "deferred"})
"""Kinds that a policy may bring about in every window: logged quietly, and summed up where others are listed."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that was found or done, with everything that is known about where.

    A field that is unknown or does not apply is None. A run may hold a hundred thousand of them.
    """

    kind: str
    """What it is about. Found: `nonfinite`, or a verdict: `vanishing`, `exploding`, `dead` … Done: `clipped`,
    `deferred` (the window was held back), `skipped`, `discarded` (windows held back were given up), `stopped`. Said:
    `notice`, `warning`."""
    step: int
    """The Trainer's `global_step` at the end of the window concerned (1 for the first); 0 before training."""
    parameter: str | None = None
    """Name of the parameter concerned, as in `model.named_parameters()`."""
    layer: str | None = None
    """Name of the layer (a `Group` of the layout) concerned."""
    micro_batch: int | None = None
    """Index of the micro-batch within its window, from 0."""
    rank: int | None = None
    """Rank on which it happened, where that is known."""
    value: float | None = None
    """The number that was found; for `discarded` the number of windows."""
    threshold: float | None = None
    """The number it was held against."""
    action: str | None = None
    """What was done about it: `skip`, `stop`, `hold`, `clip`, `discard`; in a dry run what would have been done:
    `would skip`, `would hold` …; None where it was only observed."""
    message: str = ""
    """A plain sentence for people; empty where the other fields say it all."""

    def to_dict(self) -> dict[str, Any]:
        """The fields that are known, as JSON values (a non-finite number as its name)."""
        fields = {key: value for key in _FIELDS if (value := getattr(self, key)) is not None}
        if not self.message:
            del fields["message"]
        for key in ("value", "threshold"):
            number = fields.get(key)
            if number is not None and number - number != 0:  # inf and nan have no JSON form
                fields[key] = str(number)
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Event:
        """The inverse of `to_dict`; keys that this version does not know are left out."""
        values = {key: value for key, value in fields.items() if key in _FIELDS}
        for key in ("value", "threshold"):
            if isinstance(values.get(key), str):
                values[key] = float(values[key])
        for key in ("kind", "action"):
            if isinstance(values.get(key), str):
                values[key] = intern(values[key])  # the same few words in all events
        return cls(**values)


_FIELDS = Event.__slots__
