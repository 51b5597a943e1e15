"""Accumulation: when does the optimizer step? A policy decides it after each window, from the gradient.

What is not to be used yet is held in a buffer of its own (`HeldGradients`), so that a window with a NaN costs only
itself. `Accumulator` joins policy, buffer and the measured noise scale. `none` is no policy at all: the optimizer steps
after every window, and nothing here is made.

A policy of your own is a small dataclass; registered, it goes by its name everywhere, as the built-in ones do:

    >>> from dataclasses import dataclass
    >>> from hf_gradguard.act.accumulation import AccumulationPolicy, Choice, Held, policies
    >>> @policies.register("tokens")
    ... @dataclass
    ... class Tokens(AccumulationPolicy):
    ...     '''Updates when so many target tokens are held.'''
    ...
    ...     least: float = 4096
    ...
    ...     def decide(self, held: Held) -> Choice:
    ...         return Choice(held.weight >= self.least, value=held.weight, threshold=self.least)
    >>> policies.parse("tokens:least=1e5")
    Tokens(least=100000.0)
"""

from hf_gradguard.act.accumulation.accumulator import Accumulator, Taken
from hf_gradguard.act.accumulation.fixed import Fixed
from hf_gradguard.act.accumulation.held import HeldGradients
from hf_gradguard.act.accumulation.noise_scale import NoiseScaleTarget
from hf_gradguard.act.accumulation.norm_test import NormTest
from hf_gradguard.act.accumulation.norm_threshold import NormThreshold
from hf_gradguard.act.accumulation.policy import AccumulationPolicy, Choice, Held, policies
from hf_gradguard.act.accumulation.ramp import Ramp

__all__ = [
    "AccumulationPolicy",
    "Accumulator",
    "Choice",
    "Fixed",
    "Held",
    "HeldGradients",
    "NoiseScaleTarget",
    "NormTest",
    "NormThreshold",
    "Ramp",
    "Taken",
    "policies",
]
