"""Losses are what they are said to be, and Trainer accumulates them rightly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Trainer

from hf_gradguard import GradGuardCallback, RecurrentForCausalLM, RecurrentForSequenceClassification
from tests.models.recurrent import classifier, config, language_model, tokens
from tests.training import arguments, weights

SGD: dict[str, Any] = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.5}


def test_the_loss_of_a_language_model_is_the_mean_cross_entropy_of_the_next_token() -> None:
    model = language_model()
    ids = tokens(3, 8)
    labels = ids.clone()
    labels[0, 5:] = -100
    with torch.no_grad():
        outputs = model(ids, labels=labels)
        expected = functional.cross_entropy(outputs.logits[:, :-1].reshape(-1, 50), labels[:, 1:].reshape(-1))
        torch.testing.assert_close(outputs.loss, expected)
        by_count = model(ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss
        torch.testing.assert_close(by_count, expected * (labels[:, 1:] != -100).sum() / 100)


def test_targets_may_come_moved_already() -> None:
    model = language_model()
    text = tokens(2, 9)
    with torch.no_grad():
        outputs = model(text[:, :-1], shift_labels=text[:, 1:])
        expected = functional.cross_entropy(outputs.logits.reshape(-1, 50), text[:, 1:].reshape(-1))
    torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.parametrize(
    ("options", "labels", "expected"),
    [
        ({"num_labels": 3}, torch.tensor([0, 2, 1, 1]), functional.cross_entropy),
        ({"num_labels": 3}, torch.rand(4, 3).round(), functional.binary_cross_entropy_with_logits),
        ({"num_labels": 1}, torch.rand(4), lambda found, wanted: functional.mse_loss(found.squeeze(), wanted)),
        ({"num_labels": 2, "problem_type": "regression"}, torch.rand(4, 2), functional.mse_loss),
    ],
)
def test_classifiers_have_transformers_problem_types(options: dict[str, Any], labels: Tensor, expected: Any) -> None:
    model = classifier(**options)
    with torch.no_grad():
        outputs = model(tokens(4, 5), labels=labels)
    torch.testing.assert_close(outputs.loss, expected(outputs.logits, labels))


def text_rows(count: int) -> list[dict[str, Any]]:
    """Rows of unequal numbers of targets, so that a mean of means is not the mean."""
    rows = []
    for index in range(count):
        ids = tokens(1, 10, seed=index)[0]
        labels = ids.clone()
        labels[4 + index % 5 :] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def classified_rows(count: int) -> list[dict[str, Any]]:
    return [{"input_ids": tokens(1, 6, seed=index)[0], "labels": index % 3} for index in range(count)]


@pytest.mark.parametrize("kind", ["language model", "classifier"])
def test_accumulated_micro_batches_train_as_one_batch(kind: str, tmp_path: Path) -> None:
    found = []
    for batch, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        if kind == "classifier":
            model: Any = RecurrentForSequenceClassification(config(num_labels=3))
            rows = classified_rows(24)
        else:
            model, rows = RecurrentForCausalLM(config()), text_rows(24)
        callback = GradGuardCallback()
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 3, **SGD}
        run = Trainer(model, arguments(tmp_path / str(batch), **options), train_dataset=rows, callbacks=[callback])
        run.train()
        assert callback.guard is not None
        assert not callback.guard.events  # nor does the guard warn that the loss is scaled wrongly
        found.append(weights(run.model))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-5, atol=1e-6)


def test_truncated_backpropagation_carries_the_state_and_cuts_the_gradient() -> None:
    model = language_model().double()
    text = tokens(2, 13)
    inputs, targets = text[:, :-1].split(4, dim=1), text[:, 1:].split(4, dim=1)
    state, losses = None, []
    for piece, wanted in zip(inputs, targets, strict=True):
        outputs = model(piece, shift_labels=wanted, past_key_values=state, use_cache=True)
        model.zero_grad()
        outputs.loss.backward()
        state = outputs.past_key_values.detach()
        losses.append(outputs.loss.detach())
    carried = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(losses).mean(), model(text[:, :-1], shift_labels=text[:, 1:]).loss)
    model.zero_grad()  # the same by one call whose earlier hidden states are constants
    with torch.no_grad():
        before = model(text[:, :8]).past_key_values
    model(inputs[2], shift_labels=targets[2], past_key_values=before).loss.backward()
    for name, gradient in carried.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)


def test_without_the_cut_gradients_reach_the_earlier_text() -> None:
    model = language_model().double()
    embeddings = model.get_input_embeddings()(tokens(1, 6)).detach().requires_grad_()
    state = model(inputs_embeds=embeddings, use_cache=True).past_key_values
    later = tokens(1, 4, seed=2)
    model(later, past_key_values=state, labels=later).loss.backward()
    assert embeddings.grad is not None
    assert (embeddings.grad.abs().sum(dim=-1) > 0).all()
