"""Norms act where a patch places them, and everything else goes on as before."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from hf_gradguard import GradGuardCallback
from hf_gradguard.patch import CONTAINER, read_architecture
from hf_gradguard.patch.model import patch_model, unpatch_model
from hf_gradguard.patch.norm import norms
from tests.patch.models import ALL, CASES, GENERATIVE, VOCABULARY, WIDTH, check_generation, gradients, logits
from tests.patch.placed import HAS_FINAL_NORM, PARALLEL, OutputOnly, pair
from tests.patch.runs import trained
from tests.patch.test_taps import close, close_gradients, hooks, with_adapters
from tests.training import weights

PLACEMENTS = ["pre", "post", "none", "none:final=false", "sandwich"]
WITH_RULES = [
    *((name, "post", "deepnorm") for name in ("gpt2", "gpt2-cross", "llama", "opt-pre", "t5", "modernbert")),
    *((name, "pre", "branch_scale") for name in ("bert", "bart", "opt-post")),
    *((name, "sandwich", "layerscale:init=0.5") for name in ("bert", "gpt2", "bart", "opt-post", PARALLEL)),
    *((name, "none", "rezero") for name in ("bert", "gpt2", "t5-gated", "modernbert")),
    *((name, "pre", "gru_gate") for name in ("bert", "bart", "opt-post", "distilbert")),
    *((name, "sandwich", "gru_gate") for name in ("llama", "opt-post")),
    *((name, "post", "highway_gate") for name in ("gpt2", "bert")),
    *((name, "none", "lstm_gate") for name in ("bert", "t5")),
]


def fits(name: str, placement: str) -> bool:
    return not (placement == "post" and name == PARALLEL)


EVERYWHERE = [(name, placement) for name in ALL for placement in PLACEMENTS if fits(name, placement)]
SOME = [
    *(("bert", placement) for placement in PLACEMENTS),
    *(("bart", placement) for placement in ("pre", "none", "sandwich")),
    *(("opt-post", placement) for placement in ("pre", "sandwich")),
    *(("gpt2", placement) for placement in ("post", "none:final=false")),
    *((name, "sandwich") for name in ("bert-cross", "gpt2-cross", PARALLEL)),
    *((name, "post") for name in ("llama", "modernbert", "opt-pre", "t5")),
    *((name, "pre") for name in ("distilbert", "electra", "gpt2", "llama")),
    ("t5-gated", "none"),
]
"""A few of each kind, for what does not depend on the architecture much."""


def patched(name: str, placement: str) -> Any:
    """A model with its norms elsewhere, in evaluation mode."""
    return patch_model(CASES[name].make(), f"norm={placement}")


def plain_state(model: Any) -> dict[str, Tensor]:
    """The weights that a model has without its patch."""
    return {key: value for key, value in model.state_dict().items() if CONTAINER not in key}


# Against layers written out


def check_written_out(name: str, placement: str, rule: str, is_training: bool) -> None:
    model, reference = pair(name, placement, rule, is_training=is_training)
    inputs = CASES[name].inputs()
    torch.manual_seed(5)
    found = logits(model, inputs)
    torch.manual_seed(5)
    torch.testing.assert_close(found, logits(reference, inputs), atol=1e-5, rtol=1e-5)
    close_gradients(gradients(model, inputs, seed=7), gradients(reference, inputs, seed=7))


WITH_DROPOUT = [True, pytest.param(False, marks=pytest.mark.slow)]


@pytest.mark.parametrize("is_training", WITH_DROPOUT)
@pytest.mark.parametrize(("name", "placement"), EVERYWHERE)
def test_outputs_and_gradients_are_those_of_layers_written_with_their_norms_there(
    name: str, placement: str, is_training: bool
) -> None:
    check_written_out(name, placement, "", is_training)


@pytest.mark.parametrize("is_training", WITH_DROPOUT)
@pytest.mark.parametrize(("name", "placement", "rule"), WITH_RULES)
def test_a_residual_rule_joins_what_the_placed_norms_give(
    name: str, placement: str, rule: str, is_training: bool
) -> None:
    check_written_out(name, placement, rule, is_training)


@pytest.mark.parametrize("rule", ["", "gru_gate"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "bart", "modernbert"])
def test_a_placement_of_ones_own_needs_no_more_than_its_three_facts(
    name: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "_policies", dict(norms._policies))
    norms.register("output_only")(OutputOnly)
    check_written_out(name, "output_only", rule, is_training=True)


ALREADY = {
    "pre": {name for name in ALL if name in HAS_FINAL_NORM},
    "post": {"bart", "bert", "bert-cross", "distilbert", "electra", "opt-post", "roberta"},
}
"""The models whose norms are there in the first place."""


@pytest.mark.parametrize(("name", "placement"), SOME)
def test_only_a_placement_that_a_model_has_already_leaves_it_as_it_is(name: str, placement: str) -> None:
    inputs = CASES[name].inputs()
    expected = logits(CASES[name].make(), inputs)
    found = logits(patched(name, placement), inputs)
    if name in ALREADY.get(placement, ()):
        assert torch.equal(found, expected)
    else:
        assert not torch.allclose(found, expected, atol=1e-2)


def test_a_norm_on_each_addition_is_refused_where_two_branches_share_one() -> None:
    with pytest.raises(
        ValueError, match=r"norm='post' needs a norm on each addition, but attention of decoder layer 0"
    ):
        patch_model(CASES[PARALLEL].make(), "norm=post")


# Against Transformers' own models that have their norms there


def loaded(model: Any, state: dict[str, Tensor]) -> Any:
    """A stock model with these weights, and with norms of weight one and bias zero where they have none."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    norms = [key for key in missing if "norm" in key.lower()]
    assert set(missing) - set(norms) <= {"lm_head.weight", "lm_head.decoder.weight", "lm_head.decoder.bias"}
    for key in norms:
        model.get_parameter(key).data.fill_(1.0 if key.endswith("weight") else 0.0)
    model.tie_weights()
    return model.eval()


