"""What the gradients of a window of updates mean, in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_gradguard.judge.history import History
from hf_gradguard.judge.profile import DepthProfile, depth_profile
from hf_gradguard.judge.stacks import Stack
from hf_gradguard.judge.thresholds import Thresholds

SEVERITY = ("exploding", "vanishing", "underflow", "dead", "healthy", "unknown")
"""The kinds of verdict, the most serious first."""


@dataclass(frozen=True)
class Verdict:
    """What was found, why it is so, and what to do."""

    kind: str
    """One of `SEVERITY`."""
    message: str
    """What was found: a plain sentence."""
    why: str = ""
    """The numbers that show it, and where they come from."""
    next: str = ""
    """What to do about it; empty where there is nothing to do."""
    value: float | None = None
    """The number that was found."""
    threshold: float | None = None
    """The number it was held against."""
    layer: str | None = None
    """Name of the layer it begins at, seen from the healthy side; None where it concerns no layer in particular."""
    stack: str = ""
    """The stack it was found in; empty where the model has one only, or where it concerns the whole model."""
    others: tuple[Verdict, ...] = ()
    """What else was found, the most serious first; empty for these themselves."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**dataclasses.asdict(self), "others": [other.to_dict() for other in self.others]}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Verdict:
        """The inverse of `to_dict`."""
        return cls(**{**fields, "others": tuple(cls.from_dict(other) for other in fields["others"])})

    def __str__(self) -> str:
        lines = (("Verdict", f"{self.kind}: {self.message}"), ("Why", self.why), ("Next", self.next))
        return "\n".join(f"{name + ':':<9}{text}" for name, text in lines if text)


def judge(history: History, stacks: Sequence[Stack], thresholds: Thresholds | None = None) -> Verdict:
    """Judges the updates that `history` holds; the same history always gives the same verdict.

    Args:
        history: the last updates.
        stacks: the model's stacks of layers; depth is judged in each by itself.
        thresholds: where the lines are drawn.

    Returns:
        The most serious finding, with the others in it; `healthy` where there is none, `unknown` where there are too
        few updates yet or none of the layers has had a gradient.
    """
    thresholds = thresholds or Thresholds()
    if history.count < thresholds.min_updates:
        return Verdict("unknown", f"{history.count} updates seen; the first judgement takes {thresholds.min_updates}.")
    norms = history.norms
    profiles = [depth_profile(norms[:, list(stack.columns)], starving_share=thresholds.starving) for stack in stacks]
    findings = [_growth(history, thresholds), _underflow(history, stacks, thresholds)]
    for stack, profile in zip(stacks, profiles, strict=True):
        findings += [_depth(stack, profile, thresholds), _dead(stack, profile, history, thresholds)]
    found = sorted((finding for finding in findings if finding), key=lambda finding: SEVERITY.index(finding.kind))
    if found:
        return dataclasses.replace(found[0], others=tuple(found[1:]))
    return _healthy(stacks, profiles)


def _depth(stack: Stack, profile: DepthProfile, thresholds: Thresholds) -> Verdict | None:
    """Whether the gradient fades or grows on its way to the input."""
    if profile.alive.size < thresholds.min_layers:
        return None
    if profile.bottom_to_top < thresholds.vanishing:
        return _vanishing(stack, profile, thresholds)
    if profile.bottom_to_top > thresholds.exploding:
        return _exploding(stack, profile, thresholds)
    return None


def _vanishing(stack: Stack, profile: DepthProfile, thresholds: Thresholds) -> Verdict:
    first, last = _ends(stack, profile)
    why = f"{first} gets {_plain(profile.first_to_last)} of the gradient norm of {last}"
    begins = None
    if profile.starving is not None:
        begins = stack.layers[profile.starving]
        why += f"; all layers below {begins} get less than {_plain(thresholds.starving)} of what the top layers get"
    if profile.decay_per_layer < 1:
        why += f". On the way down, each layer passes on about {_plain(profile.decay_per_layer)} of what reaches it"
    return Verdict(
        "vanishing",
        f"the gradient fades on its way to the input{_within(stack)}; the lower layers are hardly trained.",
        why + ".",
        "Begin anew with a patched model: patch_model(model, 'pre_ln_scaled') puts norms before the branches and "
        "scales these down by depth; rezero, layerscale and deepnorm are others (gradguard patches lists all). Without "
        "changing the model: lower the learning rate, lengthen the warm-up or use fewer layers, and start again or "
        "from a checkpoint before this: what has come this far seldom recovers. Clipping the norm of all gradients "
        "does not help: it keeps the proportions.",
        profile.bottom_to_top,
        thresholds.vanishing,
        begins or first,
        stack.name,
    )


