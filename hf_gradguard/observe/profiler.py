"""Time profiles of a training: one each so many windows, for as long as that goes well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_gradguard.observe.reach import TimeProfile
from hf_gradguard.observe.time_profile import time_profile


class TimeProfiler:
    """Measures a time profile when one has come due, and never lets an exception out.

    Args:
        model: what is trained.
        every: one in the first window and each so many windows after it; 0 for never.
        last_step: the window that ends training, in which there is one as well; None where it is not known.
        obstacle: why none can be measured here; empty where one can.
    """

    def __init__(self, model: nn.Module, every: int, last_step: int | None = None, obstacle: str = "") -> None:
        self._model: nn.Module | None = model
        self._every = every
        self._last_step = last_step
        self._obstacle = obstacle
        self._step = 0
        self._said = ""

    def look(self, step: int, inputs: Mapping[str, Any]) -> TimeProfile | str | None:
        """To be called before a forward pass; a second call in one window does nothing.

        Args:
            step: of the window under way.
            inputs: what the model is about to be given.

        Returns:
            The profile; None if none is due; or why there is none, once for each reason.
        """
        if self._model is None or not self._is_due(step) or step == self._step:
            return None
        self._step = step
        if self._obstacle:
            self.end()
            return self._obstacle
        try:
            return time_profile(self._model, inputs)
        except ValueError as error:  # the next batch may do
            reason = str(error)
        except Exception as error:  # whatever it meets, the training goes on, and does not meet it again
            self.end()
            reason = f"{type(error).__name__}: {error}"
        is_news, self._said = reason != self._said, reason
        return reason if is_news else None

    def end(self) -> None:
        """Lets go of the model: nothing is measured any more."""
        self._model = None

    def _is_due(self, step: int) -> bool:
        return self._every > 0 and ((step - 1) % self._every == 0 or step == self._last_step)
