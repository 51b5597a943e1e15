"""Linear maps side by side."""

from __future__ import annotations

from torch import nn


def stacked(count: int, inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    """Several linear maps of the same input as one module, whose output is theirs one after the other.

    Args:
        count: how many.
        inputs: input features.
        outputs: output features of each.
        bias: whether they have biases, which begin at zero.

    Returns:
        A module with weight [count · outputs, inputs], each map being Xavier-uniform by its own fans.
    """
    linear = nn.Linear(inputs, count * outputs, bias=bias)
    for weight in linear.weight.detach().chunk(count):
        nn.init.xavier_uniform_(weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
