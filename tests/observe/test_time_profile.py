"""The norm of ∂ loss_t / ∂ x_{t−k} is exact, of the right tokens, and measuring it leaves no trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from hf_gradguard.observe.reach import TimeProfile
from hf_gradguard.observe.time_profile import time_profile
from tests.models import VOCABULARY, make, text_blocks
from tests.models.recurrent import CELLS, classifier, language_model, padded, tokens
from tests.training import assert_bit_equal, weights

TOKENS = 14


class Recurrent(nn.Module):
    """A language model on one of torch's recurrent modules; a classifier where it has two classes."""

    def __init__(
        self, kind: type[nn.RNNBase], layers: int = 1, width: int = 6, classes: int = VOCABULARY, **options: Any
    ):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.mixer = kind(width, width, layers, batch_first=True, **options)
        self.head = nn.Linear(width * (1 + self.mixer.bidirectional), classes)
        self.classes = classes

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **_: Any) -> CausalLMOutput:
        embedded = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        hidden, _ = self.mixer(embedded)
        return CausalLMOutput(logits=self.head(hidden[:, -1] if self.classes < VOCABULARY else hidden))


def recurrent(kind: type[nn.RNNBase], **options: Any) -> Recurrent:
    torch.manual_seed(0)
    return Recurrent(kind, **options)


def wide_gpt2(kind: str = "GPT2LMHeadModel", **options: Any) -> nn.Module:
    """With weights so large that tokens have much to say to one another."""
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=40, initializer_range=0.4, **options
    )
    return getattr(tf, kind)(config)  # type: ignore[no-any-return]


def batch(rows: int = 3, tokens: int = TOKENS) -> dict[str, Tensor]:
    ids = torch.tensor(text_blocks(rows, tokens))
    return {"input_ids": ids, "labels": ids}


def losses_at(model: nn.Module, embedded: Tensor, ids: Tensor, position: int) -> Tensor:
    """−log p of the token after `position`, `[rows]`, from the embedded inputs, in float64."""
    logits = model(inputs_embeds=embedded).logits
    return F.cross_entropy(logits[:, position], ids[:, position + 1], reduction="none")


def finite_differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-4) -> Tensor:
    """Gradient of each row's number `[rows]` by its inputs `[rows, ...]`, by central differences of fourth order."""
    gradient = torch.zeros_like(at)
    with torch.no_grad():
        for place in np.ndindex(*at.shape[1:]):
            moved = torch.zeros_like(at)
            moved[:, *place] = step
            near = function(at + moved) - function(at - moved)
            far = function(at + 2 * moved) - function(at - 2 * moved)
            gradient[:, *place] = (8 * near - far) / (12 * step)
    return gradient


def by_lag(norms: Tensor, position: int) -> np.ndarray:
    """Norms `[rows, tokens]` as `[rows, lags]`."""
    return norms[:, : position + 1].flip(1).numpy()


# Exactness


def test_a_tanh_rnn_gives_the_product_of_its_jacobians() -> None:
    model = recurrent(nn.RNN).double()
    given, position = batch(), 9
    profile = time_profile(model, given, positions=[position], max_lag=position)
    mixer, head = model.mixer, model.head
    with torch.no_grad():
        embedded = model.embedding(given["input_ids"])
        for row, ids in enumerate(given["input_ids"]):
            states, state = [], torch.zeros(6, dtype=torch.float64)
            for x in embedded[row]:
                state = torch.tanh(
                    mixer.weight_ih_l0 @ x + mixer.bias_ih_l0 + mixer.weight_hh_l0 @ state + mixer.bias_hh_l0
                )
                states.append(state)
            error = torch.softmax(head(states[position]), 0) - F.one_hot(ids[position + 1], VOCABULARY)
            adjoint = head.weight.T @ error  # ∂ loss_t / ∂ h_t
            for lag in range(position + 1):
                slope = 1 - states[position - lag] ** 2
                expected = (mixer.weight_ih_l0.T @ (slope * adjoint)).norm().item()
                assert profile.norms[row, lag] == pytest.approx(expected, rel=1e-12)
                adjoint = mixer.weight_hh_l0.T @ (slope * adjoint)  # ∂ loss_t / ∂ h_{t−lag−1}


