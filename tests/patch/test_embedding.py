"""What a patch does to the stream on its way into the first layer."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_gradguard.patch import CONTAINER, read_architecture
from hf_gradguard.patch.embedding import UnitRMS
from hf_gradguard.patch.model import patch_model, unpatch_model
from tests.patch.models import ALL, CASES, GENERATIVE, LENGTH, VOCABULARY, WIDTH, check_generation, gradients, logits
from tests.patch.test_taps import close, close_gradients

NORMED = ["bart", "bert", "bert-cross", "distilbert", "electra", "modernbert", "roberta"]
"""Architectures whose embeddings are followed by a norm."""
BARE = sorted(set(ALL) - set(NORMED))
FEW = ["gpt2", "opt-post", "t5"]
"""With positions, with a projection, with two stacks."""
BOTH = ["embedding=norm", "embedding=unit_rms"]


def entering(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The stream as it enters the first layer of each stack, behind whatever a patch has put there."""
    seen: list[Tensor] = []
    handles = [
        stack.layers[0].module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        for stack in read_architecture(model).stacks
    ]
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


def many_tokens(name: str) -> dict[str, Tensor]:
    """Every token at many positions, so that what is measured hardly depends on chance."""
    generator = torch.Generator().manual_seed(3)
    inputs = {
        key: torch.randint(0, VOCABULARY, (64, 38), generator=generator)
        for key in CASES[name].inputs()
        if key.endswith("input_ids")
    }
    if CASES[name].takes_encoder_states:
        inputs["encoder_hidden_states"] = torch.randn(64, 5, WIDTH, generator=generator)
    return inputs


def rms(stream: Tensor) -> float:
    return stream.double().square().mean().sqrt().item()


# Unit RMS


def shifted(model: Any) -> Any:
    """Embeddings whose means are not zero, as those of trained models."""
    with torch.no_grad():
        for stack in read_architecture(model).stacks:
            for number, module in enumerate(dict.fromkeys(stack.embeddings)):
                module.weight.mul_(3.0 + number).add_(torch.linspace(-0.2, 0.5, module.weight.shape[1]))
    return model


@pytest.mark.parametrize("is_shifted", [False, True])
@pytest.mark.parametrize("name", BARE)
def test_unit_rms_makes_the_root_mean_square_of_the_stream_one(name: str, is_shifted: bool) -> None:
    model = CASES[name].make()
    if is_shifted:
        shifted(model)
    inputs = many_tokens(name)
    before = entering(model, inputs)
    assert name.startswith("t5") or all(abs(rms(stream) - 1) > 0.1 for stream in before)
    patch_model(model, "embedding=unit_rms")
    found = entering(model, inputs)
    assert len(found) == len(read_architecture(model).stacks)
    for stream, old in zip(found, before, strict=True):
        assert rms(stream) == pytest.approx(1, abs=0.05)
        torch.testing.assert_close(stream, old * (stream[0, 0, 0] / old[0, 0, 0]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("width", [4, 12, 40])
def test_unit_rms_counts_what_a_projection_makes_of_the_embeddings(width: int) -> None:
    model, inputs = shifted(CASES["opt-post"].make(word_embed_proj_dim=width)), many_tokens("opt-post")
    assert model.model.decoder.project_in.weight.shape == (WIDTH, width)
    patch_model(model, "embedding=unit_rms")
    (stream,) = entering(model, inputs)
    assert rms(stream) == pytest.approx(1, abs=0.05)


def test_unit_rms_counts_the_scale_of_a_lookup() -> None:
    """BART multiplies with √d, where its config says so; its norm is out here, so that something is to be done."""
    model = CASES["bart"].make(scale_embedding=True)
    anatomy = read_architecture(model)
    for stack in anatomy.stacks:
        assert stack.embeddings[0].embed_scale == WIDTH**0.5
        stack.embedding_norm.replace(nn.Identity())
    for stack, stream in zip(anatomy.stacks, entering(model, many_tokens("bart")), strict=True):
        gain = UnitRMS().make(dataclasses.replace(stack, embedding_norm=None))
        assert rms(gain(stream)) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_embeddings_that_no_factor_brings_to_one_are_refused_before_anything_is_drawn(value: float) -> None:
    model = CASES["gpt2"].make()
    with torch.no_grad():
        for module in (model.transformer.wte, model.transformer.wpe):
            module.weight.fill_(value)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"the embeddings of the decoder have the mean square .*initialise the model"):
        patch_model(model, "pre_ln_scaled")
    assert model.state_dict().keys() == before.keys()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[key], atol=0, rtol=0, equal_nan=True)


def test_unit_rms_measures_the_embeddings_that_an_initialisation_has_drawn() -> None:
    model = CASES["t5"].make()
    patch_model(model, "init=t_fixup;norm=none;embedding=unit_rms", generator=torch.Generator().manual_seed(1))
    assert all(rms(stream) == pytest.approx(1, abs=0.05) for stream in entering(model, many_tokens("t5")))


