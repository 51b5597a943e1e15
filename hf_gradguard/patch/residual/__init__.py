"""Residual rules: what becomes of x and y where a layer adds y, the output of a branch, to the residual x.

A rule is an nn.Module with `forward(x, y)`, a gate, or with `scale(y)`, a scaling; see `rule`. Each has its own file,
with the dataclass of its options and of what is known of it; see `patch`. A further rule is one more file:

    >>> from collections.abc import Callable
    >>> from dataclasses import dataclass
    >>> from hf_gradguard.patch import Anatomy, Branch, Multiplier
    >>> from hf_gradguard.patch.residual import MultiplierPatch, rules
    >>> @rules.register("half")
    ... @dataclass(frozen=True)
    ... class Half(MultiplierPatch):
    ...     '''x + y ÷ 2.'''
    ...
    ...     summary, citation, norm = "x + y ÷ 2", "nobody", "pre"
    ...
    ...     def make(self, anatomy: Anatomy) -> Callable[[Branch], Multiplier]:
    ...         return lambda branch: Multiplier(0.5, learnable=False)
    >>> rules.parse("half")
    Half()

`patch_model(model, "residual=half")` puts it on a model.
"""

from hf_gradguard.patch.residual.branch_scale import BranchScale
from hf_gradguard.patch.residual.completep import CompleteP
from hf_gradguard.patch.residual.deepnorm import DeepNorm, DeepNormScale
from hf_gradguard.patch.residual.factors import Factors, Place, ScaleOptimizer
from hf_gradguard.patch.residual.gru_gate import GRUGate, GRUPatch
from hf_gradguard.patch.residual.highway_gate import HighwayGate, HighwayPatch
from hf_gradguard.patch.residual.identity import Identity
from hf_gradguard.patch.residual.input_gate import InputGate, InputPatch
from hf_gradguard.patch.residual.layerscale import LayerScale
from hf_gradguard.patch.residual.lstm_gate import LSTMGate, LSTMPatch
from hf_gradguard.patch.residual.multiplier import Multiplier
from hf_gradguard.patch.residual.output_gate import OutputGate, OutputPatch
from hf_gradguard.patch.residual.patch import MultiplierPatch, ResidualPatch, rules
from hf_gradguard.patch.residual.rezero import ReZero
from hf_gradguard.patch.residual.rule import Gate, NormAdjusting, Rule, Scaling
from hf_gradguard.patch.residual.sigmoid_tanh_gate import SigmoidTanhGate, SigmoidTanhPatch
from hf_gradguard.patch.residual.skipinit import SkipInit

__all__ = [
    "BranchScale",
    "CompleteP",
    "DeepNorm",
    "DeepNormScale",
    "Factors",
    "GRUGate",
    "GRUPatch",
    "Gate",
    "HighwayGate",
    "HighwayPatch",
    "Identity",
    "InputGate",
    "InputPatch",
    "LSTMGate",
    "LSTMPatch",
    "LayerScale",
    "Multiplier",
    "MultiplierPatch",
    "NormAdjusting",
    "OutputGate",
    "OutputPatch",
    "Place",
    "ReZero",
    "ResidualPatch",
    "Rule",
    "ScaleOptimizer",
    "Scaling",
    "SigmoidTanhGate",
    "SigmoidTanhPatch",
    "SkipInit",
    "rules",
]
