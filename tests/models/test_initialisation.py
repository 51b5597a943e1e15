"""How weights begin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_gradguard import RecurrentForCausalLM, RecurrentForSequenceClassification
from hf_gradguard.models.cells import CELLS as TABLE
from tests.models.recurrent import CELLS, config


def made(**options: Any) -> RecurrentForCausalLM:
    torch.manual_seed(0)
    return RecurrentForCausalLM(config(**options))


def cells(model: Any) -> list[nn.RNNBase]:
    return [layer.cell for layer in model.model.layers]


def blocks(cell: str, weight: Tensor) -> dict[str, Tensor]:
    gates = TABLE[cell].gates  # type: ignore[index]
    return dict(zip(gates, weight.detach().chunk(len(gates)), strict=True))


@pytest.mark.parametrize("bias_init", ["zeros", "uniform"])
@pytest.mark.parametrize("forget_bias", [1.0, -0.5, 0.0])
def test_the_two_biases_of_the_forget_gate_add_up_to_what_was_asked(forget_bias: float, bias_init: str) -> None:
    for cell in cells(made(forget_bias=forget_bias, bias_init=bias_init)):
        total = blocks("lstm", cell.bias_ih_l0 + cell.bias_hh_l0)
        assert torch.equal(total["forget"], torch.full_like(total["forget"], forget_bias))
        for gate in ("input", "candidate", "output"):
            assert bool(total[gate].any()) == (bias_init == "uniform")


def test_the_forget_gate_is_the_one_that_keeps_the_cell() -> None:
    model = made(forget_bias=30.0, num_layers=1)
    state = model(torch.tensor([[3, 4]]), use_cache=True).past_key_values
    with torch.no_grad():
        for gate, value in (("input", -30.0), ("candidate", 0.0)):
            blocks("lstm", cells(model)[0].bias_ih_l0)[gate].fill_(value)
        after = model(torch.tensor([[5, 6]]), past_key_values=state).past_key_values
    torch.testing.assert_close(after.states[0][1], state.states[0][1].detach())


@pytest.mark.parametrize("cell", ["gru", "rnn_tanh", "rnn_relu"])
def test_cells_without_a_forget_gate_have_no_such_bias(cell: str) -> None:
    for one in cells(made(cell=cell, forget_bias=1.0)):
        assert not one.bias_ih_l0.any()
        assert not one.bias_hh_l0.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_each_gates_recurrent_block_is_orthogonal(cell: str, dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        model = made(cell=cell)
    finally:
        torch.set_default_dtype(before)
    near = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}[dtype]
    for one in cells(model):
        assert one.weight_hh_l0.dtype == dtype
        for block in blocks(cell, one.weight_hh_l0).values():
            torch.testing.assert_close(block @ block.T, torch.eye(16, dtype=dtype), rtol=0, atol=near)


@pytest.mark.parametrize("cell", CELLS)
def test_identity_makes_every_recurrent_block_the_identity(cell: str) -> None:
    for one in cells(made(cell=cell, recurrent_init="identity")):
        for block in blocks(cell, one.weight_hh_l0).values():
            assert torch.equal(block, torch.eye(16))


def test_xavier_looks_at_a_gates_own_width() -> None:
    model = made(hidden_size=64, embedding_size=32, recurrent_init="xavier")
    first = cells(model)[0]
    for weight, inputs in ((first.weight_ih_l0, 32), (first.weight_hh_l0, 64)):
        bound = (6 / (inputs + 64)) ** 0.5
        for block in blocks("lstm", weight).values():
            assert block.abs().max() <= bound
            assert block.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


@pytest.mark.parametrize("init_range", [0.1, 0.05])
def test_the_small_lstm_of_the_literature_is_uniform_in_everything(init_range: float) -> None:
    model = made(
        input_init="uniform",
        recurrent_init="uniform",
        bias_init="uniform",
        forget_bias=None,
        init_range=init_range,
        hidden_size=64,
    )
    for name, parameter in model.named_parameters():
        assert parameter.abs().max() <= init_range, name
        assert parameter.std().item() == pytest.approx(init_range / 3**0.5, rel=0.25), name


def test_embedding_and_head_are_uniform_norms_are_ones_and_biases_zeros_by_default() -> None:
    model = made(layer_norm=True, init_range=0.2)
    for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
        assert 0.15 < weight.abs().max() <= 0.2
    assert not model.lm_head.bias.any()
    for layer in model.model.layers:
        assert (layer.norm.weight == 1).all()
        assert not layer.norm.bias.any()


def test_a_seed_gives_the_same_weights_and_layers_differ() -> None:
    one, other = made(), made()
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))
    first, second, _ = cells(one)
    assert not torch.equal(first.weight_hh_l0, second.weight_hh_l0)


def test_weights_from_a_checkpoint_stay_and_new_ones_are_made(tmp_path: Any) -> None:
    model = made()
    model.save_pretrained(tmp_path)
    torch.manual_seed(3)
    loaded = RecurrentForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    for name, parameter in model.model.named_parameters():
        assert torch.equal(parameter, loaded.model.get_parameter(name))
    assert 0.05 < loaded.score.weight.abs().max() <= 0.1


def test_a_model_may_be_made_without_memory() -> None:
    with torch.device("meta"):
        assert made().device.type == "meta"
