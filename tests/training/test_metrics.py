"""Metrics are what they are called, against sums by hand in float64 and scikit-learn, and none needs the hub."""

from __future__ import annotations

import math
import socket
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from transformers import EvalPrediction, GPT2Config, GPT2LMHeadModel, default_data_collator

from hf_gradguard.training.blocks import IGNORED, Blocks, Layout, tokenize
from hf_gradguard.training.metrics import Classification, Perplexity, classification, perplexity, row_sums
from hf_gradguard.training.tokenizer import trainable

TEXTS = ["The cat sat on the mat.", "It was, then, a mat no more!", "", "One  two\nthree."]


def logits_and_labels(seed: int, vocabulary: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(4, 9, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (4, 9), generator=generator)
    labels[torch.rand(4, 9, generator=generator) < 0.3] = IGNORED
    labels[3] = IGNORED  # a row without a target
    labels[0, :4] = logits[0, :4].argmax(-1)
    labels[1, 1:5] = logits[1, :4].argmax(-1)
    return logits, labels


def by_hand(logits: Tensor, labels: Tensor, *, is_causal: bool) -> list[list[float]]:
    """The same, token after token in float64."""
    rows = []
    for row in range(len(logits)):
        nll, count, correct = [], 0, 0
        for place in range(logits.shape[1] - is_causal):
            target = int(labels[row, place + is_causal])
            if target == IGNORED:
                continue
            values = [float(value) for value in logits[row, place].double()]
            nll.append(math.log(math.fsum(math.exp(value) for value in values)) - values[target])
            count += 1
            correct += values[target] == max(values)
        rows.append([math.fsum(nll), count, correct])
    return rows


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("is_causal", [False, True])
def test_sums_of_rows_are_those_by_hand(is_causal: bool, seed: int) -> None:
    logits, labels = logits_and_labels(seed)
    before = labels.clone()
    expected = torch.tensor(by_hand(logits, labels, is_causal=is_causal), dtype=torch.float64)
    for given in (logits, (logits, "caches"), logits.double()):
        found = row_sums(is_causal=is_causal)(given, labels)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)
        assert torch.equal(found[:, 1:], expected[:, 1:]), "counts are exact"
    assert torch.equal(labels, before)
    low = row_sums(is_causal=is_causal)(logits.bfloat16(), labels)
    exact = by_hand(logits.bfloat16().float(), labels, is_causal=is_causal)
    torch.testing.assert_close(low, torch.tensor(exact, dtype=torch.float64), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("words", [None, 17])
def test_perplexity_is_that_of_all_rows_together(words: int | None) -> None:
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 20, 50)
    nll = counts * generator.random(50) * 4
    correct = (counts * generator.random(50)).astype(int)
    found = perplexity(lambda: words)(
        EvalPrediction(predictions=np.stack([nll, counts, correct], 1), label_ids=np.zeros(50))
    )
    total, tokens = math.fsum(nll), int(counts.sum())
    expected = {"perplexity": math.exp(total / tokens), "token_accuracy": int(correct.sum()) / tokens}
    if words is not None:
        expected["perplexity_per_word"] = math.exp(total / words)
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_perplexity_beyond_all_numbers_is_infinite_and_one_of_nothing_is_none() -> None:
    def of(nll: float, tokens: int) -> Any:
        return perplexity(lambda: tokens)(EvalPrediction(np.array([[nll, tokens, 0]]), np.zeros(1)))

    assert of(1e6, 1)["perplexity"] == math.inf
    for values in (of(0.0, 0), of(math.nan, 3)):
        assert math.isnan(values["perplexity"])
        assert math.isnan(values["perplexity_per_word"])


def test_perplexity_per_word_of_a_model_over_blocks_is_that_of_the_documents_by_hand() -> None:
    tokenizer = trainable.parse("bpe:vocab_size=280").train([TEXTS], with_marks=False)
    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_head=2, n_embd=16, n_positions=8)
    model = GPT2LMHeadModel(config).eval()
    blocks = Blocks(
        tokenize(Dataset.from_dict({"text": TEXTS}), tokenizer, end), Layout(8, 1), first=end, keep_rest=True
    )

    sums, evaluated = row_sums(is_causal=True), []
    with torch.no_grad():
        for start in range(0, len(blocks), 2):
            rows = [blocks[index] for index in range(start, min(start + 2, len(blocks)))]
            batch = default_data_collator(rows)
            evaluated.append(sums(model(input_ids=batch["input_ids"]).logits, batch["labels"]))
    found = perplexity(lambda: blocks.words)(EvalPrediction(torch.cat(evaluated).numpy(), np.zeros(len(blocks))))

    # Each token of the documents, ends included, given those before it in its window of eight; in float64.
    stream = [end]
    for text in filter(str.strip, TEXTS):
        stream += [*tokenizer(text)["input_ids"], end]
    model.double()
    total, correct = [], 0
    for place in range(1, len(stream)):
        context = stream[(place - 1) // 7 * 7 : place]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context])).logits[0, -1]
        total.append(float(torch.logsumexp(logits, 0) - logits[stream[place]]))
        correct += int(logits.argmax()) == stream[place]
    words = sum(len(text.split()) + 1 for text in TEXTS if text)
    assert words == 6 + 1 + 7 + 1 + 3 + 1
    assert found["perplexity_per_word"] == pytest.approx(math.exp(math.fsum(total) / words), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(math.fsum(total) / (len(stream) - 1)), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(correct / (len(stream) - 1))


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_accuracy_and_f1_are_scikit_learns(seed: int, classes: int) -> None:
    generator = np.random.default_rng(seed)
    logits, references = generator.normal(size=(60, classes)), generator.integers(classes, size=60)
    for predictions in (logits, (logits, "hidden")):
        found = classification()(EvalPrediction(predictions, references))
        guesses = logits.argmax(-1)
        assert found == {
            "accuracy": accuracy_score(references, guesses),
            "f1": f1_score(references, guesses, average="macro"),
        }
    by_class = []
    for number in range(classes):  # the mean over the classes of 2TP / (2TP + FP + FN)
        hit = ((guesses == number) & (references == number)).sum()
        by_class.append(2 * hit / ((guesses == number).sum() + (references == number).sum()))
    assert found["f1"] == pytest.approx(np.mean(by_class))


def test_two_metrics_live_beside_one_another_and_can_be_used_again() -> None:
    one, other = classification(), classification()
    for _ in range(2):
        assert one(EvalPrediction(np.eye(2), np.array([0, 1])))["accuracy"] == 1.0
        assert other(EvalPrediction(np.eye(2), np.array([1, 0])))["accuracy"] == 0.0
    first, second = Perplexity(keep_in_memory=True), Perplexity(keep_in_memory=True)
    first.add(nll=1.0, tokens=1, correct=0)
    second.add(nll=2.0, tokens=1, correct=0)
    assert first.compute()["perplexity"] == pytest.approx(math.e)
    assert second.compute()["perplexity"] == pytest.approx(math.e**2)
    assert Classification(keep_in_memory=True).description


def test_metrics_ask_for_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    for owner, name in ((socket.socket, "connect"), (socket, "getaddrinfo"), (socket, "create_connection")):
        monkeypatch.setattr(owner, name, refuse)
    assert classification()(EvalPrediction(np.eye(2), np.array([0, 1])))["accuracy"] == 1.0
    assert perplexity(lambda: 1)(EvalPrediction(np.array([[0.0, 1, 1]]), np.zeros(1)))["perplexity"] == 1.0
