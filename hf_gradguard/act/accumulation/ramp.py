"""`ramp`: batch-size warm-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_gradguard.act.accumulation.policy import AccumulationPolicy, Choice, Held, policies
from hf_gradguard.act.checks import check_above_zero, check_whole


@policies.register("ramp")
@dataclass
class Ramp(AccumulationPolicy):
    """Updates of `start` windows at first, growing linearly to `end` windows over the first `over` windows or target
    tokens of the run.

    An update that begins after t of them takes ⌊start + (end − start) · min(1, t / over)⌋ windows.

    Source: Brown et al. 2020, arXiv 2005.14165, appendix B: GPT-3's batch grows linearly from 32 thousand tokens to its
    full size over the first 4 to 12 billion tokens. Departure: it grows in whole windows.
    """

    start: int = 1
    end: int = 8
    over: float = 1000
    unit: Literal["windows", "tokens"] = "windows"
    """What `over` counts."""

    def __post_init__(self) -> None:
        check_whole(1, start=self.start, end=self.end)
        check_above_zero(over=self.over)
        if self.start > self.end:
            raise ValueError(f"start={self.start} must not be above end={self.end}")
        if self.unit not in ("windows", "tokens"):
            raise ValueError(f"unit={self.unit!r} must be 'windows' or 'tokens'")

    def decide(self, held: Held) -> Choice:
        in_tokens = self.unit == "tokens"
        before = held.weight_seen - held.weight if in_tokens else held.windows_seen - held.windows
        windows = int(self.start + (self.end - self.start) * min(1.0, before / self.over))
        return Choice(held.windows >= windows, held.windows, windows)
