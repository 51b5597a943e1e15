"""Residual rules: what becomes of x and y where a layer adds y, the output of a branch, to the residual x.

A rule is an nn.Module with `forward(x, y)`, a gate, or with `scale(y)`, a scaling; see `rule`. Each has its own file.
"""

from hf_gradguard.patch.residual.identity import Identity
from hf_gradguard.patch.residual.multiplier import Multiplier
from hf_gradguard.patch.residual.rule import Gate, Rule, Scaling

__all__ = ["Gate", "Identity", "Multiplier", "Rule", "Scaling"]
