"""The recurrent cells, torch's own, so that cuDNN serves them on a GPU.

σ is the logistic function, ⊙ the product by elements, x the input of a step, h and c the state before it. Each W·x
stands for W·x + b, so that torch has two biases a gate.

- `lstm`: i = σ(Wᵢx + Uᵢh), f = σ(W_f x + U_f h), g = tanh(W_g x + U_g h), o = σ(Wₒx + Uₒh), c' = f⊙c + i⊙g,
  h' = o⊙tanh(c'). Sepp Hochreiter, Jürgen Schmidhuber 1997, "Long Short-Term Memory"; the forget gate is of Felix A.
  Gers, Jürgen Schmidhuber, Fred Cummins 2000. No peepholes.
- `gru`: r = σ(W_r x + U_r h), z = σ(W_z x + U_z h), n = tanh(Wₙx + r⊙(Uₙh)), h' = (1 − z)⊙n + z⊙h. Kyunghyun Cho et
  al. 2014, arXiv 1406.1078. torch, as cuDNN, applies the reset gate after the recurrent product (with its bias), as
  version 1 of the paper does; in version 3 it is Uₙ(r⊙h). z keeps the state; in the paper's notation too.
- `rnn_tanh`, `rnn_relu`: h' = tanh(Wx + Uh), h' = max(0, Wx + Uh). Jeffrey L. Elman 1990, "Finding Structure in Time".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from hf_gradguard.models.configuration import CellName


@dataclass(frozen=True)
class Cell:
    """A kind of recurrent cell."""

    make: Callable[..., nn.RNNBase]
    """torch's class, called with the width of the input and of the state."""
    gates: tuple[str, ...]
    """What the blocks of rows of its weights and biases are for, in torch's order."""
    states: tuple[str, ...] = ("hidden",)
    """What it carries from step to step; the first is its output."""


CELLS: dict[CellName, Cell] = {
    "lstm": Cell(nn.LSTM, ("input", "forget", "candidate", "output"), ("hidden", "cell")),
    "gru": Cell(nn.GRU, ("reset", "update", "candidate")),
    "rnn_tanh": Cell(partial(nn.RNN, nonlinearity="tanh"), ("candidate",)),
    "rnn_relu": Cell(partial(nn.RNN, nonlinearity="relu"), ("candidate",)),
}


def make_cell(name: CellName, input_width: int, width: int) -> nn.RNNBase:
    """One layer of a cell, which reads and gives `[batch, steps, width]`."""
    return CELLS[name].make(input_width, width, batch_first=True)
