"""Parts of a patch that are known to fight, each as one entry with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hf_gradguard.patch.anatomy import Anatomy
from hf_gradguard.patch.config import PatchConfig

_DEPTH_SCALED = ("deepnorm", "ds_init", "fixup", "gpt2", "small", "t_fixup")
"""Initialisations that make weights smaller with depth."""


@dataclass(frozen=True)
class Setting:
    """What a conflict is looked for in.

    Args:
        config: the patch.
        before: the model as it is.
        after: the model with its norms as the patch places them.
        is_pretrained: the model's weights come from a checkpoint.
    """

    config: PatchConfig
    before: Anatomy
    after: Anatomy
    is_pretrained: bool

    def name(self, part: str) -> str | None:
        """The name of a part, without its options; None where it is not given."""
        text: str | None = getattr(self.config, part)
        return None if text is None else text.partition(":")[0]

    @property
    def positions(self) -> set[str]:
        """Where the norms of the branches are, after the patch."""
        return {branch.norm_position for branch in self.after.branches}


@dataclass(frozen=True)
class Conflict:
    """One known fight: `holds` says whether it is on, and `reason` why it is one and what to do."""

    holds: Callable[[Setting], bool]
    reason: str
    is_refused: bool = False


def _is_scaled_twice(setting: Setting) -> bool:
    residual = setting.config.residual_patch
    if residual is None or residual.preserving or setting.name("residual") not in ("branch_scale", "completep"):
        return False
    if setting.name("init") in _DEPTH_SCALED:
        return True
    # GPT-2's own initialisation, where nothing replaces it and no training has
    return setting.name("init") is None and not setting.is_pretrained and _type(setting) == "gpt2"


def _has_another_width(setting: Setting) -> bool:
    if setting.name("residual") != "completep" or setting.name("init") not in (None, "normal") or setting.is_pretrained:
        return False
    config = setting.config
    return getattr(config.residual_patch, "base_width", None) != getattr(config.initialisation, "base_width", None)


def _type(setting: Setting) -> str:
    return setting.before.architecture.model_type


CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        lambda s: s.name("init") == "fixup" and getattr(s.config.residual_patch, "init", None) == 0,
        "residual={residual!r} begins with a gain of zero and init={init!r} with output weights of zero: each keeps "
        "the other's gradient at zero, and no branch would ever learn; use one of the two",
        is_refused=True,
    ),
    Conflict(
        _is_scaled_twice,
        "residual={residual!r} scales every branch by depth, and so does the initialisation (init={init!r}): branches "
        "are scaled twice; use init='normal'",
    ),
    Conflict(
        _has_another_width,
        "residual={residual!r} and init={init!r} are for models of different width: learning rates do not fit the "
        "weights; give the same base_width to both, as in init='normal:base_width=256', or to neither",
    ),
    Conflict(
        lambda s: s.name("norm") == "sandwich" and s.name("init") in _DEPTH_SCALED,
        "norm={norm!r} normalises what a branch puts out, which undoes the scale that init={init!r} gives it; use "
        "init='normal' or 'xavier'",
    ),
    Conflict(
        lambda s: s.name("residual") == "deepnorm" and s.name("init") != "deepnorm" and not s.is_pretrained,
        "residual={residual!r} is half a recipe without its initialisation; add init='deepnorm', or use the preset",
    ),
    Conflict(
        lambda s: s.name("init") == "deepnorm" and s.name("residual") != "deepnorm",
        "init={init!r} is half a recipe without residual='deepnorm'; use the preset 'deepnorm', or init='xavier'",
    ),
    Conflict(
        lambda s: s.name("init") in ("t_fixup", "fixup") and s.positions != {"none"},
        "init={init!r} is made for branches without norms, which undo any scale of what they get; add norm='none'",
    ),
    Conflict(
        lambda s: (
            s.config.residual_patch is not None
            and s.config.residual_patch.norm in ("pre", "none")
            and not s.config.residual_patch.preserving
            and "post" in s.positions
        ),
        "residual={residual!r} is made for a stream that no norm is on, but this model normalises every sum "
        "(post-norm), so that no gain makes a layer the identity; add norm='pre'",
    ),
)
"""All that is known. A further fight is a further entry."""


def found(setting: Setting) -> Iterator[tuple[str, bool]]:
    """The reason of each conflict that is on, and whether it is one to refuse."""
    for conflict in CONFLICTS:
        if conflict.holds(setting):
            parts = {part: getattr(setting.config, part) for part in PatchConfig.part_names()}
            yield conflict.reason.format(**parts), conflict.is_refused
