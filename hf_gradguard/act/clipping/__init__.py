"""Clipping: rules that make a gradient smaller before the optimizer uses it.

A rule looks at the gradient's norms, which are on the host already, and answers with what to multiply. A rule of your
own is a small dataclass; registered, it goes by its name everywhere, as the built-in ones do:

    >>> from dataclasses import dataclass, field
    >>> from hf_gradguard.act.clipping import ClipPolicy, Gradient, HostClip, policies
    >>> @policies.register("first_norm")
    ... @dataclass
    ... class FirstNorm(ClipPolicy):
    ...     '''No norm may be larger than so many times the first.'''
    ...
    ...     factor: float = 1.0
    ...     first: float | None = field(default=None, init=False)
    ...
    ...     def clip(self, gradient: Gradient) -> HostClip | None:
    ...         if not gradient.is_clippable:
    ...             return None
    ...         self.first = self.first or gradient.total_norm
    ...         return HostClip.whole(gradient, self.factor * self.first)
    >>> policies.parse("first_norm:factor=2")
    FirstNorm(factor=2.0, first=None)

What a rule remembers, `first` here, goes into `state_dict` and comes back with `load_state_dict`.
"""

from hf_gradguard.act.clipping.adagc import AdaGC
from hf_gradguard.act.clipping.agc import AGC
from hf_gradguard.act.clipping.autoclip import AutoClip
from hf_gradguard.act.clipping.global_norm import GlobalNorm
from hf_gradguard.act.clipping.gradient import Gradient
from hf_gradguard.act.clipping.layer import Layer
from hf_gradguard.act.clipping.none import NoClipping
from hf_gradguard.act.clipping.policy import Clip, ClipPolicy, HostClip, Outcome, policies
from hf_gradguard.act.clipping.trainers_own import stock_coefficient, trainers_own
from hf_gradguard.act.clipping.units import Units, read_units
from hf_gradguard.act.clipping.zclip import ZClip

__all__ = [
    "AGC",
    "AdaGC",
    "AutoClip",
    "Clip",
    "ClipPolicy",
    "GlobalNorm",
    "Gradient",
    "HostClip",
    "Layer",
    "NoClipping",
    "Outcome",
    "Units",
    "ZClip",
    "policies",
    "read_units",
    "stock_coefficient",
    "trainers_own",
]
