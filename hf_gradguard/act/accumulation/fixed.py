"""`fixed`: every so many windows."""

from __future__ import annotations

from dataclasses import dataclass

from hf_gradguard.act.accumulation.policy import AccumulationPolicy, Choice, Held, policies
from hf_gradguard.act.checks import check_whole


@policies.register("fixed")
@dataclass
class Fixed(AccumulationPolicy):
    """Updates when `windows` windows are held, with their mean weighted by target tokens.

    It is what `gradient_accumulation_steps=4` does, in windows in place of micro-batches: bit for bit where the windows
    are equal and their number is a power of 2 (with others torch divides each gradient and this the sum of them).
    """

    windows: int = 4

    def __post_init__(self) -> None:
        check_whole(1, windows=self.windows)

    def decide(self, held: Held) -> Choice:
        return Choice(held.windows >= self.windows, held.windows, self.windows)
