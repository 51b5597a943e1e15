"""A constant on the attention logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from hf_gradguard.act.checks import check_above_zero
from hf_gradguard.patch.anatomy import Anatomy
from hf_gradguard.patch.attention.heads import attention_branches, hang, head_width, refuse
from hf_gradguard.patch.attention.patch import AttentionPatch, attentions
from hf_gradguard.patch.rescale import scale_output


@attentions.register("logit_scale")
@dataclass(frozen=True)
class LogitScale(AttentionPatch):
    """Attention logits q·k ÷ √d times a constant, by default 1 ÷ √d for heads of width d: q·k ÷ d.

    q·k ÷ d is how maximal update parametrisation has it, as queries and keys are correlated once a model has learned:
    Greg Yang, Edward J. Hu, Igor Babuschkin, Szymon Sidor, Xiaodong Liu, David Farhi, Nick Ryder, Jakub Pachocki,
    Weizhu Chen, Jianfeng Gao 2022, "Tensor programs V: Tuning large neural networks via zero-shot hyperparameter
    transfer", arXiv 2203.03466, definition 4.1. It makes a difference where the width of heads does.

    The constant is on the queries. What the model itself does to logits stays: T5, which divides by nothing and begins
    with queries smaller by √d, gets q·k ÷ √d by default, and its position biases are not multiplied.
    """

    summary = "attention logits × a constant; by default q·k/d instead of q·k/√d"
    citation = "Yang et al. 2022, arXiv 2203.03466"

    factor: float | None = None
    """The constant; 1 ÷ √d if none."""

    def __post_init__(self) -> None:
        if self.factor is not None:
            check_above_zero(factor=self.factor)

    @property
    def preserving(self) -> bool:
        """See `AttentionPatch`."""
        return self.factor == 1

    def refuse(self, anatomy: Anatomy) -> str | None:
        """See `AttentionPatch`."""
        return refuse(anatomy, "logit_scale", "would be undone")

    def hang(self, anatomy: Anatomy) -> None:
        """See `AttentionPatch`."""
        for stack, layer, branch in attention_branches(anatomy):
            width = head_width(anatomy, stack, branch)
            hang(layer, branch, "query", Factor(self._factor(width)), width)

    def fold(self, anatomy: Anatomy) -> None:
        """See `AttentionPatch`: into the weight and bias of the query projections."""
        for stack, _, branch in attention_branches(anatomy):
            assert branch.query is not None, "it is attention"
            scale_output(branch.query, self._factor(head_width(anatomy, stack, branch)))

    def _factor(self, width: int) -> float:
        return float(width**-0.5) if self.factor is None else self.factor


class Factor(nn.Module):
    """Times a constant.

    Args:
        factor: the constant.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, q: Tensor) -> Tensor:
        """factor · q."""
        return self.factor * q