@pytest.mark.parametrize(
    "model",
    [
        wide_gpt2(),
        recurrent(nn.LSTM, layers=2),
        recurrent(nn.GRU),
        recurrent(nn.RNN, layers=2, nonlinearity="relu"),
    ],
    ids=["gpt2", "lstm", "gru", "rnn_relu"],
)
def test_norms_are_those_of_finite_differences(model: nn.Module) -> None:
    model = copy.deepcopy(model).double().eval()
    given, position = batch(2, 9), 7
    profile = time_profile(model, given, positions=[position], max_lag=position)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(given["input_ids"])
    gradient = finite_differences(lambda at: losses_at(model, at, given["input_ids"], position), embedded)
    np.testing.assert_allclose(profile.norms, by_lag(gradient.norm(dim=-1), position), rtol=1e-6)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_is_met_by_the_hidden_state_that_enters_it(layer: int) -> None:
    model = wide_gpt2().double().eval()
    given, position = batch(2, 8), 6
    profile = time_profile(model, given, positions=[position], max_lag=position, wrt=layer)
    block = model.transformer.h[layer]
    entered: list[Tensor] = []
    with torch.no_grad(), block.register_forward_pre_hook(lambda _, args: entered.append(args[0])):
        model(input_ids=given["input_ids"])

    def loss(at: Tensor) -> Tensor:
        with block.register_forward_pre_hook(lambda _, args: (at, *args[1:])):
            logits = model(input_ids=given["input_ids"]).logits
        return F.cross_entropy(logits[:, position], given["input_ids"][:, position + 1], reduction="none")

    gradient = finite_differences(loss, entered[0])
    np.testing.assert_allclose(profile.norms, by_lag(gradient.norm(dim=-1), position), rtol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "qwen3"])
def test_each_row_and_position_is_the_same_alone(name: str) -> None:
    model = make(name).double()
    given = batch(4)
    together = time_profile(model, given, positions=[8, 12], max_lag=12)
    assert together.norms.shape == (8, 13)
    for index, position in enumerate([8, 12]):
        for row in range(4):
            alone = time_profile(
                model, {key: value[row : row + 1] for key, value in given.items()}, positions=[position], max_lag=12
            )
            np.testing.assert_allclose(together.norms[4 * index + row, : position + 1], alone.norms[0], rtol=1e-9)


def test_what_float32_would_lose_on_the_way_is_kept() -> None:
    model = recurrent(nn.RNN)
    with torch.no_grad():
        model.mixer.weight_hh_l0.mul_(0.1)  # a step takes 97 %: beyond 25 there is no float32
    given = batch(1, 40)
    lost = time_profile(model, given, positions=[38], max_lag=38)
    exact = time_profile(copy.deepcopy(model).double(), given, positions=[38], max_lag=38)
    assert exact.norms[0, -1] < 1e-45
    np.testing.assert_allclose(lost.norms, exact.norms, rtol=1e-4)


