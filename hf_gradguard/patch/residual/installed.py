"""The rules that are on a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from hf_gradguard.patch.anatomy import Anatomy, Branch
from hf_gradguard.patch.container import CONTAINER


def installed(anatomy: Anatomy) -> Iterator[tuple[Branch, nn.Module]]:
    """The rules in a model, each with its branch; with the first of parallel branches where it serves all of them, and
    several times where branches share one."""
    for layer in anatomy.layers:
        taps = getattr(layer.module, CONTAINER, None)
        served = {(branch,) for branch in layer.branches} | set(layer.junctions)
        for branches in sorted(served, key=lambda branches: branches[0].index):
            tap = getattr(taps, "_".join(branch.kind for branch in branches), None)
            rule = None if tap is None else tap.active_rule
            if rule is not None:
                yield branches[0], rule
