"""An LSTM whose time steps are the branches of one forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradguard.patch.anatomy import Anatomy, Branch
from hf_gradguard.patch.residual.gtrxl import refuse_parallel
from hf_gradguard.patch.residual.linear import stacked
from hf_gradguard.patch.residual.patch import ResidualPatch, check_finite, rules


@rules.register("lstm_gate")
@dataclass(frozen=True)
class LSTMPatch(ResidualPatch):
    """o ⊙ c′ with c′ = f ⊙ c + i ⊙ g: y is the input of an LSTM cell, x its hidden state, and the cell state c goes
    from branch to branch upward through the stack, where

    (i, f, g, o) = (σ, σ, tanh, σ) of W·[y; x] + b.

    After Hongfei Xu, Yang Song, Qiuhui Liu, Josef van Genabith, Deyi Xiong 2020, "Rewiring the Transformer with
    depth-wise LSTMs", arXiv 2007.06257. As in the LSTM of the first author's library there is no tanh on c′, or the
    stream could not leave (−1, 1). Departures: the model's norms stay where they are and there is none inside the cell;
    the model keeps its MLPs, whose work the paper gives to the cell; the first cell state is the x that goes into the
    stack; and biases begin by depth: with T branches that of f at log T and that of i at −log T, so that a share of
    about 1/e of the first cell state is left at the top (chrono initialisation without its randomness: Corentin
    Tallec, Yann Ollivier 2018, "Can recurrent neural networks warp time?", arXiv 1804.11188, section 3).

    8·width² + 4·width parameters a branch. An encoder and a decoder have a cell state each. Gradient checkpointing is
    refused: it would recompute a layer without the cell state that the layer below gave it.
    """

    summary = "o ⊙ c, c ← f ⊙ c + i ⊙ g: an LSTM over depth, its cell state carried up through the layers"
    citation = "Xu et al. 2020, arXiv 2007.06257"
    norm = "pre"
    unfoldable = "a gate's answer is not linear in the branch's output"

    forget_bias: float | None = None
    """Bias of f at first, that of i being the opposite; by default log T."""

    def __post_init__(self) -> None:
        if self.forget_bias is not None:
            check_finite(forget_bias=self.forget_bias)

    def refuse(self, anatomy: Anatomy) -> str | None:
        """See `ResidualPatch`: all branches must run one after the other, once a pass."""
        config: Any = anatomy.model.config
        if any(map(_is_checkpointed, (layer.module for layer in anatomy.layers))):
            return _NO_CHECKPOINTING
        if getattr(config, "chunk_size_feed_forward", 0):
            return (
                f"residual='lstm_gate' needs each branch to run once a pass, but chunk_size_feed_forward="
                f"{config.chunk_size_feed_forward} runs the MLP in pieces; set it to 0"
            )
        for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
            if getattr(config, name, 0):
                return (
                    f"residual='lstm_gate' needs every layer to run in every pass, but {name}={getattr(config, name)} "
                    "leaves some out in training; set it to 0"
                )
        return refuse_parallel("lstm_gate", anatomy)

    def make(self, anatomy: Anatomy) -> Callable[[Branch], LSTMGate]:
        """See `ResidualPatch`."""
        states = {stack.name: CellState() for stack in anatomy.stacks}
        layers = {stack.name: [layer.module for layer in stack.layers] for stack in anatomy.stacks}

        def make_rule(branch: Branch) -> LSTMGate:
            bias = math.log(branch.count) if self.forget_bias is None else self.forget_bias
            state, layer = states[branch.stack], layers[branch.stack][branch.layer]
            return LSTMGate(branch.output.out_features, bias, state, branch, layer)

        return make_rule


_NO_CHECKPOINTING = (
    "residual='lstm_gate' can't be right with gradient checkpointing, which recomputes a layer without the cell state "
    "that the layer below gave it; train with gradient_checkpointing=False, or use residual='gru_gate'"
)


def _is_checkpointed(layer: nn.Module) -> bool:
    return bool(getattr(layer, "gradient_checkpointing", False))


class CellState:
    """The cell state of one stack, while a forward pass is on its way through it."""

    def __init__(self) -> None:
        self.index = -1
        """The branch that left it; −1 between two passes."""
        self.cell: Tensor | None = None

    def leave(self, index: int, cell: Tensor | None) -> None:
        """What a branch leaves for the next; None after the last one."""
        self.index, self.cell = (-1 if cell is None else index), cell

    def __getstate__(self) -> dict[str, Any]:
        # tensors inside a graph can be neither copied nor pickled
        return {"index": -1, "cell": None}


class LSTMGate(nn.Module):
    """See `LSTMPatch`.

    Args:
        width: features of x and y.
        forget_bias: bias of f at first, that of i being the opposite.
        state: the cell state of the stack.
        branch: the branch that it serves.
        layer: the layer that the branch is in, to see whether it is checkpointed.
    """

    def __init__(self, width: int, forget_bias: float, state: CellState, branch: Branch, layer: nn.Module) -> None:
        super().__init__()
        self.cell = stacked(4, 2 * width, width, bias=True)
        """i, f, g and o, of [y; x]."""
        bias_i, bias_f, *_ = self.cell.bias.detach().chunk(4)
        nn.init.constant_(bias_i, -forget_bias)
        nn.init.constant_(bias_f, forget_bias)
        self.state = state
        self.index = branch.index
        self.is_last = branch.index == branch.count - 1
        self.place = str(branch)
        self.layer = (layer,)  # in a tuple it is no child

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Gate`.

        Raises:
            RuntimeError: the pass did not come from the branch below, or the layer is checkpointed.
        """
        if self.training and _is_checkpointed(self.layer[0]):
            raise RuntimeError(f"{self.place}: {_NO_CHECKPOINTING}")
        i, f, g, o = self.cell(torch.cat((y, x), dim=-1)).chunk(4, dim=-1)
        cell = torch.sigmoid(f) * self._carried(x) + torch.sigmoid(i) * torch.tanh(g)
        self.state.leave(self.index, None if self.is_last else cell)
        return torch.sigmoid(o) * cell

    def _carried(self, x: Tensor) -> Tensor:
        """The cell state from below."""
        if self.index == 0:
            return x
        if self.state.cell is None or self.state.index >= self.index:
            raise RuntimeError(
                f"{self.place}: there is no cell state from the layer below. A layer can't run by itself; and "
                f"{_NO_CHECKPOINTING}"
            )
        return self.state.cell.reshape(x.shape)  # OPT makes a flat batch of tokens for its MLP