def _exploding(stack: Stack, profile: DepthProfile, thresholds: Thresholds) -> Verdict:
    first, last = _ends(stack, profile)
    why = f"{first} gets {_plain(profile.first_to_last)} times the gradient norm of {last}"
    if profile.decay_per_layer > 1:
        why += f". On the way down, each layer makes it larger by a factor of about {_plain(profile.decay_per_layer)}"
    return Verdict(
        "exploding",
        f"the gradient grows on its way to the input{_within(stack)}.",
        why + ".",
        "Initialise the weights smaller (for residual branches: divide by the square root of twice the number of "
        "layers), add normalisation where a branch has none, and lower the learning rate. Clip the gradient norm "
        "(max_grad_norm=1.0) meanwhile: it bounds the step, but the upper layers still get next to nothing of it.",
        profile.bottom_to_top,
        thresholds.exploding,
        first,
        stack.name,
    )


def _growth(history: History, thresholds: Thresholds) -> Verdict | None:
    """Whether the gradient as a whole is far larger than it used to be."""
    usual = history.usual_norm
    if usual is None:
        return None
    recent = float(np.median(history.total_norms))
    if not recent > thresholds.growth * usual:
        return None
    return Verdict(
        "exploding",
        "the gradient has become far larger than it was in this run.",
        f"Over the last {len(history.total_norms)} updates the norm before clipping has a median of {_plain(recent)}, "
        f"{_plain(recent / usual)} times what it was at the start or on the long-term average ({_plain(usual)}).",
        "Go back to a checkpoint before the growth and continue with a lower learning rate or a longer warm-up, and "
        "with the gradient norm clipped (max_grad_norm=1.0). Look at the loss and the data of the updates where it "
        "began.",
        recent / usual,
        thresholds.growth,
    )


def _dead(stack: Stack, profile: DepthProfile, history: History, thresholds: Thresholds) -> Verdict | None:
    """Whether layers got nothing but zeros while other parameters got a gradient."""
    if not profile.dead.size:
        return None
    zeros = np.count_nonzero(history.norms[:, list(stack.columns)] == 0, axis=0)
    dead = [stack.layers[index] for index in profile.dead if zeros[index] >= thresholds.min_updates]
    if not dead or not (history.total_norms > 0).any():
        return None
    return Verdict(
        "dead",
        f"no gradient reaches {len(dead)} of {len(stack.layers)} layers{_within(stack)}: it is exactly zero.",
        f"Over the last {len(history.norms)} updates the gradient of {_listed(dead)} was exactly zero, and others were "
        "not. So the loss does not depend on the weights there, or their gradient is lost on the way.",
        "Look for an activation that is stuck at zero, a branch multiplied by a constant zero, a detach or no_grad in "
        "the forward pass, or a routing that never selects the layer. If the layer is meant to rest, freeze it with "
        "requires_grad=False: a frozen layer is no finding.",
        float(len(dead)),
        0.0,
        dead[-1],
        stack.name,
    )


def _underflow(history: History, stacks: Sequence[Stack], thresholds: Thresholds) -> Verdict | None:
    """Whether 16 bits are too few for the gradients, or for what an update adds to the weights."""
    if len(history.probes) < history.PROBES:
        return None
    zeros = _least([probe.zero_gradients for probe in history.probes])
    stalled = _least([probe.stalled_weights for probe in history.probes])
    if (lost := _worst(zeros)) is not None and zeros[lost] > thresholds.zero_gradients:
        return _lost_gradients(zeros, lost, stacks, thresholds.zero_gradients)
    if (stuck := _worst(stalled)) is not None and stalled[stuck] > thresholds.stalled_weights:
        return _stalled_weights(stalled, stuck, stacks, thresholds.stalled_weights)
    return None


