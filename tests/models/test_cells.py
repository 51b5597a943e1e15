"""The models compute what textbooks say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_gradguard.models.cells import CELLS as TABLE
from hf_gradguard.models.configuration import CellName
from tests.models import textbook
from tests.models.recurrent import CELLS, language_model, tokens

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm and residual": {"layer_norm": True, "residual": True},
    "narrow embedding": {"embedding_size": 8, "residual": True},
    "tied": {"tie_word_embeddings": True},
    "tied, narrow embedding": {"tie_word_embeddings": True, "embedding_size": 8},
}


def test_every_cell_of_the_configuration_is_in_the_table() -> None:
    from typing import get_args

    assert tuple(TABLE) == get_args(CellName) == CELLS


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_logits_are_those_of_the_textbook_in_float64(cell: str, shape: str) -> None:
    model = language_model(cell=cell, **SHAPES[shape])
    ids = tokens(2, 12)
    expected = np.stack([textbook.logits(model, row.numpy()) for row in ids])
    with torch.no_grad():
        single, double = model(ids).logits, model.double()(ids).logits
    np.testing.assert_allclose(double.numpy(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_states_of_a_layer_are_those_of_the_textbook_to_1e_6(cell: str) -> None:
    model = language_model(cell=cell, num_layers=1)
    ids = tokens(1, 30)
    with torch.no_grad():
        outputs = model.model(ids, use_cache=True)
    embedded = textbook.weights_of(model.model.embed_tokens)["weight"][ids[0].numpy()]
    cell_weights = textbook.weights_of(model.model.layers[0].cell)
    expected, state = textbook.read(textbook.STEPS[cell], cell_weights, embedded, 16)
    np.testing.assert_allclose(outputs.last_hidden_state[0].numpy(), expected, rtol=0, atol=1e-6)
    found = outputs.past_key_values.states[0]
    assert len(found) == len(state) == len(TABLE[cell].states)  # type: ignore[index]
    for one, other in zip(found, state, strict=True):
        np.testing.assert_allclose(one[0].numpy(), other, rtol=0, atol=1e-6)


def test_the_gru_resets_after_the_recurrent_product() -> None:
    model = language_model(cell="gru").double()
    ids = tokens(1, 12)
    with torch.no_grad():
        found = model(ids).logits[0].numpy()
    other = textbook.logits(model, ids[0].numpy(), textbook.gru_of_version_3)
    assert np.abs(found - other).max() > 1e-3


def test_hidden_states_are_the_embeddings_and_each_layers_output() -> None:
    model = language_model(layer_norm=True, residual=True)
    ids = tokens(2, 5)
    with torch.no_grad():
        outputs = model.model(ids, output_hidden_states=True)
    assert [list(hidden.shape) for hidden in outputs.hidden_states] == [[2, 5, 16]] * 4
    assert torch.equal(outputs.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)


def test_embeddings_in_place_of_tokens_give_the_same() -> None:
    model = language_model()
    ids = tokens(2, 5)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(inputs_embeds=model.get_input_embeddings()(ids)).logits)


def test_some_logits_are_those_among_all() -> None:
    model = language_model()
    ids = tokens(2, 5)
    with torch.no_grad():
        every = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, every[:, -2:])
        torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, every[:, [0, 3]])


def test_a_tuple_is_given_to_who_asks_for_one() -> None:
    model = language_model()
    ids = tokens(1, 4)
    with torch.no_grad():
        loss, logits, _ = model(ids, labels=ids, return_dict=False)
        assert torch.equal(logits, model(ids).logits)
    assert loss.dim() == 0


@pytest.mark.parametrize("both", [True, False])
def test_tokens_and_embeddings_exclude_one_another(both: bool) -> None:
    model = language_model()
    ids = tokens(1, 4)
    inputs = {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)} if both else {}
    with pytest.raises(ValueError, match=f"{'both' if both else 'neither'} of them given; give one"):
        model(**inputs)
