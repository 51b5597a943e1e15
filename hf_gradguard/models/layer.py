"""One layer of a recurrent model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_gradguard.models.cells import CELLS, make_cell
from hf_gradguard.models.configuration import RecurrentConfig
from hf_gradguard.models.dropout import make_dropout


class RecurrentLayer(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """Dropout, cell, LayerNorm if any, and the residual connection if any.

    Args:
        config: of the model.
        index: from 0 at the input.
    """

    def __init__(self, config: RecurrentConfig, index: int) -> None:
        super().__init__()
        width = config.input_width(index)
        share = config.input_dropout if index == 0 else config.layer_dropout
        self.dropout = make_dropout(share, config.locked_dropout)
        self.cell = make_cell(config.cell, width, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.layer_norm else nn.Identity()
        self.recurrent_dropout = config.recurrent_dropout
        self.is_residual = config.residual and width == config.hidden_size
        self.states = len(CELLS[config.cell].states)

    def forward(self, hidden: Tensor, lengths: Tensor | None = None, *state: Tensor) -> tuple[Tensor, ...]:
        """Reads rows from left to right.

        Args:
            hidden: `[batch, steps, width]`.
            lengths: how many steps of each row are to be read, int64 `[batch]` on the CPU; None for all.
            state: the tensors `[batch, hidden_size]` to go on from, those of `Cell.states`; none for zeros.

        Returns:
            The output, `[batch, steps, hidden_size]`, of no meaning behind a row's length; and the state after each
            row's last step.
        """
        inputs = self.dropout(hidden)
        output, *state_after = self._read(inputs, lengths, tuple(tensor.to(inputs.dtype) for tensor in state))
        output = self.norm(output)
        return (hidden + output if self.is_residual else output), *state_after

    def _read(self, inputs: Tensor, lengths: Tensor | None, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if lengths is None:
            output, after = self._call(inputs, state)
            return output, *after
        # An empty row can't be packed: it is read as one step, which its state then does not take over.
        packed = pack_padded_sequence(inputs, lengths.clamp(min=1), batch_first=True, enforce_sorted=False)
        output, after = self._call(packed, state)
        output, _ = pad_packed_sequence(output, batch_first=True, total_length=inputs.shape[1])
        if bool((lengths == 0).any()):
            is_empty = (lengths == 0).to(inputs.device).unsqueeze(-1)
            before = state or tuple(torch.zeros_like(tensor) for tensor in after)
            after = tuple(torch.where(is_empty, old, new) for old, new in zip(before, after, strict=True))
        return output, *after

    def _call(self, inputs: Tensor | PackedSequence, state: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
        """The cell's output, packed if its input is, and its state as `[batch, hidden_size]`."""
        levels = tuple(tensor.unsqueeze(0) for tensor in state)
        before = (levels if self.states > 1 else levels[0]) if levels else None
        if self.training and self.recurrent_dropout > 0:
            output, after = self._call_dropped(inputs, before)
        else:
            output, after = self.cell(inputs, before)
        return output, tuple(tensor.squeeze(0) for tensor in (after if self.states > 1 else (after,)))

    def _call_dropped(self, inputs: Tensor | PackedSequence, before: Any) -> tuple[Any, Any]:
        """The cell with a part of its recurrent weights zero: Merity et al. 2017, section 2.

        On a GPU torch puts the weights that it is given into one piece of memory, in place. Therefore it is given
        copies of all: parameters that a graph has already seen must not be moved.
        """
        weights = {
            name: functional.dropout(weight, self.recurrent_dropout) if name.startswith("weight_hh") else weight.clone()
            for name, weight in self.cell.named_parameters()
        }
        result: tuple[Any, Any] = functional_call(self.cell, weights, (inputs, before))
        for name, weight in self.cell.named_parameters():
            if isinstance(weight, nn.Parameter):  # and not itself what a functional_call has lent
                setattr(self.cell, name, weight)  # or torch's own list of them would hold the copies, and their graph
        return result
