"""CompleteP, and depth-µP: a constant gain by depth, with an optimizer to match."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_gradguard.act.checks import check_above_zero, check_whole
from hf_gradguard.patch.anatomy import Anatomy, Branch
from hf_gradguard.patch.container import container_of
from hf_gradguard.patch.residual.factors import Factors, Place, ScaleOptimizer
from hf_gradguard.patch.residual.multiplier import Multiplier
from hf_gradguard.patch.residual.patch import MultiplierPatch, rules


@rules.register("completep")
@dataclass(frozen=True)
class CompleteP(MultiplierPatch):
    """x + m_L^−α · y with m_L = layers ÷ base_depth and α = 1, for Adam; what is tuned on a small model then fits a
    deep one. `param_groups` gives the optimizer's half. With m_N = width ÷ base_width (1 without base_width):

    | | learning rate | ε | weight decay |
    |---|---|---|---|
    | matrices of the layers | m_L^(α−1) ÷ m_N | m_L^−α ÷ m_N | m_N |
    | biases and norms of the layers | m_L^(α−1) | m_L^−α ÷ m_N | |
    | embeddings, output embeddings, final norm | 1 | 1 ÷ m_N | 1 |
    | other matrices outside of the layers | 1 ÷ m_N | 1 ÷ m_N | m_N |

    Nolan Dey, Bin Claire Zhang, Lorenzo Noci, Mufan Li, Blake Bordelon, Shane Bergsma, Cengiz Pehlevan, Boris Hanin,
    Joel Hestness 2025, "Don't be lazy: CompleteP enables compute-efficient deep transformers", arXiv 2505.01618,
    table 1. α = ½ is depth-µP: Greg Yang, Dingli Yu, Chen Zhu, Soufiane Hayou 2023, "Tensor programs VI: Feature
    learning in infinite-depth neural networks", arXiv 2310.02244.

    What the table leaves open: its ε is that of the layers alone; that of everything else goes down with the width as
    its gradients do, and not with depth. (The authors' code has one ε, that of the layers, for all.) Matrices outside
    of the layers, as in the heads of BERT or of a classifier, are not in its model. In a model with two stacks each has
    its own m_L. An initialisation that shrinks output projections with depth, as GPT-2's does, would do the same twice.

    With base_width what goes into the output embeddings is multiplied with 1 ÷ m_N; a loss that takes their weight and
    passes the module by does not see that. The initialisation has to be scaled as well (`init=normal:base_width=…`,
    which the preset adds). Attention logits stay q·k ÷ √d: where heads become wider with the model, add
    `attention=logit_scale`.
    """

    summary = "x + m^−α·y, m = N ÷ base depth; learning rates and epsilon scaled by param_groups"
    citation = "Dey et al. 2025, arXiv 2505.01618; α = ½: Yang et al. 2023, arXiv 2310.02244"
    norm = "pre"

    base_depth: int = 1
    """The layers of the small model whose learning rate, ε and weight decay are given to `param_groups`."""
    alpha: float = 1.0
    """α: 1 is CompleteP, 0.5 is depth-µP."""
    base_width: int | None = None
    """The width of that model; none if it is this model's."""

    def __post_init__(self) -> None:
        check_whole(1, base_depth=self.base_depth)
        check_above_zero(alpha=self.alpha)
        if self.base_width is not None:
            check_whole(1, base_width=self.base_width)

    def refuse(self, anatomy: Anatomy) -> str | None:
        """See `ResidualPatch`: with base_width it needs logits to scale."""
        if self.base_width is not None and anatomy.output_embeddings is None:
            return (
                f"residual='completep:base_width={self.base_width}' divides the logits of the output embeddings, and "
                f"{type(anatomy.model).__name__} has none; leave base_width out, or patch a model with a "
                "language-modelling head"
            )
        return None

    def make(self, anatomy: Anatomy) -> Callable[[Branch], Multiplier]:
        """See `ResidualPatch`."""
        return lambda branch: Multiplier(self._times_deeper(branch.depth) ** -self.alpha, learnable=False)

    def hang(self, anatomy: Anatomy) -> None:
        """See `ResidualPatch`: the multiplier before the output embeddings."""
        head, model = anatomy.output_embeddings, anatomy.model
        if self.base_width is not None and head is not None:
            container, scale = container_of(model), OutputScale(1 / self._times_wider(anatomy))
            container.add_module("output", scale)
            path = next(name for name, module in model.named_modules() if module is head)
            container.before(model, path, scale.before_head)

    def optimizer_scaling(self, anatomy: Anatomy) -> ScaleOptimizer:
        """See `ResidualPatch`."""
        wider = self._times_wider(anatomy)

        def factors(place: Place) -> Factors:
            deeper = 1.0 if place.depth is None else self._times_deeper(place.depth)
            return Factors(
                lr=deeper ** (self.alpha - 1) / (wider if place.is_matrix else 1.0),
                eps=deeper**-self.alpha / wider,
                weight_decay=wider if place.is_matrix else 1.0,
            )

        return factors

    def _times_deeper(self, depth: int) -> float:
        """m_L."""
        return depth / self.base_depth

    def _times_wider(self, anatomy: Anatomy) -> float:
        """m_N."""
        return 1.0 if self.base_width is None else anatomy.branches[0].output.out_features / self.base_width


class OutputScale(nn.Module):
    """A constant factor on the way into the output embeddings.

    Args:
        factor: the constant.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def before_head(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the output embeddings, which get hidden states [..., width]."""
        return (self.factor * args[0], *args[1:]), kwargs