def _lost_gradients(shares: NDArray[np.float64], worst: int, stacks: Sequence[Stack], threshold: float) -> Verdict:
    layer, stack = _place(worst, stacks)
    return Verdict(
        "underflow",
        "gradients are lost to rounding: many are too small for the 16 bits that carry them and become zero.",
        f"In {_count(shares, threshold)} over {threshold:.0%} of the gradient's elements are exactly zero; most in "
        f"{layer}: {shares[worst]:.0%}.",
        "Use bf16=True instead of fp16=True, where the hardware has it: bfloat16 reaches down as far as float32. With "
        "fp16, keep the weights in float32 and let the Trainer scale the loss.",
        float(shares[worst]),
        threshold,
        layer,
        stack,
    )


def _stalled_weights(shares: NDArray[np.float64], worst: int, stacks: Sequence[Stack], threshold: float) -> Verdict:
    layer, stack = _place(worst, stacks)
    return Verdict(
        "underflow",
        "updates are lost to rounding: they are too small to change weights that are kept in 16 bits.",
        f"In {_count(shares, threshold)} an update leaves over {threshold:.0%} of the weights that have a gradient "
        f"exactly as they were; most in {layer}: {shares[worst]:.0%}.",
        "Load the model in float32 (dtype=torch.float32) and train with bf16=True, so that only the arithmetic is in "
        "16 bits and the weights are not. A larger learning rate makes it less; stochastic rounding avoids it.",
        float(shares[worst]),
        threshold,
        layer,
        stack,
    )


def _healthy(stacks: Sequence[Stack], profiles: Sequence[DepthProfile]) -> Verdict:
    """The stack whose profile is the least even speaks for all; a model without layers to compare is healthy too."""
    if not any(profile.alive.size for profile in profiles):
        return Verdict("unknown", "none of the layers has had a gradient yet.")
    measured = [pair for pair in zip(stacks, profiles, strict=True) if pair[1].alive.size > 1]
    if not measured:
        return Verdict("healthy", "the gradient is steady; there is only one layer, so none to compare it with.")
    stack, profile = max(measured, key=lambda pair: abs(math.log(pair[1].bottom_to_top)))
    first, last = _ends(stack, profile)
    return Verdict(
        "healthy",
        "the gradient reaches the first layer.",
        f"{first} gets {_plain(profile.first_to_last)} times the gradient norm of {last}.",
        value=profile.bottom_to_top,
        stack=stack.name,
    )


def _least(rows: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    least: NDArray[np.float64] = np.min(rows, axis=0)  # NaN where any is unknown
    return least


def _worst(shares: NDArray[np.float64]) -> int | None:
    known = np.where(np.isnan(shares), -1.0, shares)
    return int(known.argmax()) if known.size and known.max() >= 0 else None


def _place(column: int, stacks: Sequence[Stack]) -> tuple[str, str]:
    for stack in stacks:
        if column in stack.columns:
            return stack.layers[stack.columns.index(column)], stack.name
    return f"layer {column}", ""


def _count(shares: NDArray[np.float64], threshold: float) -> str:
    return f"{int(np.count_nonzero(shares > threshold))} of {len(shares)} layers"


def _ends(stack: Stack, profile: DepthProfile) -> tuple[str, str]:
    return stack.layers[profile.alive[0]], stack.layers[profile.alive[-1]]


def _within(stack: Stack) -> str:
    return f" of the {stack.name}" if stack.name else ""


def _listed(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    shown = names[:4]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _plain(number: float) -> str:
    """A number as people write it: 0.25, 31, 3e-9."""
    if number == 0 or 1e-3 <= abs(number) < 1e4:
        return f"{number:.2g}" if abs(number) < 100 else f"{number:.0f}"
    mantissa, exponent = f"{number:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"