# Norm


@pytest.mark.parametrize("name", BARE)
def test_norm_is_a_layer_norm_of_the_stream(name: str) -> None:
    model, inputs = CASES[name].make(), CASES[name].inputs()
    before = entering(model, inputs)
    patch_model(model, "embedding=norm")
    generator = torch.Generator().manual_seed(2)
    norms = [module for key, module in model.named_modules() if key.endswith(f"{CONTAINER}.embedding.module")]
    assert len(norms) == len(before)
    with torch.no_grad():
        for parameter in (parameter for norm in norms for parameter in norm.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    for stream, old, norm in zip(entering(model, inputs), before, norms, strict=True):
        close(stream, F.layer_norm(old, (WIDTH,), norm.weight, norm.bias), atol=1e-5)
    found = gradients(model, inputs)
    assert all(found[key].any() for key in found if CONTAINER in key)
    assert sum(CONTAINER in key for key in found) == 2 * len(norms)


# Both


@pytest.mark.parametrize("patch", BOTH)
@pytest.mark.parametrize("name", NORMED)
def test_nothing_is_done_where_embeddings_have_a_norm(name: str, patch: str) -> None:
    model, inputs = CASES[name].make(), CASES[name].inputs()
    expected, keys = logits(model, inputs), list(model.state_dict())
    patch_model(model, patch)
    assert torch.equal(logits(model, inputs), expected)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("patch", BOTH)
@pytest.mark.parametrize("name", BARE)
def test_logits_come_from_the_untouched_weight(name: str, patch: str) -> None:
    """Tied or not, the output embeddings are what they were, and get the last layer's output alone."""
    model, inputs = CASES[name].make(tie_word_embeddings=True), CASES[name].inputs()
    head, lookup = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is lookup.weight
    weight = head.weight.detach().clone()
    patch_model(model, patch)
    assert model.get_output_embeddings() is head
    assert head.weight is lookup.weight
    assert torch.equal(head.weight, weight)
    got: list[Tensor] = []
    head.register_forward_pre_hook(lambda module, args: got.append(args[0]))
    close(logits(model, inputs), got[0] @ weight.T, atol=1e-5)


@pytest.mark.parametrize("patch", BOTH)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("name", FEW)
def test_gradient_checkpointing_gives_equal_gradients(name: str, use_reentrant: bool, patch: str) -> None:
    model = patch_model(CASES[name].make().train(), patch)
    expected = gradients(model, CASES[name].inputs())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    close_gradients(gradients(model, CASES[name].inputs()), expected, tolerance=1e-6)


@pytest.mark.parametrize("patch", BOTH)
@pytest.mark.parametrize("name", sorted(set(GENERATIVE) - set(NORMED)))
def test_generation_with_cache_equals_generation_without(name: str, patch: str) -> None:
    check_generation(patch_model(CASES[name].make(), patch), CASES[name])


@pytest.mark.parametrize("patch", BOTH)
@pytest.mark.parametrize("name", FEW)
def test_copies_compute_the_same_and_unpatching_gives_the_model_back(name: str, patch: str) -> None:
    model, inputs = CASES[name].make(), CASES[name].inputs()
    text, expected = repr(model), logits(model, inputs)
    patch_model(model, patch)
    found = logits(model, inputs)
    assert not torch.allclose(found, expected, atol=1e-3)
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert torch.equal(logits(one, inputs), found)
        unpatch_model(one)
        assert torch.equal(logits(one, inputs), expected)
        assert repr(one) == text


@pytest.mark.parametrize(
    ("name", "patch"),
    [("gpt2", "embedding=unit_rms"), *(pytest.param("t5", p, marks=pytest.mark.slow) for p in BOTH)],
)
def test_a_model_with_patched_embeddings_compiles_to_one_graph(name: str, patch: str) -> None:
    model, inputs = patch_model(CASES[name].make(), patch), CASES[name].inputs()
    expected = logits(model, inputs)
    torch.compiler.reset()
    close(logits(torch.compile(model, backend="eager", fullgraph=True), inputs), expected)


@pytest.mark.parametrize("patch", BOTH)
@pytest.mark.parametrize("name", FEW)
def test_bfloat16_stays_bfloat16(name: str, patch: str) -> None:
    inputs = CASES[name].inputs(dtype=torch.bfloat16)
    model = patch_model(CASES[name].make().bfloat16(), patch)
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert logits(model, inputs).dtype == torch.bfloat16
    assert {stream.dtype for stream in entering(model, inputs)} == {torch.bfloat16}


@pytest.mark.parametrize("patch", BOTH)
def test_embeddings_given_instead_of_tokens_are_treated_alike(patch: str) -> None:
    model, inputs = patch_model(CASES["llama"].make(), patch), CASES["llama"].inputs()
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    close(model(inputs_embeds=embedded).logits, logits(model, inputs))
    assert embedded.shape == (2, LENGTH, WIDTH)
