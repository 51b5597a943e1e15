"""A loss that is right under gradient accumulation whatever the model does with `num_items_in_batch`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_gradguard.training.blocks import IGNORED


def mean_over_targets(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None, *, smoothing: float = 0.0
) -> Tensor:
    """The cross-entropy of classes or masked tokens, summed and divided by the targets of the whole window.

    Trainer takes BERT's own loss for normalised in this way, which it is not: with four micro-batches in a window every
    gradient would be four times too large. Given to `Trainer(compute_loss_func=…)` this makes a window of several
    micro-batches, on any number of processes, equal to one joint batch. It is 0 where there is no target.

    Args:
        outputs: of the model, with `logits` of shape [rows, (tokens,) classes].
        labels: class of each row or token; -100 where there is none.
        num_items_in_batch: targets of the window, on all processes; None for those of this batch.
        smoothing: share of a target that is spread over all classes (Szegedy et al. 2015, arXiv:1512.00567), as
            Trainer's `label_smoothing_factor`, which does not reach a loss of one's own.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    logits, labels = logits.flatten(0, -2).float(), labels.flatten().to(logits.device)
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
    return total / torch.as_tensor(count, device=logits.device).clamp(min=1)
