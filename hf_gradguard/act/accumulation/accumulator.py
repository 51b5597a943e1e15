"""Policy, buffer and noise scale together: what happens to each window, and what the optimizer gets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_gradguard.act.accumulation.held import HeldGradients
from hf_gradguard.act.accumulation.policy import AccumulationPolicy, Choice, Held
from hf_gradguard.act.nonfinite import drop_gradients
from hf_gradguard.observe.noise_scale import GradientNoise, NoiseScale, gradient_noise
from hf_gradguard.observe.norms import NO_GRADIENT


@dataclass(frozen=True)
class Taken:
    """What became of a window."""

    update: bool
    """Whether the optimizer is to step, on what is in `.grad` now."""
    value: float
    """What the policy measured; NaN where it was not asked."""
    threshold: float
    """What the policy compared it with; NaN where unknown."""
    windows: int
    """Windows in the accumulated gradient, this one included."""
    weight: float
    """Target tokens in it (micro-batches where there are no labels)."""
    norms: NDArray[np.float64]
    """L2 norms of the accumulated gradient as the update uses it `[parameters]`; `NO_GRADIENT` where there is none."""
    norm: float
    """L2 norm of all of it."""
    noise_scale: float
    """The gradient noise scale, this update included if there is one, in the unit of `weight`; NaN while unknown."""
    gradient_was_replaced: bool
    """False where `.grad` still is the window's own."""


