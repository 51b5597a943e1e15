"""What to do with a window whose gradients hold a NaN or an infinity."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from hf_gradguard.act.checks import check_whole
from hf_gradguard.registry import Registry

Decision = Literal["observe", "skip", "stop"]


class NonfinitePolicy(Protocol):
    """Decides about one window at a time; what it must remember is in its state."""

    def decide(self, nonfinite: bool) -> Decision | None:
        """What to do about this window: leave it to the Trainer, skip the update, or skip it and end training. None
        if its gradients are finite."""

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved with a checkpoint, as JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""


policies: Registry[NonfinitePolicy] = Registry("nonfinite")


class _Stateless:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@policies.register("observe")
@dataclass
class Observe(_Stateless):
    """Says so and lets the Trainer do what it would: clip by a NaN and step, after which every weight is NaN."""

    def decide(self, nonfinite: bool) -> Decision | None:
        return "observe" if nonfinite else None


@policies.register("stop")
@dataclass
class Stop(_Stateless):
    """Ends training at the first such window; its update is not made, the weights are those before it."""

    def decide(self, nonfinite: bool) -> Decision | None:
        return "stop" if nonfinite else None


@policies.register("skip")
@dataclass
class Skip:
    """Does not make the window's update: weights and optimizer state stay as they were. Ends training after
    `max_consecutive` such windows in a row, since weights that are themselves NaN would be skipped for ever."""

    max_consecutive: int = 20
    consecutive: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_whole(1, max_consecutive=self.max_consecutive)

    def decide(self, nonfinite: bool) -> Decision | None:
        self.consecutive = self.consecutive + 1 if nonfinite else 0
        if not nonfinite:
            return None
        return "stop" if self.consecutive >= self.max_consecutive else "skip"

    def state_dict(self) -> dict[str, Any]:
        return {"consecutive": self.consecutive}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consecutive = int(state["consecutive"])


def drop_gradients(parameters: Any) -> None:
    """A true skip: with no gradient the optimizer leaves weights, momentum and step counts untouched. Gradients of zero
    would not do that: momentum and weight decay still move the weights."""
    for parameter in parameters:
        parameter.grad = None
