"""The configuration of a patch: one dataclass, the same from Python, from text and in a checkpoint's config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from transformers.activations import ACT2FN

from hf_gradguard.patch.activation import check_known
from hf_gradguard.patch.attention import AttentionPatch, attentions
from hf_gradguard.patch.embedding import EmbeddingPatch, embeddings
from hf_gradguard.patch.init import Initialisation, inits
from hf_gradguard.patch.norm import NormPatch, norms
from hf_gradguard.patch.presets import PRESETS
from hf_gradguard.patch.residual import ResidualPatch, rules
from hf_gradguard.registry import Registry, nearest

PARTS: dict[str, Registry[Any]] = {
    "residual": rules,
    "norm": norms,
    "init": inits,
    "attention": attentions,
    "embedding": embeddings,
}
"""The parts of a patch that have a registry. The sixth, `activation`, is one of Transformers' own by name."""


@dataclass(frozen=True)
class PatchConfig:
    """What is changed in a model. What is None stays as the model has it.

    A part is given as text, `name` or `name:key=value,key=value`, or as an object of its class, which is kept as its
    text. `gradguard patches` lists all of them.

    Raises:
        ValueError: a name or an option is unknown or impossible; the message names it, and the nearest known.

    Example:
        >>> str(PatchConfig(residual="layerscale:init=0.1", norm="pre", init="xavier"))
        'residual=layerscale:init=0.1;norm=pre;init=xavier'
    """

    residual: str | None = None
    """What becomes of a branch where it meets the stream: `rezero`, `layerscale`, `deepnorm`, `gru_gate` …"""
    norm: str | None = None
    """Where norms act: `pre`, `post`, `sandwich`, or `none` for no norm in the branches."""
    init: str | None = None
    """New values for the weights of all branches: `xavier`, `orthogonal`, `gpt2`, `lsuv` …"""
    activation: str | None = None
    """The activation of the MLPs, a name in Transformers' `ACT2FN`: `relu`, `leaky_relu`, `gelu`, `silu`, `tanh` …"""
    attention: str | None = None
    """What is changed inside attention: `qk_norm` …"""
    embedding: str | None = None
    """What is done to the stream before the first layer: `norm`, `unit_rms`."""

    def __post_init__(self) -> None:
        for name, registry in PARTS.items():
            value = getattr(self, name)
            if value is not None:
                text = registry.canonical(value)
                object.__setattr__(self, name, None if text == registry.absent else text)
        if self.activation is not None:
            check_known(self.activation)
        if not self.to_dict():
            raise ValueError("an empty patch changes nothing; give one of " + ", ".join(self.part_names()))

    @classmethod
    def part_names(cls) -> list[str]:
        """The names of the parts."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def parse(cls, spec: str | PatchConfig) -> PatchConfig:
        """The configuration that a text describes; one that is given is returned as it is.

        The text is the name of a preset, with options of its main part if any; or parts separated by semicolons,
        `part=name:key=value,key=value`; or a preset and then parts that replace the preset's. A name that only one part
        knows may stand without that part's name.

        Raises:
            ValueError: something in it is unknown, in which case the message has the nearest known name, or a part is
                given twice.
            TypeError: it is no text and no configuration.

        Example:
            >>> str(PatchConfig.parse("rezero;init=xavier"))
            'residual=rezero;norm=none;init=xavier;embedding=unit_rms'
            >>> str(PatchConfig.parse("gru_gate:bias=1"))
            'residual=gru_gate:bias=1'
        """
        if isinstance(spec, PatchConfig):
            return spec
        if not isinstance(spec, str):
            raise TypeError(
                f"a patch is text or a PatchConfig, not a {type(spec).__name__}: write a preset, as 'rezero', or "
                "parts, as 'residual=layerscale;norm=pre'; PatchConfig.from_dict makes one of a mapping"
            )
        first, *others = [item.strip() for item in spec.split(";") if item.strip()] or [""]
        preset = _preset(first)
        given: dict[str, str] = {}
        for item in others if preset else filter(None, (first, *others)):
            part, value = _part(item, spec)
            if part in given:
                raise ValueError(f"{spec!r}: {part} is given twice, {given[part]!r} and {value!r}; leave one of them")
            given[part] = value
        return cls(**{**preset, **given})

    @classmethod
    def from_dict(cls, parts: Mapping[str, str]) -> PatchConfig:
        """The inverse of `to_dict`; raises ValueError for a part that is unknown."""
        for part in parts:
            if part not in cls.part_names():
                raise ValueError(f"unknown part {part!r} of a patch. Known: {', '.join(cls.part_names())}")
        return cls(**parts)

    def to_dict(self) -> dict[str, str]:
        """The parts that are given, as text."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def __str__(self) -> str:
        """The text form, which `parse` turns back into an equal configuration."""
        return ";".join(f"{part}={value}" for part, value in self.to_dict().items())

    @property
    def residual_patch(self) -> ResidualPatch | None:
        """The object behind `residual`."""
        return cast(ResidualPatch | None, self._object("residual"))

    @property
    def norm_patch(self) -> NormPatch | None:
        """The object behind `norm`."""
        return cast(NormPatch | None, self._object("norm"))

    @property
    def initialisation(self) -> Initialisation | None:
        """The object behind `init`."""
        return cast(Initialisation | None, self._object("init"))

    @property
    def attention_patch(self) -> AttentionPatch | None:
        """The object behind `attention`."""
        return cast(AttentionPatch | None, self._object("attention"))

    @property
    def embedding_patch(self) -> EmbeddingPatch | None:
        """The object behind `embedding`."""
        return cast(EmbeddingPatch | None, self._object("embedding"))

    def _object(self, part: str) -> object:
        text = getattr(self, part)
        return None if text is None else PARTS[part].parse(text)


def _preset(item: str) -> dict[str, str]:
    """The parts of a preset, given by its name and maybe options; nothing where it is none."""
    name, _, options = item.partition(":")
    return PRESETS[name].parts(options) if name in PRESETS else {}


def _part(item: str, spec: str) -> tuple[str, str]:
    """A part and its text, from `part=text` or from a name that only one part knows."""
    part, separator, value = (word.strip() for word in item.partition("="))
    if separator and part in PatchConfig.part_names():
        if "=" in value.partition(":")[0]:
            raise ValueError(f"{spec!r}: write ';' between parts, and ':' between a name and its options, in {item!r}")
        return part, value
    if separator and ":" not in part:
        known = PatchConfig.part_names()
        raise ValueError(
            f"{spec!r}: unknown part {part!r}{nearest(part, known)}. Known: {', '.join(known)}; parts are separated by "
            "';'"
        )
    name = item.partition(":")[0]
    names: dict[str, Any] = {part: registry.names() for part, registry in PARTS.items()} | {"activation": ACT2FN}
    choice = [f"{part}={name}" for part, known in names.items() if name in known]
    if name in PRESETS:
        alone = f", or write {' or '.join(choice)} for that part alone" if choice else ""
        raise ValueError(f"{spec!r}: the preset {name!r} must come first, as what follows replaces its parts{alone}")
    if len(choice) > 1:
        raise ValueError(f"{spec!r}: {name!r} can be {' or '.join(choice)}; say which")
    if choice:
        return choice[0].partition("=")[0], item
    everything = {*PRESETS, *(known for registry in names.values() for known in registry)}
    raise ValueError(
        f"unknown patch {name!r}{nearest(name, everything)}. Presets: {', '.join(PRESETS)}; or parts, such as "
        f"'residual=layerscale;norm=pre'. `gradguard patches` lists all"
    )