def close_to_stock(model: Any, stock: Any, inputs: dict[str, Tensor]) -> None:
    for is_training in (False, True):
        torch.manual_seed(4)
        found = logits(model.train(is_training), inputs)
        torch.manual_seed(4)
        torch.testing.assert_close(found, logits(stock.train(is_training), inputs), atol=1e-5, rtol=1e-5)


def test_opt_with_post_norms_becomes_opt_with_pre_norms() -> None:
    model, config = patched("opt-post", "pre"), CASES["opt-post"].config(do_layer_norm_before=True)
    close_to_stock(model, loaded(tf.OPTForCausalLM(config), plain_state(model)), CASES["opt-post"].inputs())


def test_opt_with_pre_norms_becomes_opt_with_post_norms() -> None:
    model, config = patched("opt-pre", "post"), CASES["opt-pre"].config(do_layer_norm_before=False)
    state = {key: value for key, value in plain_state(model).items() if "decoder.final_layer_norm" not in key}
    close_to_stock(model, loaded(tf.OPTForCausalLM(config), state), CASES["opt-pre"].inputs())


def test_roberta_becomes_roberta_prelayernorm() -> None:
    model = patched("roberta", "pre")
    config = tf.RobertaPreLayerNormConfig(**CASES["roberta"].config().to_dict())
    moved = {".attention.output.LayerNorm": ".attention.LayerNorm", ".output.LayerNorm": ".intermediate.LayerNorm"}
    state = {}
    for key, value in plain_state(model).items():
        for old, new in moved.items():
            key = key.replace(old, new)
        state[key.replace("roberta.", "roberta_prelayernorm.")] = value
    close_to_stock(model, loaded(tf.RobertaPreLayerNormForMaskedLM(config), state), CASES["roberta"].inputs())


def test_bart_becomes_mbart() -> None:
    model = patched("bart", "pre")
    stock = tf.MBartForConditionalGeneration(tf.MBartConfig(**CASES["bart"].config().to_dict()))
    close_to_stock(model, loaded(stock, plain_state(model)), CASES["bart"].inputs())


def test_gpt2_becomes_the_first_gpt() -> None:
    model = patched("gpt2", "post")
    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 40}
    stock = tf.OpenAIGPTLMHeadModel(tf.OpenAIGPTConfig(vocab_size=VOCABULARY, **sizes))
    names = {"wte": "tokens_embed", "wpe": "positions_embed"}
    state = {}
    for key, value in plain_state(model).items():
        for old, new in names.items():
            key = key.replace(old, new)
        if "ln_f" not in key:
            state[key] = value
    close_to_stock(model, loaded(stock, state), CASES["gpt2"].inputs())


# Other heads


