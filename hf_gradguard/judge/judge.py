"""The verdict on a run as it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import ArrayLike

from hf_gradguard.judge.history import History
from hf_gradguard.judge.stacks import Stack
from hf_gradguard.judge.thresholds import Thresholds
from hf_gradguard.judge.verdict import Verdict, judge


class Judge:
    """Judges every few updates and speaks up when the verdict has changed for good.

    A new verdict counts once it was found in `thresholds.patience` judgements one after another, so that one odd
    window is no news. Deterministic: the same updates give the same verdicts, also across a save and a load.

    Args:
        stacks: the model's stacks of layers, covering all columns of a reading.
        thresholds: where the lines are drawn, and how often it is judged.

    Example:
        >>> from hf_gradguard.judge import Judge, Stack
        >>> judge = Judge([Stack.of_depth(12)])
        >>> for step in range(1, 41):
        ...     changed = judge.update([2.0**layer for layer in range(12)], total_norm=2.0**12)
        >>> judge.verdict.kind
        'vanishing'
    """

    def __init__(self, stacks: Sequence[Stack], thresholds: Thresholds | None = None) -> None:
        self.stacks = tuple(stacks)
        self.thresholds = thresholds or Thresholds()
        self.history = History(sum(len(stack.columns) for stack in stacks), window=self.thresholds.window)
        self._verdict = judge(self.history, self.stacks, self.thresholds)
        self._candidate: tuple[str, str] | None = None
        self._times = 0

    @property
    def verdict(self) -> Verdict:
        """The verdict that holds; its numbers are those of the latest judgement that came to it."""
        if self.history.count < self.thresholds.min_updates or self._verdict.kind == "unknown":
            return judge(self.history, self.stacks, self.thresholds)
        return self._verdict

    def update(self, layer_norms: ArrayLike, total_norm: float) -> Verdict | None:
        """Takes in one update, as `History.add` does; one with a norm that is not finite is left out.

        Returns:
            The new verdict when it has changed, else None.
        """
        if not self.history.add(layer_norms, total_norm):
            return None
        late = self.history.count - self.thresholds.min_updates
        if late < 0 or late % self.thresholds.every:
            return None
        return self._weigh(judge(self.history, self.stacks, self.thresholds))

    def probe(self, zero_gradients: ArrayLike | None = None, stalled_weights: ArrayLike | None = None) -> None:
        """Takes in a look at the precision, as `History.add_probe` does; it counts from the next judgement on."""
        self.history.add_probe(zero_gradients, stalled_weights)

    def _weigh(self, found: Verdict) -> Verdict | None:
        if _key(found) == _key(self._verdict):
            self._verdict, self._candidate = found, None
            return None
        self._times = self._times + 1 if _key(found) == self._candidate else 1
        self._candidate = _key(found)
        if self._times < self.thresholds.patience:
            return None
        self._verdict, self._candidate = found, None
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything a decision depends on, as JSON values."""
        return {
            "history": self.history.state_dict(),
            "verdict": self._verdict.to_dict(),
            "candidate": None if self._candidate is None else list(self._candidate),
            "times": self._times,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where the judge that gave `state` was.

        Raises:
            ValueError: `state` is of a model with another number of layers, or of another window.
        """
        self.history.load_state_dict(state["history"])
        self._verdict = Verdict.from_dict(state["verdict"])
        self._candidate = None if state["candidate"] is None else (state["candidate"][0], state["candidate"][1])
        self._times = state["times"]


def _key(verdict: Verdict) -> tuple[str, str]:
    return verdict.kind, verdict.stack if verdict.kind in _OF_A_STACK else ""


_OF_A_STACK = ("vanishing", "exploding", "dead")
