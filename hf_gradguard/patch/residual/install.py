"""Putting a rule from the registry on a model, and taking it away."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from hf_gradguard.patch.anatomy import Anatomy, Branch, read_architecture
from hf_gradguard.patch.container import CONTAINER
from hf_gradguard.patch.residual.patch import ResidualPatch, rules
from hf_gradguard.patch.taps import attach


def install(model: nn.Module, patch: str | ResidualPatch) -> Anatomy:
    """Puts a rule on every residual branch of a model, in place.

    Args:
        model: a model of a known architecture; see `attach`.
        patch: the rule, as text such as `layerscale:init=0.1` or as an object; `none` changes nothing.

    Returns:
        The model's anatomy.

    Raises:
        ValueError: the rule is unknown, or can't be put on this model, or the model is patched already.
    """
    found, anatomy = rules.parse_optional(patch), read_architecture(model)
    if found is None:
        return anatomy
    if reason := found.refuse(anatomy):
        raise ValueError(reason)
    return attach(model, found.make(anatomy))


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
