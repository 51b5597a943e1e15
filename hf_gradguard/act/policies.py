"""The policies of one run together: what they are fitted to, and their state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_gradguard.act import accumulation, clipping, nonfinite
from hf_gradguard.act.accumulation import Accumulator, Taken
from hf_gradguard.config import GradGuardConfig
from hf_gradguard.observe.layout import Layout


class Policies:
    """What a configuration asks for, made: a policy for gradients that are not finite, a clipping rule, an accumulator.

    Args:
        config: of the run.
        distributed_type: Accelerate's name of the way of training, empty without Accelerate.

    Raises:
        ValueError: a policy can't work with this way of training.
    """

    def __init__(self, config: GradGuardConfig, distributed_type: str = "") -> None:
        self._config = config
        self.nonfinite = nonfinite.policies.parse(config.nonfinite)
        self.overflow = self.nonfinite if isinstance(self.nonfinite, nonfinite.Skip) else nonfinite.Skip()
        """Used under a scaler, which looks for its scale by overflowing: only many in a row count."""
        self.clip = clipping.policies.parse_optional(config.clip)
        """None: clipping is left to the Trainer."""
        self.accumulator: Accumulator | None = None
        """None: every window is an update."""
        if distributed_type == "DEEPSPEED" and (self.clip is not None or config.accumulates):
            raise ValueError(
                f"clip={config.clip!r}, accumulate={config.accumulate!r}: DeepSpeed clips and steps in the backward "
                "pass of its engine, where no policy can come between; set gradient_clipping and "
                "gradient_accumulation_steps in its own configuration and leave clip='trainer', accumulate='none' here"
            )

    def fit(
        self, model: nn.Module, layout: Layout, parameters: Sequence[nn.Parameter], others: Sequence[nn.Parameter]
    ) -> None:
        """To be called before the first window, and again when other parameters are trainable.

        Args:
            model: what is trained.
            layout: of the model.
            parameters: the layout's parameters.
            others: what the optimizer steps besides them.

        Raises:
            ValueError: a policy can't work with these parameters.
        """
        self._parameters = parameters
        self._names = [info.name for info in layout.parameters]
        self._groups = np.array([info.group for info in layout.parameters])
        if self.clip is not None:
            self._units = clipping.read_units(model, layout, parameters)
            if reason := self.clip.refuse(parameters):
                raise ValueError(f"clip={self._config.clip!r} can't work here: {reason}")
        policy = accumulation.policies.parse_optional(self._config.accumulate)
        if policy is None:
            return
        if others:
            raise ValueError(
                f"accumulate={self._config.accumulate!r} can't hold back what the optimizer steps besides the model: "
                f"{len(others)} of its parameters are not among those of {type(model).__name__}; give them an "
                "optimizer of their own"
            )
        before = self.accumulator
        self.accumulator = Accumulator(
            policy,
            parameters,
            self._names,
            shadow=self._config.dry_run,
            noise_smoothing=self._config.noise_smoothing,
        )
        if before is not None:
            self.accumulator.take_over(before)

    @property
    def acts_before_step(self) -> bool:
        """Whether a norm has to be known before the optimizer steps, besides that it is finite."""
        return self.clip is not None or self.accumulator is not None

    @property
    def replaces_clip(self) -> bool:
        """Whether a rule clips in place of the Trainer."""
        return self.clip is not None and not self._config.dry_run

    def clip_gradient(self, norms: NDArray[np.float64]) -> clipping.Clip | None:
        """Clips what is in `.grad` by the rule; in a dry run only decides about it.

        Args:
            norms: L2 norms of what is there `[parameters]`, finite.

        Returns:
            What was decided, None where nothing is clipped.
        """
        if self.clip is None:
            return None
        gradient = clipping.Gradient(self._parameters, self._names, self._groups, norms, self._units)
        clip = self.clip.clip(gradient)
        if clip is not None and not self._config.dry_run:
            clip.apply(gradient)
        return clip

    def finish(self) -> Taken | None:
        """Leaves what is held in `.grad` for a last update; None where nothing is, or in a dry run."""
        return None if self.accumulator is None or self._config.dry_run else self.accumulator.finish()

    def discard(self) -> int:
        """Drops what is held, and returns how many windows that were; none in a dry run."""
        held = 0 if self.accumulator is None else self.accumulator.discard()
        return 0 if self._config.dry_run else held

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved with a checkpoint, as JSON values; with `tensors` it is everything."""
        return {
            name: {"policy": getattr(self._config, name), "state": policy.state_dict()}
            for name, policy in self._with_state().items()
        }

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` and `tensors` gave. A policy starts afresh where another one was saved; windows
        whose tensors are missing are dropped.

        Raises:
            ValueError: the tensors are those of another model.
        """
        for name, policy in self._with_state().items():
            saved = state.get(name)
            if saved is not None and _name(saved["policy"]) == _name(getattr(self._config, name)):
                policy.load_state_dict(saved["state"])
        if self.accumulator is not None:
            self.accumulator.load_tensors(tensors)

    def tensors(self) -> dict[str, Tensor]:
        """The held gradients by parameter name."""
        return {} if self.accumulator is None else self.accumulator.tensors()

    def _with_state(self) -> dict[str, Any]:
        policies = {"nonfinite": self.nonfinite, "clip": self.clip, "accumulate": self.accumulator}
        return {name: policy for name, policy in policies.items() if policy is not None}


def _name(policy: str) -> str:
    return policy.partition(":")[0]
