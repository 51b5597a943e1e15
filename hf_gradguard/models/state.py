"""What a recurrent model carries from one call to the next, where a Transformer has its cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache


class LayerState:
    """What one layer carries. The methods and flags are those that a `Cache` expects of its layers.

    Args:
        tensors: each `[batch, hidden_size]`: the hidden state, and an LSTM's cell after it.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.tensors[0].shape[0]

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Puts what `change` makes of each tensor in its place."""
        self.tensors = tuple(change(tensor) for tensor in self.tensors)

    def reset(self) -> None:
        """Back to zeros, as before the first token."""
        self.apply(torch.zeros_like)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As `batch_select_indices`, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows with these indices, in their order."""
        self.apply(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row in place."""
        self.apply(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def get_max_length(self) -> int:
        """-1: there is no end."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses to forget tokens; raises ValueError."""
        if tokens_to_remove != 0:
            raise ValueError(
                f"crop({tokens_to_remove}): a recurrent state can't forget tokens. Keep the state from before them, "
                "which no later call changes, and read on from there"
            )

    def __repr__(self) -> str:
        return f"LayerState({', '.join(str(list(tensor.shape)) for tensor in self.tensors)})"


class RecurrentState(Cache):
    """The state of all layers after the last token, as `past_key_values`.

    A model that gets one reads on from it and returns a new one; the one that it got stays as it was, so that several
    texts may go on from the same beginning, and a batch that is run again gives the same again. The new one hangs on
    the graph of the old one; `detach` cuts it off.

    Args:
        layers: what each layer carries, from the first up: tensors `[batch, hidden_size]`.
        length: places that have been read, padding among them.
    """

    def __init__(self, layers: Sequence[Sequence[Tensor]], length: int) -> None:
        super().__init__(layers=cast(Any, [LayerState(tensors) for tensors in layers]))
        self.length = length

    @property
    def states(self) -> list[tuple[Tensor, ...]]:
        """What each layer carries, from the first up: the hidden state `[batch, hidden_size]`, and an LSTM's cell."""
        return [cast(LayerState, layer).tensors for layer in self.layers]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Places that have been read, padding among them, as a cache of keys and values counts them."""
        return self.length

    def reset(self) -> None:
        """Back to zeros, as before the first token."""
        super().reset()  # type: ignore[no-untyped-call]
        self.length = 0

    def detach(self) -> RecurrentState:
        """The same state without the graph that it came from: gradients go no further back than this."""
        return RecurrentState([[tensor.detach() for tensor in layer] for layer in self.states], self.length)
