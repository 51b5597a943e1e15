"""Generation: with a state as without, padded as unpadded, by whatever search."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from hf_gradguard.models.state import RecurrentState
from tests.models.recurrent import CELLS, language_model, padded, tokens

SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 4, "do_sample": False},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "several": {"num_return_sequences": 3, "do_sample": True},
    "diverse prompts in chunks": {"do_sample": False, "prefill_chunk_size": 2},
}
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}


def generate(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    torch.manual_seed(5)
    return model.generate(ids, **{**OPTIONS, **options})


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("cell", CELLS)
def test_with_a_state_the_same_tokens_come_as_without(cell: str, search: str) -> None:
    model = language_model(cell=cell)
    ids = tokens(2, 5)
    options = {"attention_mask": torch.ones_like(ids), **SEARCHES[search]}
    carried = generate(model, ids, **options)
    options.pop("prefill_chunk_size", None)
    anew = generate(model, ids, **options, use_cache=False)
    assert torch.equal(carried.sequences, anew.sequences)
    for one, other in zip(carried.logits, anew.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("search", ["greedy", "sampling", "beams"])
@pytest.mark.parametrize("cell", CELLS)
def test_padding_on_the_left_does_not_change_what_comes(cell: str, search: str, use_cache: bool) -> None:
    model = language_model(cell=cell)
    rows = [tokens(1, 6)[0]] * 2 if search == "sampling" else [tokens(1, 6)[0], tokens(1, 3, seed=2)[0]]
    ids, mask = padded(rows, "left", extra=2)
    together = generate(model, ids, attention_mask=mask, use_cache=use_cache, **SEARCHES[search])
    if search == "sampling":  # of equal rows, because random numbers are drawn for a whole batch
        alone = [generate(model, torch.stack(rows), use_cache=use_cache, **SEARCHES[search]).sequences]
        assert torch.equal(alone[0][:, 6:], together.sequences[:, 8:])
        return
    for row, found in zip(rows, together.sequences, strict=True):
        (expected,) = generate(model, row.unsqueeze(0), use_cache=use_cache, **SEARCHES[search]).sequences
        assert torch.equal(found[8:][: len(expected) - len(row)], expected[len(row) :])


@pytest.mark.parametrize("cell", CELLS)
def test_a_text_may_be_read_in_pieces(cell: str) -> None:
    model = language_model(cell=cell, layer_norm=True, residual=True)
    ids = tokens(2, 9)
    with torch.no_grad():
        whole = model(ids)
        state, pieces = None, []
        for piece in ids.split([4, 1, 3, 1], dim=1):
            outputs = model(piece, past_key_values=state)
            state = outputs.past_key_values
            pieces.append(outputs.logits)
    assert state is not None
    assert state.get_seq_length() == whole.past_key_values.get_seq_length() == 9
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole.logits, rtol=0, atol=1e-6)


def test_a_state_that_is_read_on_from_stays_as_it_was() -> None:
    model = language_model()
    with torch.no_grad():
        state = model(tokens(2, 4)).past_key_values
        kept = copy.deepcopy(state)
        first = model(tokens(2, 3, seed=2), past_key_values=state)
        second = model(tokens(2, 3, seed=2), past_key_values=state)
    assert torch.equal(first.logits, second.logits)
    assert state.length == kept.length == 4
    for one, other in zip(state.states, kept.states, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_generation_goes_on_from_what_it_returned() -> None:
    model = language_model()
    ids = tokens(2, 5)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": None}
    whole = generate(model, ids, **options).sequences
    half = generate(model, ids, **options, max_new_tokens=4)
    assert half.past_key_values.get_seq_length() == 5 + 4 - 1
    rest = generate(model, half.sequences, **options, max_new_tokens=4, past_key_values=half.past_key_values)
    assert torch.equal(rest.sequences, whole)


def test_embeddings_as_a_prompt() -> None:
    model = language_model()
    ids = tokens(2, 5)
    found = generate(model, None, inputs_embeds=model.get_input_embeddings()(ids), do_sample=False).sequences
    assert torch.equal(found, generate(model, ids, do_sample=False).sequences[:, 5:])


@pytest.mark.parametrize("cache", ["static", "dynamic", "offloaded"])
def test_asking_for_another_kind_of_cache_changes_nothing(cache: str) -> None:
    model = language_model()
    ids = tokens(2, 5)
    found = generate(model, ids, do_sample=False, cache_implementation=cache).sequences
    assert torch.equal(found, generate(model, ids, do_sample=False).sequences)


def test_an_empty_cache_is_a_beginning() -> None:
    model = language_model()
    ids = tokens(2, 5)
    with torch.no_grad():
        outputs = model(ids, past_key_values=DynamicCache(config=model.config))
        assert torch.equal(outputs.logits, model(ids).logits)
    assert isinstance(outputs.past_key_values, RecurrentState)


def test_another_models_cache_is_refused() -> None:
    other = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0))
    ids = tokens(2, 5)
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache; a recurrent model goes on from"):
        language_model()(ids, past_key_values=other(ids).past_key_values)


@pytest.mark.parametrize(
    ("options", "rows"), [({}, 3), ({"num_layers": 2}, 2), ({"hidden_size": 8}, 2), ({"cell": "gru"}, 2)]
)
def test_a_state_that_does_not_fit_is_refused(options: dict[str, Any], rows: int) -> None:
    state = language_model(**options)(tokens(rows, 4)).past_key_values
    with pytest.raises(ValueError, match=r"this call needs \[2, 16\] and \[2, 16\] in 3: give the state of"):
        language_model()(tokens(2, 4), past_key_values=state)


def test_what_can_not_be_undone_is_refused() -> None:
    model = language_model()
    state = model(tokens(1, 4)).past_key_values
    state.crop(0)
    with pytest.raises(ValueError, match=r"crop\(-1\): a recurrent state can't forget"):
        state.crop(-1)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generate(model, tokens(1, 4), assistant_model=model)


def test_rows_of_a_state_are_chosen_repeated_and_reset() -> None:
    model = language_model()
    ids = tokens(3, 4)
    after = tokens(4, 2, seed=2)
    with torch.no_grad():
        state = model(ids).past_key_values
        state.batch_select_indices(torch.tensor([2, 0]))
        state.batch_repeat_interleave(2)
        expected = model(torch.cat([ids[[2, 2, 0, 0]], after], dim=1)).logits[:, 4:]
        torch.testing.assert_close(model(after, past_key_values=state).logits, expected, rtol=0, atol=1e-6)
        assert state.batch_size == 4
        state.reset()
        torch.testing.assert_close(model(after, past_key_values=state).logits, model(after).logits)
    assert state.get_seq_length() == 0


def test_the_state_is_returned_where_it_is_of_use() -> None:
    model = language_model()
    ids = tokens(1, 4)
    state = model(ids).past_key_values
    assert state is not None
    assert model(ids, use_cache=False).past_key_values is None
    model.train()
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None
    assert model(ids, past_key_values=state).past_key_values is not None
    model.config.use_cache = False
    assert model.eval()(ids).past_key_values is None
