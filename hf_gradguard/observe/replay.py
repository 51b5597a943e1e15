"""The micro-batches of the window under way, kept so that the first one that goes wrong can be run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from hf_gradguard.observe.origin import MicroBatch, Origin, trace
from hf_gradguard.observe.random_state import RandomState


class Replays:
    """Keeps references to the inputs of a window's micro-batches, and nothing more, until one has been traced.

    Args:
        model: what is trained.
        budget: how many micro-batches may be traced.
    """

    def __init__(self, model: nn.Module, budget: int) -> None:
        self._model: nn.Module | None = model
        self._budget = budget
        self._kept: dict[int, MicroBatch | None] = {}
        self.is_running = False
        """Whether a micro-batch is being run again at this moment: what it does is no part of the training."""

    def keep(self, index: int, run: Callable[[], object], inputs: Mapping[str, Any]) -> None:
        """To be called before the forward pass of a micro-batch.

        Args:
            index: of the micro-batch within its window, from 0. A second forward pass within one micro-batch makes it
                one that can't be run again.
            run: its forward and backward pass.
            inputs: what the model is given.
        """
        if self._budget > 0 and not self.is_running:
            is_known = index in self._kept
            self._kept[index] = None if is_known else MicroBatch(run, inputs, RandomState.capture())

    def forget(self) -> None:
        """To be called when the window is over."""
        self._kept.clear()

    def end(self) -> None:
        """Lets go of the model: nothing is kept or run any more."""
        self.forget()
        self._budget, self._model = 0, None

    def trace(self, index: int) -> tuple[MicroBatch, Origin] | None:
        """Runs a micro-batch again and finds where its first non-finite value was made; None where it is not at hand
        or the budget is spent."""
        micro_batch = self._kept.get(index)
        if micro_batch is None or self._model is None:
            return None
        self._budget -= 1
        self.is_running = True
        try:
            return micro_batch, trace(self._model, micro_batch)
        finally:
            self.is_running = False
