"""What the guard has to say: one `Event` for each thing found or done."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """One thing that was found or done, with everything that is known about where.

    A field that is unknown or does not apply is None.
    """

    kind: str
    """What it is about: `nonfinite`, `stopped`, `warning`, or a verdict: `vanishing`, `exploding`, `dead` …"""
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
    """The number that was found."""
    threshold: float | None = None
    """The number it was held against."""
    action: str | None = None
    """What was done about it: `skip`, `stop`, or None where it was only observed."""
    message: str = ""
    """A plain sentence for people."""

    def to_dict(self) -> dict[str, Any]:
        """The fields that are known, as JSON values (a non-finite number as its name)."""
        fields = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        for key in ("value", "threshold"):
            number = fields.get(key)
            if number is not None and number - number != 0:  # inf and nan have no JSON form
                fields[key] = str(number)
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Event:
        """The inverse of `to_dict`; keys that this version does not know are left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in fields.items() if key in known}
        for key in ("value", "threshold"):
            if isinstance(values.get(key), str):
                values[key] = float(values[key])
        return cls(**values)
