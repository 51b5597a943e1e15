"""What the gradients mean: how they change with depth and over time, and what that says about the run.

Pure functions of readings and history: no modules, no tensors, no files.
"""

from __future__ import annotations

from hf_gradguard.judge.history import History, Probe
from hf_gradguard.judge.judge import Judge
from hf_gradguard.judge.profile import DepthProfile, depth_profile
from hf_gradguard.judge.stacks import Stack, stacks_of
from hf_gradguard.judge.thresholds import Thresholds
from hf_gradguard.judge.verdict import SEVERITY, Verdict, judge

__all__ = [
    "SEVERITY",
    "DepthProfile",
    "History",
    "Judge",
    "Probe",
    "Stack",
    "Thresholds",
    "Verdict",
    "depth_profile",
    "judge",
    "stacks_of",
]
