"""The dropouts: where they act, that their gradients are right, and that they are nothing outside training."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hf_gradguard.models.dropout import LockedDropout, drop_words
from hf_gradguard.models.layer import RecurrentLayer
from tests.models.recurrent import CELLS, config, language_model, tokens

EVERY: dict[str, Any] = {
    "embedding_dropout": 0.3,
    "input_dropout": 0.3,
    "layer_dropout": 0.3,
    "output_dropout": 0.3,
    "recurrent_dropout": 0.3,
}


def layer(cell: str, width: int = 4, **options: Any) -> RecurrentLayer:
    torch.manual_seed(0)
    return RecurrentLayer(config(cell=cell, hidden_size=width, embedding_size=3, **options), 0).double().train()


def dropped(recurrent: RecurrentLayer, share: float, seed: int) -> RecurrentLayer:
    """The layer without dropout, and with the recurrent weights that it has with it."""
    other = copy.deepcopy(recurrent)
    other.recurrent_dropout = 0.0
    torch.manual_seed(seed)
    with torch.no_grad():
        other.cell.weight_hh_l0.copy_(functional.dropout(other.cell.weight_hh_l0, share))
    return other


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_weights_are_dropped_once_for_all_steps(cell: str, packed: bool) -> None:
    recurrent = layer(cell, recurrent_dropout=0.5)
    inputs = torch.randn(3, 6, 3, dtype=torch.float64)
    lengths = torch.tensor([6, 2, 4]) if packed else None
    torch.manual_seed(1)
    found = recurrent(inputs, lengths)
    other = dropped(recurrent, 0.5, seed=1)
    for one, expected in zip(found, other(inputs, lengths), strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=0)
    assert (found[0] - recurrent.eval()(inputs, lengths)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_through_dropped_weights_are_those_of_finite_differences(cell: str) -> None:
    recurrent = layer(cell, recurrent_dropout=0.5)
    names = [name for name, _ in recurrent.cell.named_parameters()]

    def run(inputs: Tensor, *weights: Tensor) -> Tensor:
        torch.manual_seed(1)
        parameters = {f"cell.{name}": weight for name, weight in zip(names, weights, strict=True)}
        return torch.func.functional_call(recurrent, parameters, (inputs,))[0]  # type: ignore[no-any-return]

    weights = [weight.detach().clone().requires_grad_() for weight in recurrent.cell.parameters()]
    inputs = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (inputs, *weights), atol=1e-7)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_reach_the_parameters_and_none_the_weights_that_are_dropped(cell: str) -> None:
    recurrent = layer(cell, recurrent_dropout=0.5)
    inputs = torch.randn(2, 5, 3, dtype=torch.float64)
    torch.manual_seed(1)
    recurrent(inputs)[0].square().sum().backward()
    other = dropped(recurrent, 0.5, seed=1)
    other(inputs)[0].square().sum().backward()
    kept = (other.cell.weight_hh_l0 != 0).double() / 0.5
    for name, parameter in recurrent.cell.named_parameters():
        expected = other.cell.get_parameter(name).grad
        assert expected is not None
        torch.testing.assert_close(parameter.grad, expected * kept if name == "weight_hh_l0" else expected)
    assert 0 < (kept == 0).sum() < kept.numel()


def test_masks_change_from_pass_to_pass() -> None:
    recurrent = layer("lstm", width=16, recurrent_dropout=0.5)
    inputs = torch.randn(2, 5, 3, dtype=torch.float64)
    assert (recurrent(inputs)[0] - recurrent(inputs)[0]).abs().max() > 1e-4


def test_several_passes_may_share_one_backward() -> None:
    recurrent = layer("lstm", recurrent_dropout=0.5)
    inputs = torch.randn(2, 5, 3, dtype=torch.float64)
    output, *state = recurrent(inputs)
    (output.sum() + recurrent(inputs, None, *state)[0].sum()).backward()
    assert all(parameter.grad is not None for parameter in recurrent.parameters())


@pytest.mark.parametrize("locked", [False, True])
def test_all_dropouts_are_nothing_outside_training(locked: bool) -> None:
    with_dropout = language_model(**EVERY, locked_dropout=locked)
    without = language_model()
    ids = tokens(2, 6)
    assert torch.equal(with_dropout(ids).logits, without(ids).logits)
    assert not torch.equal(with_dropout.train()(ids).logits, without.train()(ids).logits)


@pytest.mark.parametrize("name", EVERY)
def test_each_dropout_acts(name: str) -> None:
    model = language_model(**{name: 0.5}).train()
    ids = tokens(2, 6)
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_a_trained_model_copies_pickles_and_keeps_no_graph() -> None:
    model = language_model(recurrent_dropout=0.5).train()
    ids = tokens(2, 6)
    model(ids, labels=ids).loss.backward()
    model.eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, model(ids).logits)
    assert all(parameter.is_leaf for parameter in model.parameters())


def test_locked_dropout_drops_the_same_units_in_all_steps() -> None:
    torch.manual_seed(0)
    dropout = LockedDropout(0.25)
    found = dropout(torch.ones(400, 7, 5))
    assert torch.equal(found, found[:, :1].expand_as(found))
    assert found.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert found.mean().item() == pytest.approx(1, abs=0.05)
    assert found.std(dim=0).min() > 0  # other units in other rows
    assert torch.equal(dropout.eval()(found), found)


def test_a_dropped_word_is_dropped_wherever_it_stands() -> None:
    torch.manual_seed(0)
    words = torch.randint(0, 20, (30, 40))
    found = drop_words(torch.ones(30, 40, 2), words, 20, 0.5)
    of_word = {word: set(found[words == word].flatten().tolist()) for word in range(20)}
    assert all(len(values) == 1 for values in of_word.values())
    assert set.union(*of_word.values()) == {0.0, 2.0}
