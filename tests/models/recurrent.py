"""Small recurrent models for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_gradguard import RecurrentConfig, RecurrentForCausalLM, RecurrentForSequenceClassification

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
VOCABULARY = 50


def config(**options: Any) -> RecurrentConfig:
    defaults: dict[str, Any] = {"cell": "lstm", "vocab_size": VOCABULARY, "hidden_size": 16, "num_layers": 3}
    return RecurrentConfig(**{**defaults, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 49, **options})


def language_model(seed: int = 0, *, big: bool = True, **options: Any) -> RecurrentForCausalLM:
    """In evaluation mode. With `big`, inputs and biases are such that the gates leave their linear range."""
    torch.manual_seed(seed)
    model = RecurrentForCausalLM(config(**options)).eval()
    return _enlarged(model) if big else model  # type: ignore[no-any-return]


def classifier(seed: int = 0, **options: Any) -> RecurrentForSequenceClassification:
    """In evaluation mode."""
    torch.manual_seed(seed)
    return _enlarged(RecurrentForSequenceClassification(config(**options)).eval())  # type: ignore[no-any-return]


def _enlarged(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".cell." in name or name.endswith("norm.bias"):
                parameter.uniform_(-0.3, 0.3)
            elif "embed" in name:
                parameter.uniform_(-1, 1)
    return model


def tokens(rows: int, steps: int, seed: int = 1) -> Tensor:
    """Tokens, none of which is special."""
    return torch.randint(2, VOCABULARY - 1, (rows, steps), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], side: str, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of several lengths as one batch whose padding stands left or right, and its attention mask."""
    width = max(len(row) for row in rows) + extra
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(None, len(row))
        ids[index, place] = row
        mask[index, place] = 1
    return ids, mask
