"""Where the verdicts draw their lines."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from hf_gradguard.judge.profile import STARVING_SHARE


@dataclass(frozen=True)
class Thresholds:
    """Every line that a verdict draws, with the measurements that put it there.

    They are of byte-level models 64 wide on real text, 60 to 1500 updates of 8 × 64 bytes with AdamW, clipped to a norm
    of 1, with a warm-up of 20 updates: GPT-2, BERT, LLaMA and T5 of 4, 12 and 24 layers, GPT-2 and LLaMA of 100;
    ReZero and zero-initialised branches; batches of one, no warm-up, and learning rates from 1e-4 to 1e-2. All of these
    trained, and were healthy at every judgement; the exceptions are named where they matter.

    Raises:
        ValueError: on making one with an impossible value; the message names the field, the value and what would fit.
    """

    window: int = 20
    """Updates that are judged together; each number is a median over them. Single updates are noise: in the healthy
    runs the total norm of one update was up to 55 times the median of its run (24-layer ReZero), the median of 20
    updates never twice the usual."""
    min_updates: int = 10
    """Updates before the first judgement. The first ones say little: gradients of zero-initialised branches arrive
    after one update, of LoRA's A after one, and a 24-layer BERT at 1e-3 dips to a twentieth in its warm-up and comes
    back."""
    every: int = 5
    """Updates from one judgement to the next. A judgement of 1000 layers takes about 0.3 ms."""
    patience: int = 2
    """Judgements in a row that must find the same before it is the verdict. With 2, `window` and `every` as they are,
    100-layer BERT was called vanishing after 25 updates at a learning rate of 3e-3, and after 35 and 40 at 1e-3."""
    min_layers: int = 4
    """Layers with a gradient that a stack needs for its depth to be judged; of fewer, the first and the last are all
    there is, and those differ for their own reasons."""
    vanishing: float = 3e-3
    """Vanishing when the lowest eighth of the layers gets less than this share of the gradient norm of the top. Runs
    that trained never went under 3.6e-2 (100-layer BERT at 3e-4, in its warm-up; 7.2e-2 up to 24 layers). 100-layer
    BERT at 1e-3 and 3e-3 fell to 2e-4 … 1e-13, and did not learn more than how frequent the bytes are."""
    starving: float = STARVING_SHARE
    """A layer starves when it gets less than this share of the gradient norm of the top of its stack. It tells from
    where down a vanishing gradient leaves layers without; it raises no alarm by itself."""
    exploding: float = 300.0
    """Exploding when the lowest eighth of the layers gets more than this many times the gradient norm of the top. Runs
    that trained never went over 13 (LLaMA of 4 layers at a learning rate of 1e-2; the very first layer of GPT-2 of 100
    got 100 times the last one's norm and is no reason for alarm), and LLaMA at an absurd rate of 3 reached 42. Deep
    stacks without normalisation and with weights initialised too large had 500 to 2000."""
    growth: float = 5.0
    """Exploding when the median total norm is this many times what it usually is in this run (`History.usual_norm`).
    Runs that trained never went over 1.9 (24-layer ReZero); GPT-2 and LLaMA that diverged at learning rates of 1, 3 and
    10 reached 9 to 29."""
    zero_gradients: float = 0.5
    """Underflow when over this share of the gradient elements of a layer are exactly zero, where 16 bits carry them. Of
    healthy gradients unscaled in fp16 at most 16 % became zero (12-layer BERT), in bf16 none; of the lower layers of
    the 100-layer BERT all did."""
    stalled_weights: float = 0.6
    """Underflow when an update leaves over this share of a layer's weights as they were, where 16 bits keep them. GPT-2
    of 4 layers in pure bf16 under AdamW: 0.2 at a learning rate of 1e-3 and 0.4 at 3e-4, where the loss after 200
    updates was 0.03 and 0.06 above that in float32; 0.7 at 1e-4 and 0.87 at 1e-5, where it was 0.14 and 0.22 above.
    When a schedule ends at zero, its last updates stall too."""

    def __post_init__(self) -> None:
        for name, lowest in (("window", 1), ("min_updates", 1), ("every", 1), ("patience", 1), ("min_layers", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ValueError(f"thresholds: {name}={value!r} must be a whole number from {lowest}")
        if self.min_updates > self.window:
            raise ValueError(
                f"thresholds: min_updates={self.min_updates} can't be more than window={self.window}, "
                "the updates that are kept"
            )
        for name in ("vanishing", "starving", "zero_gradients", "stalled_weights"):
            _check_between(name, getattr(self, name), 0.0, 1.0)
        for name in ("exploding", "growth"):
            _check_between(name, getattr(self, name), 1.0, math.inf)

    def to_dict(self) -> dict[str, int | float]:
        """The fields as JSON values; `Thresholds(**values)` is the inverse."""
        return dataclasses.asdict(self)


def _check_between(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low < value < high:
        bounds = f"above {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise ValueError(f"thresholds: {name}={value!r} must be a finite number {bounds}")
