"""Padding is not read: a row gives what it gives alone, wherever its padding stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.recurrent import CELLS, classifier, language_model, padded, tokens

LENGTHS = (7, 1, 4, 5)


def rows(seed: int = 3) -> list[Tensor]:
    return [tokens(1, length, seed + index)[0] for index, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_logits_and_states_of_a_padded_row_are_those_of_the_row_alone(
    dtype: torch.dtype, near: float, cell: str, side: str, extra: int
) -> None:
    model = language_model(cell=cell, residual=True).to(dtype)
    ids, mask = padded(rows(), side, extra)
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, output_hidden_states=True)
        for index, row in enumerate(rows()):
            alone = model(row.unsqueeze(0), output_hidden_states=True)
            real = mask[index].bool()
            torch.testing.assert_close(batch.logits[index, real], alone.logits[0], rtol=0, atol=near)
            for one, other in zip(batch.hidden_states, alone.hidden_states, strict=True):
                torch.testing.assert_close(one[index, real], other[0], rtol=0, atol=near)
                assert not one[index, ~real].any()
            for one, other in zip(batch.past_key_values.states, alone.past_key_values.states, strict=True):
                for found, expected in zip(one, other, strict=True):
                    torch.testing.assert_close(found[index], expected[0], rtol=0, atol=near)


def test_padding_within_a_row_is_not_read_either() -> None:
    model = language_model()
    ids = tokens(1, 6)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1]])
    with torch.no_grad():
        found = model(ids, attention_mask=mask).logits[0, mask[0].bool()]
        torch.testing.assert_close(found, model(ids[:, [0, 2, 3, 5]]).logits[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_an_empty_row_keeps_its_state(cell: str) -> None:
    model = language_model(cell=cell)
    first, second = tokens(2, 5), tokens(2, 3, seed=9)
    mask = torch.tensor([[0, 0, 0], [1, 1, 0]])
    with torch.no_grad():
        before = model(first).past_key_values
        after = model(second, attention_mask=mask, past_key_values=before).past_key_values
        begun = model(second, attention_mask=mask).past_key_values
    for old, new, fresh in zip(before.states, after.states, begun.states, strict=True):
        for one, other, zero in zip(old, new, fresh, strict=True):
            assert torch.equal(one[0], other[0])
            assert not torch.equal(one[1], other[1])
            assert not zero[0].any()
            assert zero[1].any()


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_padded_text_is_classified_as_it_is_alone(cell: str, side: str, pooling: str) -> None:
    model = classifier(cell=cell, pooling=pooling, num_labels=3)
    ids, mask = padded(rows(), side, extra=2)
    with torch.no_grad():
        batch = model(ids, attention_mask=mask).logits
        alone = torch.cat([model(row.unsqueeze(0)).logits for row in rows()])
    torch.testing.assert_close(batch, alone, rtol=0, atol=1e-6)
    assert (alone - alone[0]).abs().max() > 1e-3  # texts are told apart at all


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("last", lambda hidden: hidden[-1]),
        ("mean", lambda hidden: hidden.mean(dim=0)),
        ("max", lambda hidden: hidden.max(dim=0).values),
    ],
)
def test_pooling_is_what_it_is_called(pooling: str, expected: Any) -> None:
    model = classifier(pooling=pooling)
    (row,) = tokens(1, 6)
    with torch.no_grad():
        hidden = model.model(row.unsqueeze(0)).last_hidden_state[0]
        found = model(row.unsqueeze(0)).logits[0]
        torch.testing.assert_close(found, model.score(expected(hidden)))


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
def test_an_empty_text_is_pooled_to_zeros(pooling: str) -> None:
    model = classifier(pooling=pooling)
    with torch.no_grad():
        found = model(tokens(2, 3), attention_mask=torch.tensor([[0, 0, 0], [1, 1, 1]])).logits
    assert torch.equal(found[0], model.score.bias)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_gets_no_gradient_and_gives_none(side: str) -> None:
    model = language_model()
    ids, mask = padded(rows(), side, extra=2)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    follows_a_token = (mask == 1) & (mask.roll(1, dims=1) == 1)
    labels = ids.masked_fill(~follows_a_token, -100)
    model(inputs_embeds=embeddings, attention_mask=mask, labels=labels).loss.backward()
    assert embeddings.grad is not None
    assert not embeddings.grad[mask == 0].any()
    batch = {name: parameter.grad for name, parameter in model.named_parameters() if "embed" not in name}
    model.zero_grad()
    count = sum(len(row) - 1 for row in rows())
    for row in rows():
        model(row.unsqueeze(0), labels=row.unsqueeze(0), num_items_in_batch=count).loss.backward()
    for name, gradient in batch.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 4), (2, 6), (3, 5), (2, 1, 5, 5)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"attention_mask has shape .*\[2, 5\] here"):
        language_model()(tokens(2, 5), attention_mask=torch.ones(shape))
