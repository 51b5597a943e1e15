"""A larger residual before the norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from hf_gradguard.patch.anatomy import Anatomy, Branch
from hf_gradguard.patch.residual.multiplier import Multiplier
from hf_gradguard.patch.residual.patch import MultiplierPatch, rules

_EPS_NAMES = ("eps", "variance_epsilon")


@rules.register("deepnorm")
@dataclass(frozen=True)
class DeepNorm(MultiplierPatch):
    """norm(α·x + y), in post-norm models. With N layers in the encoder and M in the decoder α is

    - (2N)^¼ with an encoder alone, (2M)^¼ with a decoder alone;
    - 0.81·(N⁴·M)^(1/16) in the encoder and (3M)^¼ in the decoder, where there are both. The second is also that of a
      decoder with cross-attention to an encoder that is not part of the model.

    Hongyu Wang, Shuming Ma, Li Dong, Shaohan Huang, Dongdong Zhang, Furu Wei 2022, "DeepNet: Scaling Transformers to
    1,000 layers", arXiv 2203.00555, figure 2. The paper's second half, Xavier initialisation with a gain β, is an
    initialisation and not part of this rule.

    A norm does not see the scale of its input: norm(α·x + y) with ε is norm(x + y ÷ α) with ε ÷ α². That is how it is
    computed, by a constant gain and a changed ε, and it differs from the paper's form by rounding alone. What is left
    when the gains are folded is the changed ε, which is no weight but a setting of the config.
    """

    summary = "norm(α·x + y), α by depth, in post-norm models; goes with init=deepnorm"
    citation = "Wang et al. 2022, arXiv 2203.00555"
    norm = "post"

    def refuse(self, anatomy: Anatomy) -> str | None:
        """See `ResidualPatch`: it needs a norm right after the addition."""
        for branch in anatomy.branches:
            if branch.norm_position != "post":
                return (
                    f"residual='deepnorm' scales what goes into a norm after the addition, but the norm of {branch} in "
                    f"this {anatomy.model.config.model_type} model is before the branch; make it a post-norm model "
                    "(norm='post'), or use residual='branch_scale'"
                )
            if _eps_name(branch.norm.value) is None:
                return (
                    f"residual='deepnorm' has to change the epsilon of the norm of {branch}, but "
                    f"{type(branch.norm.value).__name__} has no attribute {' or '.join(_EPS_NAMES)}"
                )
        return None

    def make(self, anatomy: Anatomy) -> Callable[[Branch], DeepNormScale]:
        """See `ResidualPatch`."""
        depths = {stack.name: len(stack.layers) for stack in anatomy.stacks}

        def alpha(branch: Branch) -> float:
            if branch.stack == "encoder" and "decoder" in depths:
                return float(0.81 * (depths["encoder"] ** 4 * depths["decoder"]) ** (1 / 16))
            return float(branch.count**0.25)  # twice the layers, or three times with cross-attention

        return lambda branch: DeepNormScale(alpha(branch))


class DeepNormScale(Multiplier):
    """x + y ÷ α.

    Args:
        alpha: α.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__(1 / alpha, learnable=False)
        self.alpha = alpha

    def norm_settings(self, norm: nn.Module) -> dict[str, float]:
        """See `NormAdjusting`: ε ÷ α²."""
        name = _eps_name(norm)
        assert name is not None, "refuse has seen to that"
        return {name: getattr(norm, name) / self.alpha**2}


def _eps_name(norm: object) -> str | None:
    return next((name for name in _EPS_NAMES if isinstance(getattr(norm, name, None), float)), None)
