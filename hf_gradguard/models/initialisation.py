"""How the weights of a recurrent model begin.

A gate's block of rows is a matrix of its own and begins as one: an orthogonal matrix of four gates' rows together would
be something else. The functions of `transformers.initialization` leave alone what came out of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_gradguard.models.cells import CELLS
from hf_gradguard.models.configuration import RecurrentConfig


def initialise_cell(cell: nn.RNNBase, config: RecurrentConfig) -> None:
    """Gives a cell's weights and biases their first values, as the configuration says."""
    gates = CELLS[config.cell].gates
    for name, parameter in cell.named_parameters():
        if name.startswith("weight_ih"):
            _fill_blocks(parameter, len(gates), _fill(config.input_init, config))
        elif name.startswith("weight_hh"):
            _fill_blocks(parameter, len(gates), _fill(config.recurrent_init, config))
        else:
            _fill_blocks(parameter, len(gates), _fill(config.bias_init, config), _bias_of_forgetting(name, config))


def initialise_linear(linear: nn.Linear, config: RecurrentConfig) -> None:
    """Uniform weights, and biases as the configuration says."""
    init.uniform_(linear.weight, -config.init_range, config.init_range)
    if linear.bias is not None:
        init.copy_(linear.bias, _fill(config.bias_init, config)(torch.empty_like(linear.bias)))


def _fill(name: str, config: RecurrentConfig) -> Callable[[Tensor], Tensor]:
    fills: dict[str, Callable[[Tensor], Tensor]] = {
        "xavier": nn.init.xavier_uniform_,
        "orthogonal": nn.init.orthogonal_,
        "identity": nn.init.eye_,
        "uniform": lambda tensor: nn.init.uniform_(tensor, -config.init_range, config.init_range),
        "zeros": nn.init.zeros_,
    }
    return fills[name]


def _bias_of_forgetting(name: str, config: RecurrentConfig) -> dict[int, float]:
    """Which gate's block of a bias begins at a constant: torch adds two biases, of which the first has it all."""
    if config.forget_bias is None or "forget" not in CELLS[config.cell].gates:
        return {}
    gate = CELLS[config.cell].gates.index("forget")
    return {gate: config.forget_bias if name.startswith("bias_ih") else 0.0}


def _fill_blocks(
    parameter: Tensor, blocks: int, fill: Callable[[Tensor], Tensor], constants: dict[int, float] | None = None
) -> None:
    # In float32, because there is no orthogonal matrix to be had in less.
    values = torch.empty_like(parameter, dtype=torch.float32 if parameter.dtype.itemsize < 4 else parameter.dtype)
    for index, block in enumerate(values.chunk(blocks)):
        if constants and index in constants:
            block.fill_(constants[index])
        else:
            fill(block)
    init.copy_(parameter, values)