@pytest.mark.parametrize(
    ("name", "head", "placement"),
    [
        ("bert", "BertModel", "pre"),
        ("bert", "BertForSequenceClassification", "sandwich"),
        ("roberta", "RobertaForTokenClassification", "none"),
        ("gpt2", "GPT2ForSequenceClassification", "post"),
        ("llama", "LlamaForSequenceClassification", "none:final=false"),
        ("opt-post", "OPTForQuestionAnswering", "pre"),
        ("t5", "T5EncoderModel", "post"),
        ("bart", "BartForSequenceClassification", "sandwich"),
        ("bart", "BartModel", "pre"),
    ],
)
def test_norms_act_alike_under_every_head(name: str, head: str, placement: str) -> None:
    """Every layer's output is that of the patched language model with the same weights below its head."""
    model = patched(name, placement)
    other = getattr(tf, head)(CASES[name].config(num_labels=3, pad_token_id=0)).eval()
    known = plain_state(model.base_model)
    own = other.base_model.state_dict()
    other.base_model.load_state_dict({key: known[key] for key in own if key in known}, strict=False)
    patch_model(other, f"norm={placement}")
    streams = []
    for one in (model, other):
        seen: list[Tensor] = []
        for stack in read_architecture(one).stacks:
            stack.layers[-1].module.register_forward_hook(
                lambda module, args, output, seen=seen: seen.append(output[0] if isinstance(output, tuple) else output)
            )
        inputs = CASES[name].inputs()
        inputs["input_ids"][:, -1] = 2  # BART's classifier looks for the end
        one(**({"input_ids": inputs["input_ids"]} if "Encoder" in head and one is other else inputs))
        streams.append(seen)
    expected, found = streams
    assert len(found) >= 1
    for one_stream, other_stream in zip(expected, found, strict="Encoder" not in head):
        close(other_stream, one_stream)


# What gets a gradient


@pytest.mark.parametrize(("name", "placement"), SOME)
def test_new_norms_get_gradients_and_norms_that_are_off_get_none(name: str, placement: str) -> None:
    model = patched(name, placement)
    anatomy = read_architecture(model)
    own = {branch.norm.value for branch in anatomy.branches}
    finals = {stack.final_norm.value for stack in anatomy.stacks if stack.final_norm is not None}
    off = (own if placement.startswith("none") else set()) | (
        finals if placement in ("post", "none:final=false") else set()
    )
    expected = {id(parameter) for module in off for parameter in module.parameters()}
    found = gradients(model, CASES[name].inputs())
    for key, parameter in model.named_parameters():
        assert (key not in found) == (id(parameter) in expected), key
        assert parameter.requires_grad == (id(parameter) not in expected), key
    assert all(found[key].any() for key in found if CONTAINER in key)


@pytest.mark.parametrize(("name", "placement"), [("bert", "none"), ("gpt2", "none:final=false"), ("opt-pre", "post")])
def test_norms_that_are_off_raise_no_alarm_and_keep_their_values(name: str, placement: str, tmp_path: Path) -> None:
    model = patched(name, placement)
    before = weights(model)
    callback = GradGuardCallback()
    trained(model, CASES[name], tmp_path, callback, max_steps=6)
    off = [key for key, parameter in model.named_parameters() if not parameter.requires_grad]
    assert off
    assert all(torch.equal(model.get_parameter(key), before[key]) for key in off)
    assert [event.kind for event in callback.guard.events if event.kind != "clipped"] == []


def test_what_was_frozen_before_stays_frozen_and_what_was_not_is_so_again() -> None:
    model = CASES["gpt2"].make()
    model.transformer.h[0].ln_1.requires_grad_(False)
    before = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    patch_model(model, "norm=none:final=false")
    unpatch_model(model)
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == before


# Company: checkpointing, cache, copies, compilers, adapters, dtypes


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("name", "placement"), SOME)
def test_gradient_checkpointing_gives_equal_gradients(name: str, placement: str, use_reentrant: bool) -> None:
    model = patched(name, placement).train()
    expected = gradients(model, CASES[name].inputs())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    close_gradients(gradients(model, CASES[name].inputs()), expected, tolerance=1e-6)


@pytest.mark.parametrize(("name", "placement"), [(name, placement) for name, placement in SOME if name in GENERATIVE])
def test_generation_with_cache_equals_generation_without(name: str, placement: str) -> None:
    check_generation(patched(name, placement), CASES[name])


