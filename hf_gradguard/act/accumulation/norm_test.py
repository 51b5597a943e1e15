"""`norm_test`: when the accumulated gradient is sure enough of its direction."""

from __future__ import annotations

from dataclasses import dataclass

from hf_gradguard.act.accumulation.policy import AccumulationPolicy, Choice, Held, policies
from hf_gradguard.act.checks import check_above_zero, check_order, check_whole


@policies.register("norm_test")
@dataclass
class NormTest(AccumulationPolicy):
    """Updates when the estimated squared error of the accumulated mean is at most η² ‖mean‖².

    With k equal windows: Σ ‖g_i − ĝ‖² / (k (k − 1)) ≤ η² ‖ĝ‖²; windows of unequal size are weighted by target tokens.

    Source: Byrd, Chin, Nocedal and Wu 2012, Sample size selection in optimization methods for machine learning,
    Mathematical Programming 134, 127–155, section 3: ‖Var(∇ℓ)‖₁ / |S| ≤ θ² ‖∇J_S‖². As used by AdAdaGrad (Lau, Liu and
    Kolar 2024, arXiv 2402.11215) and, with the gradients of data-parallel workers as the sample, by Lau et al. 2024
    (arXiv 2412.21124).

    Departures: the sample is the windows, not single examples; with few of them the test is rough. Where it fails, the
    papers choose a larger batch for the next update, ‖Var‖₁ / (η² ‖mean‖²), and never a smaller one again; this goes on
    adding to the same update, and the next begins anew. Asking after every window stops a little early, as any test
    does that is repeated until it passes.
    """

    eta: float = 0.5
    """Error allowed, as a share of the norm of the mean. About tr(Σ) / (η² |G|²) target tokens are needed."""
    min_windows: int = 2
    """From 2: one window tells nothing of the variance."""
    max_windows: int = 8

    def __post_init__(self) -> None:
        check_above_zero(eta=self.eta)
        check_whole(2, min_windows=self.min_windows, max_windows=self.max_windows)
        check_order(self.min_windows, self.max_windows)

    def decide(self, held: Held) -> Choice:
        allowed = self.eta**2 * held.mean_norm**2
        passes = held.windows >= self.min_windows and held.variance <= allowed
        return Choice(passes or held.windows >= self.max_windows, held.variance, allowed)
