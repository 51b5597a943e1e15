"""The configuration of a guard: one dataclass, the same from Python, YAML, JSON and the command line."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_gradguard.act import accumulation, clipping, nonfinite
from hf_gradguard.judge import Thresholds
from hf_gradguard.registry import Registry, nearest


@dataclass(frozen=True)
class GradGuardConfig:
    """What the guard does. The defaults watch everything and act only on NaN and infinity.

    A policy (`nonfinite`, `clip`, `accumulate`) is given as text, `name` or `name:key=value,key=value`, or as an object
    of its class, which is kept as its text.

    Raises:
        ValueError: on making one with an impossible value, or with values that contradict one another; the message
            names the field, the value and what would fit.

    Example:
        >>> GradGuardConfig(nonfinite="stop").replace(log_layers=True).nonfinite
        'stop'
    """

    nonfinite: str = "skip:max_consecutive=20"
    """When a gradient holds a NaN or an infinity: `skip` (make no update), `stop` (end training) or `observe` (only say
    so; the update destroys the weights, as it would without the guard)."""
    clip: str = "trainer"
    """How gradients are clipped: `trainer` (as the Trainer's `max_grad_norm` says; in your own loop not at all), or in
    its place `none`, `global:max_norm=1.0`, `layer`, `agc`, `autoclip`, `zclip`, `adagc`."""
    accumulate: str = "none"
    """When the optimizer steps: `none` (in every window), `fixed:windows=4`, `norm_threshold:threshold=2.0`,
    `noise_scale`, `norm_test`, `ramp`. Gradients of the windows before are held back, weighted by target tokens."""
    lr_schedule: str = "windows"
    """What the learning-rate schedule counts where `accumulate` holds windows back: `windows` (it follows the data) or
    `updates`."""
    noise_smoothing: float = 0.95
    """Share of the averages behind the gradient noise scale that stays from one update to the next; 0.95 looks back on
    about 20 updates."""
    dry_run: bool = False
    """Whether the policies only say what they would have done."""
    replay: bool = True
    """Whether the first micro-batch that gives a non-finite gradient is run once more, to find the module in which it
    began. Until then only references to the inputs are kept."""
    save_batch: bool = False
    """Whether the inputs of that micro-batch are written to `batches/` beside the record."""
    record: bool = True
    """Whether to write a record of the run to `<output_dir>/gradguard/`."""
    record_dir: str | None = None
    """Where to write the record instead."""
    record_every: int | str = "auto"
    """Keep the norm of every parameter each so many windows, and of every layer in the others. `auto`: in all of them
    until 128 MB have been written, then in every 2nd until 128 MB more, and so on."""
    flush_seconds: float = 2.0
    """Longest time in seconds that a finished window stays in memory before it is written, and so what a `kill -9` can
    lose; longer where so many small writes would make the record larger than it may be."""
    weights_every: int = 100
    """Measure weight norms, update-to-weight ratios and underflow each so many windows, and once more after a quarter
    of that; 0 for never."""
    time_profile_every: int = 0
    """Measure how far back in time the gradient reaches (`time_profile`) in the first window, in each so many windows
    after it and in the last; 0 for never. Each costs one forward and eight backward passes of the window's first
    micro-batch, about what training on it three times would take (2 seconds where a GPT-2's took 0.64), and waits."""
    log_layers: bool = False
    """Whether the norm of every layer goes into the Trainer's log as well (`gradguard/layer_000/grad_norm` …)."""
    check_loss_scaling: bool = True
    """Whether to try, before the first update, if the model's loss is normalised as the Trainer believes (two forward
    passes over the first micro-batch, only where a wrong answer matters: under accumulation, or on several
    processes)."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    """Where the verdicts draw their lines."""

    def __post_init__(self) -> None:
        for name, registry in _POLICIES.items():
            object.__setattr__(self, name, registry.canonical(getattr(self, name)))
        if self.record_every != "auto" and not (_is_whole(self.record_every) and int(self.record_every) >= 1):
            raise ValueError(f"record_every={self.record_every!r} must be a whole number from 1, or 'auto'")
        for name in ("weights_every", "time_profile_every"):
            value = getattr(self, name)
            if not _is_whole(value) or value < 0:
                raise ValueError(f"{name}={value!r} must be a whole number from 0 (0 for never)")
        if not (isinstance(self.flush_seconds, (int, float)) and 0 <= self.flush_seconds < math.inf):
            raise ValueError(f"flush_seconds={self.flush_seconds!r} must be a number of seconds from 0")
        if not (isinstance(self.noise_smoothing, (int, float)) and 0 <= self.noise_smoothing < 1):
            raise ValueError(f"noise_smoothing={self.noise_smoothing!r} must be from 0 to below 1")
        if self.lr_schedule not in ("windows", "updates"):
            raise ValueError(f"lr_schedule={self.lr_schedule!r} must be 'windows' or 'updates'")
        for item in dataclasses.fields(self):
            if item.type == "bool" and not isinstance(getattr(self, item.name), bool):
                raise ValueError(f"{item.name}={getattr(self, item.name)!r} must be true or false")
        if not isinstance(self.thresholds, Thresholds):
            raise ValueError(f"thresholds={self.thresholds!r} must be a Thresholds object (in YAML: a mapping)")
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        if self.accumulates and self.nonfinite == "observe" and not self.dry_run:
            raise ValueError(
                f"accumulate={self.accumulate!r} contradicts nonfinite='observe': a NaN in one window would stay in "
                "what is held; use nonfinite='skip' or 'stop'"
            )
        if self.lr_schedule == "updates" and not self.accumulates:
            raise ValueError(
                "lr_schedule='updates' needs a policy that holds windows back, such as accumulate='fixed:windows=4'; "
                "with accumulate='none' every window is an update"
            )
        if self.save_batch and not self.replay:
            raise ValueError("save_batch=True needs replay=True: without it no reference to the inputs is kept")

    @property
    def accumulates(self) -> bool:
        """Whether a policy decides when the optimizer steps."""
        return self.accumulate != "none"

    def replace(self, **options: Any) -> GradGuardConfig:
        """A copy with some fields changed; raises ValueError as making one does."""
        return self.from_dict({**_shallow(self), **options})

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> GradGuardConfig:
        """The configuration that plain values describe; what is not given keeps its default.

        Raises:
            ValueError: for an unknown option (the message names the nearest known one) or an impossible value.
        """
        values = _check_names(cls, options, "")
        thresholds = values.get("thresholds")
        if isinstance(thresholds, dict):
            values["thresholds"] = Thresholds(**_check_names(Thresholds, thresholds, "thresholds."))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def load(cls, path: str | Path) -> GradGuardConfig:
        """Reads a `.yaml`, `.yml` or `.json` file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it can't be parsed or does not hold a configuration; the message names the file.
        """
        import yaml

        path = Path(path)
        text = path.read_text(encoding="utf-8")
        try:
            options = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
            if options is None:
                options = {}
            if not isinstance(options, dict):
                raise ValueError(f"it holds a {type(options).__name__}, not a mapping of options to values")
            return cls.from_dict(options)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Writes a file that `load` reads: JSON where the name ends in `.json`, else YAML."""
        import yaml

        path = Path(path)
        options = self.to_dict()
        text = json.dumps(options, indent=2) if path.suffix == ".json" else yaml.safe_dump(options, sort_keys=False)
        path.write_text(text, encoding="utf-8")


_POLICIES: dict[str, Registry[Any]] = {
    "nonfinite": nonfinite.policies,
    "clip": clipping.policies,
    "accumulate": accumulation.policies,
}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shallow(config: GradGuardConfig) -> dict[str, Any]:
    return {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}


def _check_names(owner: type, options: dict[str, Any], prefix: str) -> dict[str, Any]:
    known = [item.name for item in dataclasses.fields(owner)]
    for name in options:
        if name not in known:
            close = nearest(str(name), known)
            raise ValueError(f"unknown option {prefix}{name!r}{close}. Known: {', '.join(known)}")
    return dict(options)