@pytest.mark.parametrize(("name", "placement"), SOME)
def test_a_copys_norms_are_its_own(name: str, placement: str) -> None:
    model, inputs = patched(name, placement), CASES[name].inputs()
    expected = logits(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, inputs), expected)
        with torch.no_grad():
            for key, parameter in twin.named_parameters():
                if "norm" in key.lower() or ".ln_" in key:
                    parameter.mul_(0.5)
        has_norms = placement != "none:final=false" or name == "bert"  # bert's embeddings have one
        assert torch.allclose(logits(twin, inputs), expected, atol=1e-3) != has_norms
        assert torch.equal(logits(model, inputs), expected)
        unpatch_model(twin)
        assert torch.equal(logits(model, inputs), expected)


COMPILED = [("gpt2", "post"), ("opt-post", "sandwich")]


def check_compiled(name: str, placement: str) -> None:
    model, inputs = patched(name, placement), CASES[name].inputs()
    expected, by_eager = logits(model, inputs), gradients(model, inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(logits(compiled, inputs), expected)
    found = gradients(compiled, inputs)
    close_gradients({key.removeprefix("_orig_mod."): value for key, value in found.items()}, by_eager)


@pytest.mark.parametrize(("name", "placement"), COMPILED)
def test_a_converted_model_compiles_to_one_graph(name: str, placement: str) -> None:
    check_compiled(name, placement)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "placement"), [pair for pair in EVERYWHERE if pair not in COMPILED])
def test_every_converted_model_compiles_to_one_graph(name: str, placement: str) -> None:
    check_compiled(name, placement)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(("name", "placement"), SOME)
def test_adapters_on_top_act_on_normalised_inputs(name: str, placement: str) -> None:
    """An adapted model computes what it computes when the adapters are merged into its weights."""
    inputs = CASES[name].inputs(dtype=torch.float64)
    unpatched = with_adapters(CASES[name].make().double()).merge_and_unload()
    model = patched(name, placement).double()
    adapted = with_adapters(model)
    expected = logits(adapted, inputs)
    assert not torch.allclose(expected, logits(patched(name, placement).double(), inputs), atol=1e-2)
    merged = adapted.merge_and_unload()
    close(logits(merged, inputs), expected, atol=1e-9)
    unpatch_model(merged)
    close(logits(merged, inputs), logits(unpatched, inputs), atol=1e-9)


@pytest.mark.parametrize(("name", "placement"), SOME)
def test_bfloat16_stays_bfloat16(name: str, placement: str) -> None:
    inputs = CASES[name].inputs(dtype=torch.bfloat16)
    model = patch_model(CASES[name].make().bfloat16(), f"norm={placement}")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    found, expected = logits(model, inputs), logits(patched(name, placement), CASES[name].inputs())
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(("name", "placement"), SOME)
def test_autocast_computes_nearly_the_same(name: str, placement: str) -> None:
    model, inputs = patched(name, placement), CASES[name].inputs()
    expected = logits(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, inputs)
        difference = (logits(model, inputs).float() - expected).norm() / expected.norm()
    assert 0 < difference < 0.05
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize("is_asked_before", [False, True])
@pytest.mark.parametrize(("name", "placement"), SOME)
def test_the_last_hidden_state_is_what_the_head_gets(name: str, placement: str, is_asked_before: bool) -> None:
    """Also where hidden states were asked for before the patch, whose hooks then come before the patch's."""
    model, inputs = CASES[name].make(), CASES[name].inputs()
    if is_asked_before:
        model(**inputs, output_hidden_states=True)
    patch_model(model, f"norm={placement}")
    seen = []
    last = getattr(model.base_model, "decoder", model.base_model)
    last.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    out = model(**inputs, output_hidden_states=True)
    states = out.decoder_hidden_states if "decoder_hidden_states" in out else out.hidden_states
    assert torch.equal(states[-1], seen[-1])
    assert len(states) == len(read_architecture(model).stacks[-1].layers) + 1


# What is left behind


@pytest.mark.parametrize(("name", "placement"), SOME)
def test_unpatching_leaves_the_model_as_it_was(name: str, placement: str) -> None:
    model, inputs = CASES[name].make(), CASES[name].inputs()
    text, keys, before, config = repr(model), list(model.state_dict()), hooks(model), model.config.to_dict()
    expected = logits(model, inputs)
    for twice in range(2):
        patch_model(model, f"norm={placement};residual=layerscale")
        assert [key for key in model.state_dict() if CONTAINER not in key] == keys
        logits(model, inputs)
        for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
            unpatch_model(one)
            assert torch.equal(logits(one, inputs), expected), twice
            assert (repr(one), list(one.state_dict()), hooks(one)) == (text, keys, before)
            assert one.config.to_dict() == config
