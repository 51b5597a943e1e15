"""`noise_scale`: until the batch is as large as the gradient is noisy."""

from __future__ import annotations

from dataclasses import dataclass

from hf_gradguard.act.accumulation.policy import AccumulationPolicy, Choice, Held, policies
from hf_gradguard.act.checks import check_above_zero, check_order, check_whole


@policies.register("noise_scale")
@dataclass
class NoiseScaleTarget(AccumulationPolicy):
    """Updates when the target tokens held reach `fraction` × the gradient noise scale tr(Σ) / |G|².

    Source: McCandlish, Kaplan, Amodei and the OpenAI Dota Team 2018, arXiv 1812.06162: the noise scale (equation 2.9)
    predicts the critical batch, at which training takes twice the fewest steps and twice the least data (section 2.3),
    and appendix D has the batch follow it during training.

    Departures: the batch grows in whole windows, between `min_windows` and `max_windows`, and the learning rate is left
    alone. The estimate is of the updates before this one, so that when to stop doesn't depend on the gradients that are
    being measured. While it is unknown, or noise drowns the gradient, all of `max_windows` are taken: the largest batch
    is what shows most.
    """

    fraction: float = 1.0
    min_windows: int = 2
    """From 2: with one window an update would tell nothing about the noise, and the estimate would stay for ever."""
    max_windows: int = 8

    def __post_init__(self) -> None:
        check_above_zero(fraction=self.fraction)
        check_whole(2, min_windows=self.min_windows, max_windows=self.max_windows)
        check_order(self.min_windows, self.max_windows)

    def decide(self, held: Held) -> Choice:
        wanted = self.fraction * held.noise_scale
        is_enough = held.windows >= self.min_windows and held.weight >= wanted
        return Choice(is_enough or held.windows >= self.max_windows, held.weight, wanted)
