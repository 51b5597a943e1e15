"""Metrics in `evaluate`'s form that need no hub: perplexity, and accuracy with F1."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction

from hf_gradguard.training.blocks import IGNORED

Compute = Callable[[EvalPrediction], dict[str, float]]


class Perplexity(evaluate.Metric):  # type: ignore[misc]
    """The exponential of the mean negative log-likelihood, by token and by word.

    By word is what can be compared between tokenizers: the sum over all tokens, ends of documents included, divided by
    the number of words and ends.
    """

    def _info(self) -> Any:
        features = Features({"nll": Value("float64"), "tokens": Value("int64"), "correct": Value("int64")})
        return evaluate.MetricInfo(
            description="Perplexity by token and by word, and the share of tokens guessed right.",
            citation="Jelinek et al. (1977), Perplexity: a measure of the difficulty of speech recognition tasks",
            inputs_description="nll: sums of negative log-likelihoods, in nats; tokens, correct: how many",
            features=features,
        )

    def _compute(self, nll: list[float], tokens: list[int], correct: list[int], words: int | None = None) -> Any:
        total, count = math.fsum(nll), sum(tokens)
        values = {"perplexity": _exp(total, count), "token_accuracy": sum(correct) / count if count else math.nan}
        return values if words is None else {**values, "perplexity_per_word": _exp(total, words)}


class Classification(evaluate.Metric):  # type: ignore[misc]
    """Accuracy, and F1 as the mean over the classes (of two classes as well)."""

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description="Accuracy and macro-averaged F1.",
            citation="Pedregosa et al. (2011), Scikit-learn: Machine Learning in Python, JMLR 12",
            inputs_description="predictions, references: class of each row",
            features=Features({"predictions": Value("int64"), "references": Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> Any:
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "f1": float(f1_score(references, predictions, average="macro")),
        }


def classification() -> Compute:
    """For `Trainer(compute_metrics=…)` of a classifier."""
    metric = Classification(keep_in_memory=True)

    def compute(evaluated: EvalPrediction) -> dict[str, float]:
        logits: Any = evaluated.predictions[0] if isinstance(evaluated.predictions, tuple) else evaluated.predictions
        return metric.compute(predictions=logits.argmax(-1), references=evaluated.label_ids)  # type: ignore[no-any-return]

    return compute


def perplexity(words: Callable[[], int | None]) -> Compute:
    """For `Trainer(compute_metrics=…)` of a language model, beside `row_sums` for its logits.

    Args:
        words: how many words the text that is evaluated has; None where that is not known.
    """
    metric = Perplexity(keep_in_memory=True)

    def compute(evaluated: EvalPrediction) -> dict[str, float]:
        nll, tokens, correct = np.asarray(evaluated.predictions).T
        counts = {"tokens": tokens.astype(np.int64), "correct": correct.astype(np.int64)}
        return metric.compute(nll=nll, **counts, words=words())  # type: ignore[no-any-return]

    return compute


def row_sums(*, is_causal: bool) -> Callable[[Any, Tensor], Tensor]:
    """For `Trainer(preprocess_logits_for_metrics=…)`: what is kept of the logits of a batch.

    Args:
        is_causal: whether the logits at a token are those of the next one.

    Returns:
        A function of logits [rows, tokens, vocabulary] and labels [rows, tokens] that gives, for each row, the sum of
        the negative log-likelihoods of its targets (in float64, nats), how many there are, and how many of them have
        the largest logit: [rows, 3].
    """

    def sums(logits: Any, labels: Tensor) -> Tensor:
        logits = logits[0] if isinstance(logits, tuple) else logits
        if is_causal:
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        # One row a token, and the logits as they lie: three times as fast as with the vocabulary in their midst.
        flat = logits.float().flatten(0, 1)
        losses = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="none").view(labels.shape)
        is_target = labels != IGNORED
        found = torch.stack([is_target.sum(1), ((logits.argmax(-1) == labels) & is_target).sum(1)], 1)
        exact = torch.float32 if losses.device.type == "mps" else torch.float64
        return torch.cat([losses.to(exact).sum(1, keepdim=True), found.to(exact)], 1)

    return sums


def _exp(total: float, count: int) -> float:
    """The exponential of a mean; NaN where there is nothing to take it of."""
    if not count or math.isnan(total):
        return math.nan
    return math.exp(total / count) if total / count < 700 else math.inf