def test_a_gradient_that_grows_beyond_float32_is_infinite_from_there_on() -> None:
    model = recurrent(nn.RNN, nonlinearity="relu")
    with torch.no_grad():
        model.mixer.weight_hh_l0.copy_(30 * torch.eye(6))
        model.embedding.weight.abs_().mul_(1e-35)
        model.mixer.weight_ih_l0.abs_()
        model.mixer.bias_ih_l0.zero_()
        model.mixer.bias_hh_l0.zero_()
    given = batch(1, 40)
    profile = time_profile(model, given, positions=[20], max_lag=20)
    exact = time_profile(copy.deepcopy(model).double(), given, positions=[20], max_lag=20)
    assert np.isfinite(exact.norms).all()
    assert exact.norms[0, -1] > 1e25  # more than the head start of 2**64 leaves room for
    np.testing.assert_allclose(profile.norms, exact.norms, rtol=1e-4)
    with torch.no_grad():
        model.mixer.weight_hh_l0.mul_(1e5)
    profile = time_profile(model, given, positions=[7], max_lag=12)
    assert np.isfinite(profile.norms[0, 0])
    assert np.isinf(profile.norms[0, -1])
    assert np.isinf(profile.mean[-1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_a_model_in_16_bits_is_measured_to_what_they_hold(dtype: torch.dtype, tolerance: float) -> None:
    model, given = make("gpt2"), batch()
    exact = time_profile(model, given)
    found = time_profile(make("gpt2").to(dtype), given)
    assert found.norms.dtype == np.float64
    np.testing.assert_allclose(found.mean, exact.mean, rtol=tolerance)


# The right tokens


def test_the_loss_at_t_is_that_of_the_next_token_and_of_no_later_one() -> None:
    model, given = wide_gpt2(), batch(1)
    before = time_profile(model, given, positions=[6], max_lag=6)
    other = given["input_ids"].clone()
    other[0, 8:] = 3
    same = time_profile(model, {"input_ids": other, "labels": other}, positions=[6], max_lag=6)
    np.testing.assert_allclose(same.norms, before.norms, rtol=1e-5)
    other = given["input_ids"].clone()
    other[0, 7] = 3
    changed = time_profile(model, {"input_ids": other, "labels": other}, positions=[6], max_lag=6)
    assert not np.allclose(changed.norms, before.norms, rtol=1e-2)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_not_counted(name: str, side: str) -> None:
    model, short = make(name), batch(1, 9)
    alone = time_profile(model, short, positions=[7], max_lag=7)
    pad = torch.zeros(1, 5, dtype=torch.long)
    parts = {
        "input_ids": (short["input_ids"], pad),
        "labels": (short["labels"], pad - 100),
        "attention_mask": (pad[:, :1].expand(1, 9) + 1, pad),
        "position_ids": (torch.arange(9)[None], pad),
    }
    padded = {key: torch.cat(pair if side == "right" else pair[::-1], dim=1) for key, pair in parts.items()}
    full = {key: torch.cat([padded[key], value]) for key, value in batch(1, 14).items()}
    full["attention_mask"] = torch.cat([padded["attention_mask"], torch.ones(1, 14, dtype=torch.long)])
    full["position_ids"] = torch.cat([padded["position_ids"], torch.arange(14)[None]])
    found = time_profile(model, full, positions=[7], max_lag=13)
    assert len(found.norms) == 2
    np.testing.assert_allclose(found.norms[0], alone.norms[0], rtol=1e-4)


def test_tokens_without_a_label_have_no_loss() -> None:
    given = batch(2)
    labels = given["labels"].clone()
    labels[:, 5:] = -100
    labels[1, :] = -100
    profile = time_profile(make("gpt2"), {**given, "labels": labels}, positions=20)
    assert profile.samples.tolist() == [2, 2, 2]  # of tokens 2 and 3: the last label is that of token 4
    assert time_profile(make("gpt2"), {**given, "labels": labels}, positions=[1, 2, 3, 4]).samples[0] == 3


def test_positions_lie_evenly_where_every_lag_is_there() -> None:
    given = batch(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 12:] = 0
    profile = time_profile(make("gpt2"), {**given, "attention_mask": mask}, positions=4, max_lag=19)
    # 19, 22, 25, 28 in the long row, and the last one, 10, in the short.
    assert profile.samples.tolist() == [5] * 11 + [4] * 9
    assert profile.lags.tolist() == list(range(20))
    default = time_profile(make("gpt2"), given)
    assert len(default.mean) == 1 + 3 * 28 // 4
    assert set(default.samples) == {2 * 8}
    assert set(time_profile(make("gpt2"), given, positions=1, max_lag=28).samples) == {2}


def classifier_batch(side: str, pad: int = 0) -> dict[str, Tensor]:
    """Two rows, of 12 tokens and of 7."""
    ids = torch.tensor(text_blocks(2, 12))
    mask = torch.ones_like(ids)
    padding = slice(7, None) if side == "right" else slice(None, 5)
    if side == "left":
        ids[1, 5:] = ids[1, :7].clone()
    ids[1, padding], mask[1, padding] = pad, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([1, 0])}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("has_mask", [True, False])
def test_a_classifiers_lags_count_back_from_its_last_token(side: str, has_mask: bool) -> None:
    model = wide_gpt2("GPT2ForSequenceClassification", pad_token_id=0).double().eval()
    given = classifier_batch(side)
    if not has_mask:
        del given["attention_mask"]
    profile = time_profile(model, given, max_lag=11)
    assert profile.samples.tolist() == [2] * 7 + [1] * 5
    embedded = model.get_input_embeddings()(given["input_ids"]).detach().requires_grad_()
    hook = model.get_input_embeddings().register_forward_hook(lambda *_: embedded)
    logits = model(**{key: value for key, value in given.items() if key != "labels"}).logits
    hook.remove()
    F.cross_entropy(logits, given["labels"], reduction="sum").backward()
    norms = embedded.grad.norm(dim=-1)
    np.testing.assert_allclose(profile.norms[0], norms[0].flip(0), rtol=1e-9)
    short = norms[1, :7] if side == "right" else norms[1, 5:]
    np.testing.assert_allclose(profile.norms[1, :7], short.flip(0), rtol=1e-9)


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification", "regression"])
def test_a_classifiers_loss_is_the_models_own(kind: str) -> None:
    labels = {
        "single_label_classification": torch.tensor([1, 2]),
        "multi_label_classification": torch.tensor([[1.0, 0, 1], [0, 0, 1]]),
        "regression": torch.tensor([0.3, -2.0]),
    }[kind]
    model = wide_gpt2(
        "GPT2ForSequenceClassification", pad_token_id=0, num_labels=1 if kind == "regression" else 3
    ).double()
    given = {**classifier_batch("right"), "labels": labels}
    profile = time_profile(model, given, max_lag=11)
    embedded: list[Tensor] = []
    model.eval()
    with model.get_input_embeddings().register_forward_hook(lambda _, __, output: embedded.append(output)):
        loss = model(**given).loss * 2  # a mean over two rows
    (gradient,) = torch.autograd.grad(loss, embedded)
    np.testing.assert_allclose(profile.norms[0], gradient.norm(dim=-1)[0].flip(0), rtol=1e-6)


def test_a_recurrent_classifier_has_a_profile() -> None:
    model = recurrent(nn.LSTM, classes=2)
    given = {"input_ids": batch(5)["input_ids"], "labels": torch.tensor([0, 1, 1, 0, -100])}
    profile = time_profile(model, given, max_lag=TOKENS)
    assert profile.norms.shape == (4, TOKENS)


def test_a_causal_model_that_labels_tokens_is_not_shifted() -> None:
    model = wide_gpt2("GPT2ForTokenClassification", num_labels=4).double().eval()
    given = {"input_ids": batch(1)["input_ids"], "labels": batch(1)["input_ids"] % 4}
    profile = time_profile(model, given, positions=[13], max_lag=13)
    assert profile.norms.shape == (1, 14)
    embedded = model.get_input_embeddings()(given["input_ids"]).detach().requires_grad_()
    F.cross_entropy(model(inputs_embeds=embedded).logits[0, 13], given["labels"][0, 13]).backward()
    np.testing.assert_allclose(profile.norms[0], embedded.grad[0].norm(dim=-1).flip(0), rtol=1e-9)


def test_labels_that_are_already_shifted_are_taken_as_they_are() -> None:
    model, given = make("gpt2"), batch(2)
    shifted = torch.cat([given["labels"][:, 1:], torch.tensor([[7], [9]])], dim=1)
    found = time_profile(model, {"input_ids": given["input_ids"], "shift_labels": shifted}, positions=[5, 13])
    expected = time_profile(model, given, positions=[5], max_lag=9)
    np.testing.assert_array_equal(found.norms[:2, :6], expected.norms)
    assert found.norms.shape == (4, 10)  # the last token has a loss of its own


def test_embedded_inputs_do_as_well_as_ids() -> None:
    model, given = make("opt"), batch()
    embedded = model.get_input_embeddings()(given["input_ids"]).detach()
    found = time_profile(model, {"inputs_embeds": embedded, "labels": given["labels"]})
    np.testing.assert_array_equal(found.norms, time_profile(model, given).norms)
    assert not embedded.requires_grad


# The recurrent models of this library


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_models_are_exact_too_padded_on_either_side(cell: str) -> None:
    model = language_model(cell=cell, num_layers=2, residual=True, layer_norm=True, recurrent_dropout=0.5).double()
    rows = [tokens(1, 9)[0], tokens(1, 6, seed=2)[0]]
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        given = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        profile = time_profile(model.train(), given, positions=[4], max_lag=4)
        for row, own in enumerate(rows):
            embedded = model.get_input_embeddings()(own[None]).detach()
            gradient = finite_differences(lambda at: losses_at(model.eval(), at, own[None], 4), embedded)  # noqa: B023
            np.testing.assert_allclose(profile.norms[row], by_lag(gradient.norm(dim=-1), 4)[0], rtol=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_a_recurrent_layer_is_met_by_the_output_of_the_one_below(cell: str) -> None:
    model = language_model(cell=cell).double()
    ids, position = tokens(2, 8), 6
    given = {"input_ids": ids, "labels": ids}
    profile = time_profile(model, given, positions=[position], max_lag=position, wrt=1)
    layer, entered = model.model.layers[1], []
    with torch.no_grad(), layer.register_forward_pre_hook(lambda _, args: entered.append(args[0])):
        model(input_ids=ids)

    def loss(at: Tensor) -> Tensor:
        with layer.register_forward_pre_hook(lambda _, args: (at, *args[1:])):
            return F.cross_entropy(model(input_ids=ids).logits[:, position], ids[:, position + 1], reduction="none")

    gradient = finite_differences(loss, entered[0])
    np.testing.assert_allclose(profile.norms, by_lag(gradient.norm(dim=-1), position), rtol=1e-6)


def test_a_layer_that_is_given_padded_rows_in_another_place_is_refused() -> None:
    ids, mask = padded([tokens(1, 9)[0], tokens(1, 6, seed=2)[0]], "left")
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    with pytest.raises(ValueError, match="hidden states under their tokens where rows are padded"):
        time_profile(language_model(), given, wrt=1)


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_recurrent_classifier_reads_no_padding(side: str, pooling: str) -> None:
    model = classifier(pooling=pooling, num_labels=3).double()
    rows, labels = [tokens(1, 7)[0], tokens(1, 9, seed=2)[0]], torch.tensor([2, 0])
    ids, mask = padded(rows, side, extra=2)
    profile = time_profile(model, {"input_ids": ids, "attention_mask": mask, "labels": labels}, max_lag=8)
    assert profile.samples.tolist() == [2] * 7 + [1] * 2
    for row, own in enumerate(rows):
        alone = time_profile(model, {"input_ids": own[None], "labels": labels[row : row + 1]}, max_lag=8)
        np.testing.assert_allclose(profile.norms[row, : len(own)], alone.norms[0], rtol=1e-9)


def test_a_state_to_go_on_from_is_read_and_left_as_it_is() -> None:
    model = language_model().double()
    ids = tokens(2, 12)
    with torch.no_grad():
        state = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    before = [tensor.clone() for layer in state.states for tensor in layer]
    whole = time_profile(model, {"input_ids": ids, "labels": ids}, positions=[10], max_lag=5)
    rest = {"input_ids": ids[:, 5:], "labels": ids[:, 5:], "past_key_values": state}
    profile = time_profile(model, rest, positions=[5], max_lag=5)
    np.testing.assert_allclose(profile.norms, whole.norms, rtol=1e-12)
    assert all(map(torch.equal, before, [tensor for layer in state.states for tensor in layer]))


# No trace


def state_of(model: nn.Module) -> list[Any]:
    """All that a measurement might leave behind."""
    return [
        [(name, module.training, len(module._forward_hooks), len(module._forward_pre_hooks),
          len(module._backward_hooks)) for name, module in model.named_modules()],
        [(name, parameter.requires_grad, parameter.grad is None or parameter.grad.clone())
         for name, parameter in model.named_parameters()],
        torch.get_rng_state().tolist(),
        torch.backends.cudnn.enabled,
        torch.is_grad_enabled(),
    ]  # fmt: skip


def assert_same(one: list[Any], other: list[Any]) -> None:
    assert [one[0], *one[2:]] == [other[0], *other[2:]]
    for (name, *first), (_, *second) in zip(one[1], other[1], strict=True):
        assert first[0] == second[0], name
        assert torch.equal(torch.as_tensor(first[1]), torch.as_tensor(second[1])), name


class Disturbed(Recurrent):
    """Draws random numbers, counts its calls in a buffer, and fails when it is told to."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("calls", torch.zeros(()))
        self.fails = False
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, *args: Any, **options: Any) -> Any:
        self.calls += torch.rand(()).ceil()
        self.seen.append((self.training, torch.backends.cudnn.enabled))
        output = super().forward(*args, **options)
        if self.fails:
            raise RuntimeError("out of memory")
        return output


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(fails: bool, training: bool) -> None:
    torch.manual_seed(0)
    model = Disturbed(nn.LSTM, layers=2, dropout=0.5).train(training)
    model.mixer.train(not training)  # flags may differ from module to module
    given = batch()
    model(**given).logits.sum().backward()
    model.head.weight.grad = None
    model.embedding.weight.requires_grad_(False)
    model.fails = fails
    stored, before = weights(model), state_of(model)
    with torch.no_grad():
        unchanged = state_of(model)
        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                time_profile(model, given)
        else:
            time_profile(model, given)
        assert_same(unchanged, state_of(model))
    assert_same(before, state_of(model))
    assert_bit_equal(stored, weights(model))
    assert model.seen[-1] == (False, False)  # no dropout, and kernels that go backward without the training mode


def test_dropout_is_off() -> None:
    torch.manual_seed(0)
    model = Recurrent(nn.LSTM, layers=2, dropout=0.5).train()
    found = time_profile(model, batch())
    model.mixer.dropout = 0.0
    np.testing.assert_array_equal(found.norms, time_profile(model, batch()).norms)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_frozen_weights_change_nothing(name: str) -> None:
    model = make(name)
    free = time_profile(model, batch())
    model.requires_grad_(False)
    np.testing.assert_array_equal(time_profile(model, batch()).norms, free.norms)
    np.testing.assert_array_equal(
        time_profile(model, batch(), wrt=1).norms, time_profile(make(name), batch(), wrt=1).norms
    )
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_adapters_that_begin_as_nothing_change_nothing() -> None:
    from peft import LoraConfig, get_peft_model

    expected = time_profile(make("llama"), batch()).norms
    adapted = get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj", "v_proj"]))
    np.testing.assert_allclose(time_profile(adapted, batch()).norms, expected, rtol=1e-6)
    np.testing.assert_allclose(
        time_profile(adapted, batch(), wrt=2).norms, time_profile(make("llama"), batch(), wrt=2).norms, rtol=1e-6
    )


def test_a_cache_in_the_batch_is_not_written_to() -> None:
    model, given = make("gpt2").eval(), batch(1, 12)
    with torch.no_grad():
        cache = model(input_ids=given["input_ids"][:, :4]).past_key_values
    rest = {key: value[:, 4:] for key, value in given.items()}
    rest["attention_mask"] = torch.ones(1, 12, dtype=torch.long)
    whole = time_profile(model, given, positions=[10], max_lag=6)
    profile = time_profile(model, {**rest, "past_key_values": cache}, positions=[6], max_lag=6)
    assert cache.get_seq_length() == 4
    np.testing.assert_allclose(profile.norms[0], whole.norms[0], rtol=1e-4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_a_compiled_model_and_one_with_checkpoints_are_measured_as_they_are() -> None:
    expected = time_profile(make("gpt2"), batch()).norms
    compiled = torch.compile(make("gpt2"), backend="eager")
    np.testing.assert_array_equal(time_profile(compiled, batch()).norms, expected)
    checkpointed = make("gpt2").train()
    checkpointed.gradient_checkpointing_enable()
    np.testing.assert_array_equal(time_profile(checkpointed, batch()).norms, expected)


# What can't be measured is refused


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        ("gpt2", {"labels": None}, ["has no labels", "labels=input_ids"]),
        ("gpt2", {"input_ids": None}, ["neither input_ids", "inputs_embeds"]),
        ("gpt2", {"input_ids": torch.ones(2, 1, dtype=torch.long)}, ["1 token", "two"]),
        ("gpt2", {"labels": torch.full((3, TOKENS), -100)}, ["no row", "-100"]),
        ("gpt2", {"attention_mask": torch.eye(3, TOKENS, dtype=torch.long)}, ["no row", "shorter than two tokens"]),
        ("gpt2", {"labels": torch.ones(3, 5, dtype=torch.long)}, ["[3, 5]", "one a token"]),
        ("t5", {}, ["T5ForConditionalGeneration is an encoder with a decoder"]),
        ("bart", {}, ["BartForConditionalGeneration", "from left to right"]),
        ("bert", {}, ["BertForMaskedLM reads in both directions"]),
        ("modernbert", {}, ["ModernBertForMaskedLM reads in both directions"]),
    ],
)
def test_a_batch_or_model_without_a_profile_is_told_why(model: str, changes: dict[str, Any], words: list[str]) -> None:
    given = {key: value for key, value in {**batch(), **changes}.items() if value is not None}
    made = make(model)
    before = state_of(made)
    with pytest.raises(ValueError, match=r"[a-z]") as error:
        time_profile(made, given)
    for word in words:
        assert word in str(error.value)
    assert_same(before, state_of(made))


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_an_encoder_that_classifies_is_refused(head: str) -> None:
    config = tf.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    ids = batch()["input_ids"]
    labels = ids % 2 if "Token" in head else ids[:, 0] % 2
    with pytest.raises(ValueError, match=f"{head} reads in both directions"):
        time_profile(getattr(tf, head)(config), {"input_ids": ids, "labels": labels}, positions=1)


@pytest.mark.parametrize("classes", [2, VOCABULARY])
def test_a_bidirectional_recurrent_model_is_refused(classes: int) -> None:
    given = batch() if classes > 2 else {**batch(), "labels": torch.tensor([0, 1, 1])}
    with pytest.raises(ValueError, match="Recurrent reads in both directions: what it makes of token"):
        time_profile(recurrent(nn.LSTM, bidirectional=True, classes=classes), given)


def test_a_model_without_an_input_embedding_is_refused() -> None:
    class Bare(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return F.one_hot(input_ids, VOCABULARY).float()

    with pytest.raises(ValueError, match=r"Bare has no input embedding that get_input_embeddings\(\) gives"):
        time_profile(Bare(), batch())


def test_a_model_that_gives_no_logits_is_refused() -> None:
    with pytest.raises(ValueError, match="GPT2Model gives no logits"):
        time_profile(make("gpt2").transformer, batch())


def test_an_embedding_that_is_used_twice_is_refused() -> None:
    class Twice(Recurrent):
        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            return super().forward(inputs_embeds=self.embedding(input_ids) + self.embedding(input_ids.flip(1)))

    model = Twice(nn.GRU)
    with pytest.raises(ValueError, match="called more than once"):
        time_profile(model, batch())
    assert not model.embedding._forward_hooks


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"positions": 0}, "positions=0"),
        ({"positions": []}, r"positions=\[\]"),
        ({"positions": [-1]}, r"positions=\[-1\]"),
        ({"positions": [40]}, r"positions=\[40\]; the last is at 12"),
        ({"max_lag": 0}, "max_lag=0"),
        ({"wrt": "state"}, "wrt='state' must be 'embedding' or the number of a layer"),
        ({"wrt": -1}, "wrt=-1"),
        ({"wrt": 3}, "layer 3 of GPT2LMHeadModel can't be entered: it has 3; use wrt='embedding'"),
    ],
)
def test_an_impossible_argument_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        time_profile(make("gpt2"), batch(), **options)


def test_a_level_inside_a_recurrent_module_is_refused() -> None:
    model = recurrent(nn.LSTM, layers=2)
    np.testing.assert_array_equal(time_profile(model, batch(), wrt=0).norms, time_profile(model, batch()).norms)
    with pytest.raises(ValueError, match="layer 1 of Recurrent can't be entered: its recurrent module has it inside"):
        time_profile(model, batch(), wrt=1)


# What is made of the norms


def test_a_profile_sums_up_its_samples() -> None:
    random = np.random.default_rng(0)
    norms = random.lognormal(0, 2, (101, 4))
    norms[:, 1] /= 7
    norms[::2, 3] = np.nan
    profile = TimeProfile.of(norms)
    for lag in range(4):
        there = norms[~np.isnan(norms[:, lag]), lag]
        assert profile.mean[lag] == pytest.approx(math.prod(there) ** (1 / len(there)), rel=1e-12)
        assert profile.samples[lag] == len(there)
        ordered = sorted(there)
        found = [ordered[math.ceil(share * len(there)) - 1] for share in (0.1, 0.5, 0.9)]
        assert profile.quantiles[lag].tolist() == found
    assert profile.zero_share.tolist() == [0] * 4


def test_the_scale_of_a_loss_does_not_matter_to_the_fall() -> None:
    norms = np.random.default_rng(0).lognormal(0, 1, (20, 5))
    scaled = norms * np.random.default_rng(1).lognormal(0, 3, (20, 1))
    np.testing.assert_allclose(TimeProfile.of(scaled).relative, TimeProfile.of(norms).relative, rtol=1e-12)


def test_zeros_are_counted_and_weigh_only_where_they_are_the_half() -> None:
    profile = TimeProfile.of(np.array([[4.0, 4.0, 4.0, 0.0], [1.0, 1.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]]))
    assert profile.zero_share.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert profile.mean.tolist() == pytest.approx([2, 2, 0, 0])
    assert profile.lag_of(1e-9) == 2


def test_half_life_and_e_folds_are_those_of_an_exponential() -> None:
    profile = TimeProfile.of(np.exp(-0.1 * np.arange(60))[None])
    assert profile.half_life == 7  # ln 2 / 0.1 = 6.9
    assert profile.lag_of(0.01) == 47
    assert profile.lag_of(1e-3) is None
    assert profile.e_folds == pytest.approx(0.1)
    growing = TimeProfile.of(np.exp(0.2 * np.arange(10))[None])
    assert growing.e_folds == pytest.approx(-0.2)
    assert growing.half_life is None
    assert math.isnan(TimeProfile.of(np.ones((1, 2))).e_folds)


@pytest.mark.parametrize(
    ("norms", "sentence"),
    [
        (
            np.exp(-0.1 * np.arange(60)),
            "The gradient is down to half 7 tokens back and to 1 % 47 tokens back; 59 tokens back it is 0.0027 "
            "times what it is at the token itself and 0.0030 times what it is 1 token back.",
        ),
        (
            [1.0, 0.4, 0.3],
            "The gradient is down to half 1 token back and does not fall to 1 % within 2 tokens; 2 tokens back it is "
            "0.30 times what it is at the token itself and 0.75 times what it is 1 token back.",
        ),
        (
            [1.0, 2.0, 3.0],
            "The gradient does not fall to half within 2 tokens; 2 tokens back it is 3.0 times what it is at the "
            "token itself and 1.5 times what it is 1 token back.",
        ),
        (
            [1.0, 0.6, 0.0],
            "The gradient is down to 1 % 2 tokens back; 2 tokens back it is zero to the precision it was measured in.",
        ),
        (
            [1.0, 0.5],
            "The gradient is down to half 1 token back and does not fall to 1 % within 1 token; 1 token back it is "
            "0.50 times what it is at the token itself.",
        ),
        ([0.0, 0.0], "The gradient at the token itself is zero or not finite, so nothing can be said of its fall."),
        ([np.inf, 1.0], "The gradient at the token itself is zero or not finite, so nothing can be said of its fall."),
    ],
)
def test_the_sentence_says_what_the_numbers_say(norms: Any, sentence: str) -> None:
    assert TimeProfile.of(np.array(norms)[None]).describe() == sentence
