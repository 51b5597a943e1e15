"""Whole recipes by name: parts that belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """The parts of one recipe.

    Args:
        main: the part that options of the preset go to.
        fixed: every part with its text.
        summary: what it is, in one line.
        citation: authors, year, arXiv number.
        shared: options that another part has to be told, too, with that part.
    """

    main: str
    fixed: Mapping[str, str]
    summary: str
    citation: str
    shared: Mapping[str, str] = field(default_factory=dict)

    def parts(self, options: str = "") -> dict[str, str]:
        """Every part with its text, the main one with these options."""
        parts = dict(self.fixed)
        for option in filter(None, options.split(",")):
            other = self.shared.get(option.partition("=")[0].strip())
            for part in (self.main, *([] if other is None else [other])):
                parts[part] = _with_option(parts[part], option)
        return parts


def _with_option(spec: str, option: str) -> str:
    """A part's text with one more option, in place of one of the same name."""
    name, _, options = spec.partition(":")
    key = option.partition("=")[0].strip()
    others = [each for each in filter(None, options.split(",")) if each.partition("=")[0].strip() != key]
    return f"{name}:{','.join([*others, option])}"


PRESETS: dict[str, Preset] = {
    "rezero": Preset(
        main="residual",
        fixed={"residual": "rezero", "norm": "none", "init": "normal", "embedding": "unit_rms"},
        summary="every layer begins as the identity; no norms but one at the end",
        citation="Bachlechner et al. 2020, arXiv 2003.04887",
    ),
    "deepnorm": Preset(
        main="residual",
        fixed={"residual": "deepnorm", "norm": "post", "init": "deepnorm"},
        summary="post-norm with a larger residual, and smaller weights by depth",
        citation="Wang et al. 2022, arXiv 2203.00555",
    ),
    "pre_ln_scaled": Preset(
        main="residual",
        fixed={"residual": "branch_scale", "norm": "pre", "init": "normal", "embedding": "unit_rms"},
        summary="pre-norm with every branch × 1/√(2N)",
        citation="Yang et al. 2023, arXiv 2310.02244",
    ),
    "layerscale": Preset(
        main="residual",
        fixed={"residual": "layerscale", "norm": "pre", "init": "normal", "embedding": "unit_rms"},
        summary="pre-norm with a learned gain for each channel, small at first",
        citation="Touvron et al. 2021, arXiv 2103.17239",
    ),
    "t_fixup": Preset(
        main="init",
        fixed={"norm": "none:final=false", "init": "t_fixup"},
        summary="no norms at all; weights small enough to do without",
        citation="Huang et al. 2020, Improving Transformer optimization through better initialization, ICML",
    ),
    "gtrxl": Preset(
        main="residual",
        fixed={"residual": "gru_gate:bias=none", "norm": "pre", "embedding": "unit_rms"},
        summary="pre-norm, and the gate of a GRU in place of every addition, its bias by depth",
        citation="Parisotto et al. 2019, arXiv 1910.06764",
    ),
    "completep": Preset(
        main="residual",
        fixed={"residual": "completep", "norm": "pre", "init": "normal", "embedding": "unit_rms"},
        summary="pre-norm with every branch × 1/N; learning rates and epsilon by param_groups",
        citation="Dey et al. 2025, arXiv 2505.01618",
        shared={"base_width": "init"},
    ),
    "sandwich": Preset(
        main="norm",
        fixed={"norm": "sandwich", "embedding": "unit_rms"},
        summary="norms before and after every branch",
        citation="Ding et al. 2021, arXiv 2105.13290; Kim et al. 2025, arXiv 2502.02732",
    ),
}
"""The presets by name. A further one is a further entry."""
