"""What a model can be patched with, as a list for people and programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_gradguard.patch.config import PARTS
from hf_gradguard.patch.fold import UNFOLDABLE_NORM
from hf_gradguard.patch.presets import PRESETS, Preset

ALWAYS = "always"
NEVER = "never"
PRESET = "preset"
"""What a preset has as its part."""
_WITH_NORM = "where a norm follows the embeddings"
"""When an embedding patch has nothing to do."""


@dataclass(frozen=True)
class PatchInfo:
    """What is known of one preset, or of one choice for one part of a patch."""

    part: str
    """The part of `PatchConfig` that it is for, or `preset`."""
    name: str
    """What it is called there."""
    summary: str
    """One line: the formula and what it is for."""
    citation: str
    """Authors, year, arXiv number."""
    options: str
    """Its options with their defaults, `init=0,shared=true`; of a preset the parts that it stands for."""
    preserving: str
    """When a pretrained model computes the same after patching as before: `always`, `never`, or a condition."""
    folds: str
    """When `fold_patches` can merge it into the weights: `always`, `never`, or a condition."""
    unfoldable: str | None
    """Why it does not always fold; None if it does."""


def list_patches() -> list[PatchInfo]:
    """All presets, then the choices for each part of a patch, those that users have registered included.

    The part `activation` is not among them: it takes any name in Transformers' `ACT2FN`.

    Example:
        >>> [info.name for info in list_patches() if info.part == "norm"]
        ['none', 'post', 'pre', 'sandwich']
    """
    known = {
        (part, name): _of_class(part, name, kind) for part in PARTS for name, kind in PARTS[part].classes().items()
    }
    return [*(_of_preset(name, preset, known) for name, preset in PRESETS.items()), *known.values()]


def _of_class(part: str, name: str, kind: Any) -> PatchInfo:
    preserving = _PRESERVING[part](kind)
    unfoldable = UNFOLDABLE_NORM if part == "norm" else getattr(kind, "unfoldable", None)
    # a norm or an embedding patch that changes nothing in a model leaves nothing to fold in it
    folds = ALWAYS if unfoldable is None else preserving if part in ("norm", "embedding") else NEVER
    return PatchInfo(part, name, kind.summary, kind.citation, _options(kind), preserving, folds, unfoldable)


def _of_preset(name: str, preset: Preset, known: dict[tuple[str, str], PatchInfo]) -> PatchInfo:
    infos = [known[part, text.partition(":")[0]] for part, text in preset.parts().items()]
    reasons = [f"{info.part}={info.name}: {info.unfoldable}" for info in infos if info.unfoldable is not None]
    return PatchInfo(
        PRESET,
        name,
        preset.summary,
        preset.citation,
        ";".join(f"{part}={text}" for part, text in preset.parts().items()),
        _all_of([info.preserving for info in infos]),
        _all_of([info.folds for info in infos]),
        "; ".join(reasons) or None,
    )


def _all_of(conditions: list[str]) -> str:
    """When all of them hold."""
    if NEVER in conditions:
        return NEVER
    return ", ".join(condition for condition in conditions if condition != ALWAYS) or ALWAYS


def _preserving_by_options(kind: Any) -> str:
    """As a class says of itself: with its defaults, or with one of its options at 1."""
    if _is_preserving(kind):
        return ALWAYS
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    return next((f"with {name}=1" for name in names if _is_preserving(kind, **{name: 1})), NEVER)


def _is_preserving(kind: Any, /, **options: Any) -> bool:
    try:
        return bool(kind(**options).preserving)
    except (TypeError, ValueError):  # an option is missing, or can't be that
        return False


def _preserving_by_placement(kind: Any) -> str:
    """A placement that a model has anyway changes nothing in it."""
    placement = kind().placement
    return NEVER if placement.output or placement.own == "off" else f"in {placement.position}-norm models"


_PRESERVING: dict[str, Callable[[Any], str]] = {
    "residual": _preserving_by_options,
    "attention": _preserving_by_options,
    "norm": _preserving_by_placement,
    "embedding": lambda kind: _WITH_NORM,
    "init": lambda kind: NEVER,
}


def _options(kind: Any) -> str:
    return ",".join(f"{field.name}={_default(field)}" for field in dataclasses.fields(kind) if field.init)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "…"
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default).lower()
