"""What the gates of the Gated Transformer-XL have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_gradguard.patch.anatomy import Anatomy, Branch
from hf_gradguard.patch.residual.patch import ResidualPatch, check_finite, rules
from hf_gradguard.patch.residual.rule import Rule


@dataclass(frozen=True)
class GTrXLPatch(ResidualPatch):
    """A gate in place of the addition.

    Emilio Parisotto, H. Francis Song, Jack W. Rae, Razvan Pascanu, Caglar Gulcehre, Siddhant M. Jayakumar, Max
    Jaderberg, Raphaël Lopez Kaufman, Aidan Clark, Seb Noury, Matthew M. Botvinick, Nicolas Heess, Raia Hadsell 2019,
    "Stabilizing Transformers for reinforcement learning", arXiv 1910.06764, section 3.2: the branch's output goes
    through a ReLU into the gate, y = ReLU(f(norm(x))), and the model is pre-norm. The paper does not say how weights
    begin; here they are Xavier-uniform.
    """

    citation = "Parisotto et al. 2019, arXiv 1910.06764"
    norm = "pre"
    unfoldable = "a gate's answer is not linear in the branch's output"
    carries: ClassVar[bool] = False
    """The gate weighs x against y, so that x is made smaller where y is let in."""

    relu: bool = True
    """Whether y goes through a ReLU before the gate."""

    def refuse(self, anatomy: Anatomy) -> str | None:
        """See `ResidualPatch`: x must not be weighed against two branches at once."""
        return refuse_parallel(rules.text(self), anatomy) if self.carries else None

    def make(self, anatomy: Anatomy) -> Callable[[Branch], Rule]:
        """See `ResidualPatch`."""
        return self._gate

    @abstractmethod
    def _gate(self, branch: Branch) -> Rule:
        """The gate for the addition of one branch."""


class GTrXLGate(nn.Module):
    """A gate that sees y behind a ReLU, if it is to.

    Args:
        relu: whether.
    """

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.relu = relu

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Gate`."""
        return self.join(x, F.relu(y) if self.relu else y)

    @abstractmethod
    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """The gate's formula."""


class BiasedGate(GTrXLGate):
    """A gate with a learned bias.

    Args:
        width: features of x and y.
        bias: b_g at first.
        relu: whether y goes through a ReLU first.
    """

    def __init__(self, width: int, bias: float = 2.0, relu: bool = True) -> None:
        super().__init__(relu)
        self.bias = nn.Parameter(torch.full((width,), float(bias)))


@dataclass(frozen=True)
class BiasedPatch(GTrXLPatch):
    """A gate with a learned bias. The paper gives its start for the GRU gate, 2, for stacks of 24 branches; the others
    begin with the same.

    In deeper stacks little of x then comes through all gates that weigh it against y, and as little of the gradient: a
    gate keeps σ(2) = 0.88 of it, two hundred 1e-11. With `bias=none` it begins by depth instead, at log(T − 1) with T
    branches in the stack: a gate keeps 1 − 1/T, and all of them about 1/e.
    """

    gate: ClassVar[type[BiasedGate]]

    bias: float | None = 2.0
    """b_g at first; the larger, the less of the branch is let in. None for what the depth asks for."""

    def __post_init__(self) -> None:
        if self.bias is not None:
            check_finite(bias=self.bias)

    def _gate(self, branch: Branch) -> Rule:
        bias = math.log(branch.count - 1) if self.bias is None else self.bias
        return self.gate(branch.output.out_features, bias, self.relu)


def refuse_parallel(name: str, anatomy: Anatomy) -> str | None:
    """Why the gate of this name can't be put on this model, if it has parallel branches; else None."""
    found = next((branch for branch in anatomy.branches if branch.parallel), None)
    if found is None:
        return None
    return (
        f"residual={name!r} weighs the residual against one branch, but {found} in this "
        f"{anatomy.model.config.model_type} model is added together with another (parallel residual); use "
        "residual='output_gate' or a multiplier, or a model whose branches run one after the other"
    )