class Accumulator:
    """Takes windows and says when the optimizer steps; until then it holds their gradients.

    What the update gets is Σ n_i g_i / Σ n_i, the gradient of one batch of all windows, where window i is a mean over
    n_i target tokens; or Σ g_i if the policy has `reduce="sum"`. The buffer holds Σ (n_i / n_1) g_i, so that equal
    windows are added as they are, as torch would.

    Args:
        policy: decides.
        parameters: the trainable parameters.
        names: of these parameters.
        shadow: only say what would be done: `.grad` is never touched.
        noise_smoothing: of the noise scale, see `NoiseScale`.
    """

    def __init__(
        self,
        policy: AccumulationPolicy,
        parameters: Sequence[nn.Parameter],
        names: Sequence[str],
        *,
        shadow: bool = False,
        noise_smoothing: float = 0.95,
    ) -> None:
        self.policy = policy
        self._parameters = parameters
        self._shadow = shadow
        self._sums = getattr(policy, "reduce", "mean") == "sum"
        self._buffer = HeldGradients(parameters, names)
        self._noise = NoiseScale(noise_smoothing)
        self._weights: list[float] = []  # of each window held
        self._squares: list[float] = []  # squared norm of each window held
        self._windows_seen = 0
        self._weight_seen = 0.0

    @property
    def windows(self) -> int:
        """Windows held now."""
        return len(self._weights)

    @property
    def noise_scale(self) -> float:
        """The gradient noise scale, in the unit of the windows' weights; NaN while unknown."""
        return self._noise.value

    def take(self, norms: NDArray[np.float64], weight: float, *, step: int, final: bool = False) -> Taken:
        """Takes in a window of finite gradients. If the optimizer is to step, `.grad` is the accumulated gradient
        afterwards; else it is None for every parameter.

        A first window that is to be used at once is left as it is: nothing is copied, nothing measured again.

        Args:
            norms: L2 norms of the window's gradients `[parameters]`; `NO_GRADIENT` where there is none.
            weight: number of target tokens in the window, over all processes (micro-batches where there are no
                labels). A window of 0 counts as a window and adds nothing.
            step: the window's number in the run.
            final: whether this is the last window of the run, with which the optimizer always steps.

        Raises:
            ValueError: `weight` is negative or not finite.
        """
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight={weight!r} of window {step} must be a number of target tokens from 0")
        window_norm = _total(norms)
        self._weights.append(weight)
        self._squares.append(window_norm**2)
        self._windows_seen += 1
        self._weight_seen += weight
        is_first = self.windows == 1
        if not is_first:
            self._add_window()
            norms = self._accumulated_norms()
        choice = self.policy.decide(self._view(step, window_norm, norms))
        if choice.update or final:
            return self._update(choice, norms, replace=not is_first)
        if is_first:
            self._add_window()
        if not self._shadow:
            drop_gradients(self._parameters)
        return self._taken(choice, norms, update=False, replaced=not self._shadow)

    def finish(self) -> Taken | None:
        """Leaves what is held in `.grad` for a last update, without a further window; None where nothing is held. For
        the end of training, when its last window was not taken in."""
        if not self.windows:
            return None
        return self._update(Choice(True, math.nan, math.nan), self._accumulated_norms(), replace=True)

    def discard(self) -> int:
        """Drops what is held, and returns how many windows that were."""
        windows = self.windows
        self._empty()
        return windows

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved with a checkpoint, as JSON values; with `tensors` it is everything."""
        return {
            "policy": self.policy.state_dict(),
            "noise_scale": self._noise.state_dict(),
            "windows_seen": self._windows_seen,
            "weight_seen": self._weight_seen,
            "weights": list(self._weights),
            "squares": list(self._squares),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave; call `load_tensors` next, with nothing if the tensors are lost."""
        self._empty()
        self.policy.load_state_dict(state["policy"])
        self._noise.load_state_dict(state["noise_scale"])
        self._windows_seen = int(state["windows_seen"])
        self._weight_seen = float(state["weight_seen"])
        self._weights = [float(weight) for weight in state["weights"]]
        self._squares = [float(square) for square in state["squares"]]

    def tensors(self) -> dict[str, Tensor]:
        """The held gradients by name, for saving; see `HeldGradients.tensors`."""
        return self._buffer.tensors()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `tensors` gave, of the windows that `load_state_dict` told of. Tensors without windows are left
        aside, and windows without tensors are dropped (`windows` is then 0): neither is of use without the other.

        Raises:
            ValueError: the tensors are of another model or of another number of processes.
        """
        if self.windows and tensors:
            self._buffer.load(tensors)
        else:
            self._empty()

    def take_over(self, other: Accumulator) -> None:
        """Goes on where another one was, of the same model with other trainable parameters; what it held of those that
        are frozen now is left out."""
        self.load_state_dict(other.state_dict())
        self.load_tensors(self._buffer.own(other.tensors()))

    def _add_window(self) -> None:
        """Adds the gradients of the window whose weight was noted last."""
        share = self._shares()[-1]
        if share > 0:
            self._buffer.add(share)

    def _shares(self) -> list[float]:
        """What each window held is multiplied with in the buffer."""
        if self._sums:
            return [float(weight > 0) for weight in self._weights]
        unit = self._weights[0] or 1.0
        return [weight / unit for weight in self._weights]

    def _mean_scale(self) -> float:
        """What makes the mean of what the buffer holds."""
        return 1 / (sum(self._shares()) or 1.0)

    def _scale(self) -> float:
        """What makes the update of what the buffer holds."""
        return 1.0 if self._sums else self._mean_scale()

    def _accumulated_norms(self) -> NDArray[np.float64]:
        norms = self._buffer.norms()
        return np.where(norms == NO_GRADIENT, NO_GRADIENT, norms * self._scale())

    def _mean_norm(self, norms: NDArray[np.float64]) -> float:
        return _total(norms) / self._scale() * self._mean_scale()

    def _gradient_noise(self, norms: NDArray[np.float64]) -> GradientNoise:
        return gradient_noise(self._weights, self._squares, self._mean_norm(norms) ** 2, self._shares())

    def _view(self, step: int, window_norm: float, norms: NDArray[np.float64]) -> Held:
        return Held(
            step=step,
            windows=self.windows,
            weight=sum(self._weights),
            window_norm=window_norm,
            norm=_total(norms),
            variance=self._gradient_noise(norms).squared_error,
            mean_norm=self._mean_norm(norms),
            noise_scale=self.noise_scale,
            windows_seen=self._windows_seen,
            weight_seen=self._weight_seen,
        )

    def _update(self, choice: Choice, norms: NDArray[np.float64], *, replace: bool) -> Taken:
        self._noise.add(self._gradient_noise(norms))
        replace = replace and not self._shadow
        taken = self._taken(choice, norms, update=True, replaced=replace)
        if replace:
            self._buffer.release(self._scale())
        self._empty()
        return taken

    def _taken(self, choice: Choice, norms: NDArray[np.float64], *, update: bool, replaced: bool) -> Taken:
        return Taken(
            update=update,
            value=choice.value,
            threshold=choice.threshold,
            windows=self.windows,
            weight=sum(self._weights),
            norms=norms,
            norm=_total(norms),
            noise_scale=self.noise_scale,
            gradient_was_replaced=replaced,
        )

    def _empty(self) -> None:
        self._buffer.clear()
        self._weights, self._squares = [], []


def _total(norms: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(norms[norms != NO_GRADIENT]))
