"""A patched model that is saved and loaded computes the same, to the bit, whoever loads it."""

from __future__ import annotations

import importlib
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers import auto as quantizers

import hf_gradguard
from hf_gradguard import GradGuard, GradGuardCallback, PatchConfig, load_patched, patch_model, unpatch_model
from hf_gradguard.integrations import loading as registration
from hf_gradguard.integrations import patch_check
from hf_gradguard.patch import CONTAINER
from hf_gradguard.patch.applied import ATTRIBUTE, applied_to
from tests.models import language_data, make
from tests.patch.models import ALL, CASES, logits
from tests.training import arguments, assert_bit_equal, trainer, weights

PATCHES = [
    "rezero",
    "deepnorm",
    "pre_ln_scaled",
    "layerscale",
    "gtrxl",
    "sandwich",
    "t_fixup",
    "completep",
    "activation=leaky_relu",
    "activation=prelu",
    "residual=lstm_gate",
    "residual=highway_gate;norm=post;embedding=norm",
    "init=xavier",
]
WITH_ALL = "sandwich;residual=layerscale:init=0.5;activation=prelu;embedding=unit_rms"
"""This has new parameters, a buffer, new norms, a learned activation, and norms that act elsewhere."""
NOT_PARALLEL = {"deepnorm", "gtrxl", "residual=lstm_gate", "residual=highway_gate;norm=post;embedding=norm"}
EVERYTHING = [(n, p) for n in ALL for p in PATCHES if not (n == "gpt_neox-parallel" and p in NOT_PARALLEL)]
QUICK = {"bert", "t5-gated"}


def patched(name: str, patch: str, *, seed: int = 5) -> Any:
    """A patched model in which every weight has moved since, as training would move it."""
    model = CASES[name].make()
    torch.manual_seed(seed)
    patch_model(model, patch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def auto_class(model: nn.Module) -> Any:
    name = type(model).__name__
    kinds = {"MaskedLM": tf.AutoModelForMaskedLM, "ConditionalGeneration": tf.AutoModelForSeq2SeqLM}
    return next((kind for ending, kind in kinds.items() if name.endswith(ending)), tf.AutoModelForCausalLM)


def patch_of(model: nn.Module) -> str:
    found = applied_to(model)
    assert found is not None
    return str(found[1].config)


def assert_same(loaded: Any, model: Any, name: str) -> None:
    """The same outputs, tensors and config; and nothing more on the one than on the other."""
    inputs = CASES[name].inputs(dtype=model.dtype)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert_bit_equal(weights(loaded), weights(model))
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}
    trained = [[n for n, p in each.named_parameters() if p.requires_grad] for each in (loaded, model)]
    assert trained[0] == trained[1]
    assert [str(module) for module in loaded.modules()] == [str(module) for module in model.modules()]
    assert not {"hf_quantizer", "quantization_method", "is_quantized"} & vars(loaded).keys()
    for one, other in zip(stacks_configs(loaded), stacks_configs(model), strict=True):
        assert one == other
    assert patch_of(loaded) == patch_of(model)
    assert not loaded.training


def stacks_configs(model: nn.Module) -> list[dict[str, Any]]:
    ignored = ("_name_or_path", "architectures", "dtype", "transformers_version")
    found = [module.config.to_dict() for module in model.modules() if isinstance(module, tf.PreTrainedModel)]
    return [{key: value for key, value in config.items() if key not in ignored} for config in found]


def cases(wanted: Any) -> list[Any]:
    """The pairs of model and patch, the more of the same being slow."""
    return [pytest.param(n, p, marks=[] if n in QUICK or p == WITH_ALL else [pytest.mark.slow]) for n, p in wanted]


@pytest.mark.parametrize(("name", "patch"), cases([*EVERYTHING, *((n, WITH_ALL) for n in ALL)]))
def test_what_is_saved_is_loaded_by_everybody_and_saved_again(name: str, patch: str, tmp_path: Path) -> None:
    model = patched(name, patch)
    model.save_pretrained(tmp_path / "one")

    for load in (auto_class(model).from_pretrained, type(model).from_pretrained):
        assert_same(load(tmp_path / "one"), model, name)
    loaded = load_patched(auto_class(model), tmp_path / "one")
    assert_same(loaded, model, name)

    loaded.save_pretrained(tmp_path / "two")
    assert (tmp_path / "two/config.json").read_text() == (tmp_path / "one/config.json").read_text()
    assert_same(load_patched(auto_class(model), tmp_path / "two"), model, name)


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        *((name, "rezero;activation=prelu") for name in ALL),
        ("bert", "deepnorm"),
        ("gpt2", "gtrxl;activation=relu"),
        ("t5", "sandwich"),
        ("t5-gated", "activation=silu"),
        ("bart", "t_fixup"),
    ],
)
def test_a_loaded_model_is_unpatched_to_what_it_was(name: str, patch: str, tmp_path: Path) -> None:
    vanilla, model = CASES[name].make(), patched(name, patch)
    model.save_pretrained(tmp_path)
    loaded = load_patched(type(model), tmp_path)

    unpatch_model(loaded)
    unpatch_model(model)

    assert str(loaded) == str(vanilla)
    assert list(loaded.state_dict()) == list(vanilla.state_dict())
    assert stacks_configs(loaded) == stacks_configs(vanilla)
    assert torch.equal(logits(loaded, CASES[name].inputs()), logits(model, CASES[name].inputs()))
    loaded.save_pretrained(tmp_path / "plain")
    assert "gradguard" not in (tmp_path / "plain/config.json").read_text()


class Stubborn(tf.BertForMaskedLM):
    """Its activation is in no config."""

    def __init__(self, config: tf.BertConfig) -> None:
        super().__init__(config)
        for layer in self.bert.encoder.layer:
            layer.intermediate.intermediate_act_fn = nn.ReLU()


def test_an_activation_that_no_field_of_the_config_decides_about(tmp_path: Path) -> None:
    model = patch_model(Stubborn(CASES["bert"].config()).eval(), "activation=tanh")
    model.save_pretrained(tmp_path)

    loaded = load_patched(Stubborn, tmp_path)

    assert torch.equal(logits(loaded, CASES["bert"].inputs()), logits(model, CASES["bert"].inputs()))
    activations = [layer.intermediate.intermediate_act_fn for layer in loaded.bert.encoder.layer]
    assert all(isinstance(activation, nn.Tanh) for activation in activations)
    unpatch_model(loaded)
    activations = [layer.intermediate.intermediate_act_fn for layer in loaded.bert.encoder.layer]
    assert all(isinstance(activation, nn.ReLU) for activation in activations)


def test_an_old_activation_with_weights_is_there_again_after_unpatching(tmp_path: Path) -> None:
    config = CASES["bert"].config(hidden_act="prelu")
    model = patch_model(tf.BertForMaskedLM(config).eval(), "rezero;activation=relu")
    model.save_pretrained(tmp_path)

    loaded = unpatch_model(load_patched(tf.BertForMaskedLM, tmp_path))

    assert torch.equal(loaded.bert.encoder.layer[0].intermediate.intermediate_act_fn.weight, torch.tensor([0.25]))
    assert torch.equal(logits(loaded, CASES["bert"].inputs()), logits(unpatch_model(model), CASES["bert"].inputs()))


# Formats, dtypes and places


@pytest.mark.parametrize("name", ALL)
def test_in_bfloat16(name: str, tmp_path: Path) -> None:
    model = patched(name, "pre_ln_scaled;residual=layerscale")
    model.save_pretrained(tmp_path / "float32")

    loaded = load_patched(auto_class(model), tmp_path / "float32", dtype=torch.bfloat16)

    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor.to(torch.bfloat16)), key
    loaded.save_pretrained(tmp_path / "bfloat16")
    assert_same(auto_class(model).from_pretrained(tmp_path / "bfloat16"), loaded, name)


def test_what_stays_in_float32_in_a_model_in_float16(tmp_path: Path) -> None:
    CASES["t5"].make().save_pretrained(tmp_path / "vanilla")
    model = tf.T5ForConditionalGeneration.from_pretrained(tmp_path / "vanilla", dtype=torch.float16)
    patch_model(model, "residual=layerscale:init=0.1")
    model.save_pretrained(tmp_path / "patched")

    loaded = load_patched(tf.AutoModelForSeq2SeqLM, tmp_path / "patched", dtype=torch.float16)

    gains = {name: parameter.dtype for name, parameter in loaded.named_parameters() if CONTAINER in name}
    assert {torch.float16, torch.float32} == set(gains.values())
    assert_same(loaded, model, "t5")


def test_in_shards(tmp_path: Path) -> None:
    model = patched("llama", "gtrxl")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(load_patched(tf.AutoModelForCausalLM, tmp_path), model, "llama")


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"use_safetensors": True}])
def test_options_of_from_pretrained_go_through(options: dict[str, Any], tmp_path: Path) -> None:
    model = patched("gpt2", "rezero")
    model.save_pretrained(tmp_path)
    assert_same(load_patched(tf.AutoModelForCausalLM, tmp_path, **options), model, "gpt2")


def test_what_was_loaded_can_be_asked_for(tmp_path: Path) -> None:
    model = patched("gpt2", "rezero")
    model.save_pretrained(tmp_path)
    loaded, info = load_patched(tf.AutoModelForCausalLM, tmp_path, output_loading_info=True)
    assert_same(loaded, model, "gpt2")
    assert not any(info.values())


def test_out_of_a_state_dict() -> None:
    model = patched("gpt2", "sandwich")
    loaded = tf.GPT2LMHeadModel.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert_same(loaded, model, "gpt2")


def test_the_config_that_is_given_stays_as_it_is() -> None:
    model = patched("t5", "rezero;activation=silu")
    before = model.config.to_dict()
    type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert model.config.to_dict() == before


def test_weights_on_disk_are_refused(tmp_path: Path) -> None:
    patched("gpt2", "rezero").save_pretrained(tmp_path)
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.h": "disk", "transformer.ln_f": "cpu"}
    with pytest.raises(ValueError, match="device_map puts parts of a patched model on cpu and disk"):
        load_patched(tf.GPT2LMHeadModel, tmp_path, device_map={**places, "lm_head": "cpu"}, offload_folder=tmp_path)


def test_the_folder_is_complete(tmp_path: Path) -> None:
    model = patched("gpt2", "rezero")
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "gradguard"}
    assert config["gradguard"] == {"format": 1, "patch": PatchConfig.parse("rezero").to_dict(), "original": {}}
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys() - {"lm_head.weight"}


@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_embeddings_stay_tied(is_tied: bool, tmp_path: Path) -> None:
    model = patch_model(CASES["gpt2"].make(tie_word_embeddings=is_tied), "rezero")
    model.save_pretrained(tmp_path)
    loaded = load_patched(tf.AutoModelForCausalLM, tmp_path)
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == is_tied
    assert_same(loaded, model, "gpt2")


def test_settings_of_generation_stay(tmp_path: Path) -> None:
    model = patched("gpt2", "rezero")
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    loaded = load_patched(tf.AutoModelForCausalLM, tmp_path)
    assert loaded.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
    ids = CASES["gpt2"].inputs()
    assert torch.equal(loaded.generate(**ids, do_sample=False), model.generate(**ids, do_sample=False))


# Other heads


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "bart", "t5", "distilbert"])
def test_the_body_of_a_model_with_a_head_keeps_the_patch(name: str, tmp_path: Path) -> None:
    model = patched(name, "rezero;activation=relu")
    model.save_pretrained(tmp_path)
    body, inputs = load_patched(tf.AutoModel, tmp_path), CASES[name].inputs()
    assert patch_of(body) == patch_of(model)
    whole = model(**inputs, output_hidden_states=True)
    last = (whole.decoder_hidden_states if "decoder_hidden_states" in whole else whole.hidden_states)[-1]
    assert torch.equal(body(**inputs).last_hidden_state, last)


def test_a_head_on_a_patched_body_is_new(tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = patch_model(tf.BertModel(CASES["bert"].config(), add_pooling_layer=False).eval(), "gtrxl")
    body.save_pretrained(tmp_path)
    model = load_patched(tf.AutoModelForMaskedLM, tmp_path)
    inputs = CASES["bert"].inputs()
    assert torch.equal(model.bert(**inputs).last_hidden_state, body(**inputs).last_hidden_state)
    assert torch.isfinite(logits(model, inputs)).all()


def test_a_classifier_of_another_size_is_drawn_anew(tmp_path: Path) -> None:
    config = CASES["bert"].config(num_labels=3)
    model = patch_model(tf.BertForSequenceClassification(config).eval(), "rezero")
    model.save_pretrained(tmp_path)
    kind = tf.AutoModelForSequenceClassification
    loaded = load_patched(kind, tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert loaded.classifier.weight.shape == (5, 16)
    for name, tensor in loaded.state_dict().items():
        if "classifier" not in name:
            assert torch.equal(tensor, model.state_dict()[name]), name


# Checkpoints without values for the patch


def described(name: str, patch: str) -> Any:
    """The config of a patched model."""
    return patch_model(CASES[name].make(seed=9), patch).config


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        *((name, "residual=rezero;norm=none;embedding=unit_rms;activation=prelu") for name in ALL),
        ("bert", "sandwich"),
        ("t5", "residual=layerscale;norm=pre;embedding=norm"),
    ],
)
def test_a_vanilla_checkpoint_begins_as_patch_model_begins(name: str, patch: str, tmp_path: Path) -> None:
    CASES[name].make().save_pretrained(tmp_path)
    kind = type(CASES[name].make())
    loaded = kind.from_pretrained(tmp_path, config=described(name, patch))
    assert_same(loaded, patch_model(kind.from_pretrained(tmp_path), patch), name)


@pytest.mark.parametrize("patch", ["residual=gru_gate:bias=3.0", "residual=lstm_gate"])
def test_gates_on_a_vanilla_checkpoint_begin_as_gates_do(patch: str, tmp_path: Path) -> None:
    CASES["llama"].make().save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = load_patched(tf.AutoModelForCausalLM, tmp_path, config=described("llama", patch))
    fresh = patch_model(tf.LlamaForCausalLM.from_pretrained(tmp_path), patch)
    for key, tensor in fresh.state_dict().items():
        found = loaded.state_dict()[key]
        if CONTAINER in key and key.endswith("weight"):
            inputs = tensor.shape[1]
            bound = math.sqrt(6 / (inputs + 16))
            assert found.abs().max() <= bound
            assert found.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        else:
            assert torch.equal(found, tensor), key


def test_the_initialisation_is_not_drawn_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vanilla = CASES["gpt2"].make()
    vanilla.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="hf_gradguard"):
        loaded = tf.GPT2LMHeadModel.from_pretrained(tmp_path, config=described("gpt2", "rezero;init=xavier"))
    for key, tensor in vanilla.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    assert "no values in the checkpoint for 3 tensors" in caplog.text
    assert "init=xavier is not drawn" in caplog.text


def test_where_some_values_are_missing_the_others_are_kept(tmp_path: Path) -> None:
    model = patched("gpt2", "rezero:shared=false;embedding=unit_rms")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    gone = [key for key in state if "h.1.gradguard_norm.mlp" in key or key.endswith("embedding.module.gain")]
    assert len(gone) == 2
    save_file(
        {key: value for key, value in state.items() if key not in gone},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )

    loaded = load_patched(tf.AutoModelForCausalLM, tmp_path)

    unpatched = unpatch_model(tf.GPT2LMHeadModel.from_pretrained(tmp_path))
    fresh = patch_model(unpatched, "rezero:shared=false;embedding=unit_rms").state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], fresh[key] if key in gone else tensor), key
    assert not any(torch.equal(model.state_dict()[key], fresh[key]) for key in gone)


def test_nothing_is_drawn_where_all_values_are_there(tmp_path: Path) -> None:
    patched("llama", "gtrxl").save_pretrained(tmp_path)
    state = torch.get_rng_state()
    load_patched(tf.AutoModelForCausalLM, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


# What can't be loaded


def with_config(path: Path, **changes: Any) -> Path:
    """A saved patched model, with these fields in its config; None takes a field out."""
    patched("gpt2", "rezero").save_pretrained(path)
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return path


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (
            {"format": 2, "patch": {"residual": "rezero"}, "original": {}},
            "has the format 2, .* reads format 1. Install",
        ),
        ({"format": 1, "patch": {"frobnicate": "x"}, "original": {}}, "unknown part 'frobnicate' of a patch"),
        (
            {"format": 1, "patch": {"residual": "rezroe"}, "original": {}},
            "did you mean 'rezero'.*import what registers",
        ),
        ({"format": 1, "patch": {"residual": "rezero:x=1"}, "original": {}}, "unknown option 'x'"),
        ({"format": 1, "patch": {"activation": "wobble"}, "original": {}}, "unknown activation 'wobble'"),
        ({"format": 1, "patch": {}, "original": {}}, "can't be read"),
        ({"format": 1, "patch": "rezero", "original": {}}, "can't be read"),
        ({"format": 1}, "can't be read"),
        (["rezero"], "must say how the model is patched"),
        (None, "is None, but must say how the model is patched"),
    ],
)
def test_a_description_that_is_not_understood_is_refused(field: Any, message: str, tmp_path: Path) -> None:
    path = with_config(tmp_path, gradguard=field)
    with pytest.raises(ValueError, match=message) as caught:
        tf.AutoModelForCausalLM.from_pretrained(path)
    assert f"{path}: config.json's field 'gradguard'" in str(caught.value)


def test_a_checkpoint_without_a_patch_is_refused(tmp_path: Path) -> None:
    CASES["gpt2"].make().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds no patch: .* AutoModelForCausalLM.from_pretrained.* patch_model"
    ) as caught:
        load_patched(tf.AutoModelForCausalLM, tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_patched_checkpoint_whose_config_does_not_name_gradguard_is_refused(tmp_path: Path) -> None:
    path = with_config(tmp_path, quantization_config=None)
    with pytest.raises(ValueError, match=r"loaded without its patch .*quantization_config is None") as caught:
        load_patched(tf.AutoModelForCausalLM, path)
    assert "{'quant_method': 'gradguard'}" in str(caught.value)


def test_another_quantization_is_refused(tmp_path: Path) -> None:
    patched("gpt2", "rezero").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"can't be quantised while it is loaded.*fold_patches"):
        load_patched(tf.AutoModelForCausalLM, tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(ValueError, match="GradGuardPatch but you are passing a BitsAndBytesConfig"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    path = with_config(tmp_path, quantization_config={"quant_method": "gradguard", "bits": 4})
    with pytest.raises(ValueError, match=r"bits beside quant_method='gradguard'.*fold_patches"):
        tf.AutoModelForCausalLM.from_pretrained(path)


# Training


def test_a_training_that_is_resumed_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def model() -> Any:
        return patch_model(make("gpt2"), "rezero;activation=prelu")

    options = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer(model(), tmp_path / "whole", **options)
    whole.train()
    checkpoint = tmp_path / "whole/checkpoint-3"
    for number, begun in enumerate((model(), load_patched(tf.AutoModelForCausalLM, checkpoint))):
        resumed = trainer(begun, tmp_path / str(number), **options)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert_bit_equal(weights(resumed.model), weights(whole.model))


def test_training_goes_on_the_same_from_a_loaded_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = patch_model(make("bert"), "gtrxl;activation=prelu")
    model.save_pretrained(tmp_path / "start")
    loaded = load_patched(tf.AutoModelForMaskedLM, tmp_path / "start")
    for each, folder in ((model, "a"), (loaded, "b")):
        trainer(each, tmp_path / folder).train()
    assert_bit_equal(weights(loaded), weights(model))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = patch_model(make("gpt2"), "residual=layerscale:init=1.0;norm=pre;embedding=unit_rms")
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options = arguments(tmp_path, learning_rate=0.5, load_best_model_at_end=True, **every)
    data = language_data(64)
    run = tf.Trainer(model, options, train_dataset=data, eval_dataset=data[:8])
    run.train()
    best = load_patched(tf.AutoModelForCausalLM, run.state.best_model_checkpoint)
    assert not run.state.best_model_checkpoint.endswith("checkpoint-6")
    assert_bit_equal(weights(run.model), weights(best))


def test_an_adapter_on_a_patched_model(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

    model, inputs = patched("gpt2", "gtrxl"), CASES["gpt2"].inputs()
    model.save_pretrained(tmp_path / "base")
    base = load_patched(tf.AutoModelForCausalLM, tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    adapted = get_peft_model(base, lora).eval()
    expected = logits(adapted, inputs)
    assert not torch.allclose(expected, logits(model, inputs), atol=1e-3)
    adapted.save_pretrained(tmp_path / "adapter")

    again = load_patched(tf.AutoModelForCausalLM, tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path / "adapter").eval(), inputs), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval(), inputs), expected)
    merged = adapted.merge_and_unload()
    expected = logits(merged, inputs)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load_patched(tf.AutoModelForCausalLM, tmp_path / "merged"), inputs), expected)


@pytest.mark.parametrize("patch", ["rezero", "gtrxl", "sandwich", "residual=deepnorm;norm=post"])
def test_a_model_that_is_patched_by_its_config_alone_is_not_trained(patch: str, tmp_path: Path) -> None:
    config = patch_model(make("gpt2"), patch).config
    for plain in (tf.GPT2LMHeadModel(config), tf.AutoModelForCausalLM.from_config(config)):
        message = (
            r"config of this GPT2LMHeadModel says that it is patched \(residual.*|norm.*\).*load_patched.*patch_model"
        )
        with pytest.raises(ValueError, match=message):
            trainer(plain, tmp_path, GradGuardCallback()).train()
        with pytest.raises(ValueError, match=message):
            GradGuard(plain, output_dir=tmp_path)
        patch_model(plain, patch)
        GradGuard(plain, output_dir=tmp_path).close()


def test_what_is_patched_is_trained(tmp_path: Path) -> None:
    for model in (
        patch_model(make("gpt2"), "rezero"),
        patch_model(make("gpt2"), "rezero").transformer,  # for a head of one's own
        patch_model(make("t5"), "activation=relu"),
        tf.GPT2LMHeadModel(patch_model(make("gpt2"), "activation=relu;init=xavier").config),  # is all that it says
        nn.Sequential(patch_model(make("bert"), "norm=pre")),
    ):
        GradGuard(model, output_dir=tmp_path).close()


def test_a_patch_on_a_part_of_a_model_is_said_not_to_be_saved(tmp_path: Path) -> None:
    encoder: Any = make("bert")
    decoder = tf.BertConfig(**{**encoder.config.to_dict(), "is_decoder": True, "add_cross_attention": True})
    model = tf.EncoderDecoderModel(encoder=encoder.bert, decoder=tf.BertLMHeadModel(decoder))
    for special in ("decoder_start_token_id", "pad_token_id"):
        setattr(model.config, special, 0)
    patch_model(model.encoder, "norm=pre")

    def warnings() -> list[str]:
        run = trainer(model, tmp_path, callback := GradGuardCallback(), max_steps=1)
        run.train()
        return [event.message for event in callback.guard.events if event.kind == "warning"]

    (message,) = warnings()
    assert "only a part of this EncoderDecoderModel is patched, a BertModel with 'norm=pre'" in message
    unpatch_model(model.encoder)
    assert warnings() == []
    for whole in (patch_model(make("t5"), "norm=post"), nn.Sequential(patch_model(make("bert"), "norm=pre"))):
        assert patch_check.unsaved(whole) is None


# What the Trainer would resume from


def test_a_checkpoint_of_another_patch_is_not_resumed_from(tmp_path: Path) -> None:
    def resumed(patch: str | None) -> Any:
        model = make("gpt2") if patch is None else patch_model(make("gpt2"), patch)
        options = {"save_strategy": "steps", "save_steps": 3}
        return model, trainer(model, tmp_path, GradGuardCallback(), **options)

    scaled = "residual=branch_scale;init=normal;activation=relu"  # has no weights that could be missed
    resumed(scaled)[1].train()
    message = (
        r"checkpoint-6 is of a model patched with '(.*;residual=branch_scale)', but this GPT2LMHeadModel is {}, .*"
    )
    for patch, called in (
        (None, "not patched"),
        ("activation=relu", "patched with 'activation=relu'"),
        ("residual=branch_scale:exponent=1;init=normal;activation=relu", "patched with 'residual=branch_scale:exp.*'"),
        ("residual=branch_scale;init=normal", "patched with 'residual=branch_scale;init=normal'"),
    ):
        model, run = resumed(patch)
        before = weights(model)
        with pytest.raises(ValueError, match=message.format(called) + r"patch_model\(model, '\1'\)"):
            run.train(resume_from_checkpoint=True)
        assert_bit_equal(weights(model), before)
    for patch in (scaled, "activation=relu;residual=branch_scale:base_depth=1"):
        resumed(patch)[1].train(resume_from_checkpoint=True)


def test_a_checkpoint_without_a_patch_is_not_resumed_from_with_one(tmp_path: Path) -> None:
    trainer(make("gpt2"), tmp_path, save_strategy="steps", save_steps=3).train()
    run = trainer(patch_model(make("gpt2"), "residual=branch_scale;init=normal"), tmp_path, GradGuardCallback())
    with pytest.raises(ValueError, match=r"is of a model not patched, .* leave patch_model out"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


# Transformers


def test_the_loader_is_asked_before_the_weights_come_and_after(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[str, bool, bool]] = []

    class Watched(registration.PatchLoader):
        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            seen.append(("before", all(p.is_meta for p in model.parameters()), hasattr(model, ATTRIBUTE)))
            super()._process_model_before_weight_loading(model, **kwargs)

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
            seen.append(("after", any(p.is_meta for p in model.parameters()), hasattr(model, ATTRIBUTE)))
            # what `dequantize` promises
            assert not hasattr(model, "hf_quantizer")
            assert not hasattr(model, "quantization_method")
            assert not hasattr(model.config, "quantization_config")
            super()._process_model_after_weight_loading(model, **kwargs)

    monkeypatch.setitem(quantizers.AUTO_QUANTIZER_MAPPING, "gradguard", Watched)
    patched("gpt2", "rezero").save_pretrained(tmp_path)
    tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert seen == [("before", True, False), ("after", False, True)]


def test_transformers_marks_what_it_has_loaded(tmp_path: Path) -> None:
    vanilla = CASES["gpt2"].make()
    state = vanilla.state_dict()
    del state["transformer.h.0.ln_1.weight"]
    save_file(
        {k: v.clone() for k, v in state.items() if k != "lm_head.weight"},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    vanilla.config.save_pretrained(tmp_path)
    loaded = tf.GPT2LMHeadModel.from_pretrained(tmp_path)
    marked = {name for name, p in loaded.named_parameters() if getattr(p, "_is_hf_initialized", False)}
    assert {name for name, _ in loaded.named_parameters()} - marked == {"transformer.h.0.ln_1.weight"}


def test_a_loaded_model_is_an_ordinary_one(tmp_path: Path) -> None:
    patched("gpt2", "rezero").save_pretrained(tmp_path)
    loaded = load_patched(tf.AutoModelForCausalLM, tmp_path)
    assert loaded.config.quantization_config == {"quant_method": "gradguard"}
    assert not getattr(loaded, "is_quantized", False)
    assert loaded.half().dtype == torch.float16
    assert loaded.to(torch.float32).to("cpu").dtype == torch.float32


def test_registering_again_does_no_harm(tmp_path: Path) -> None:
    patched("gpt2", "rezero").save_pretrained(tmp_path)
    registration.register()
    importlib.reload(registration).register()
    importlib.reload(hf_gradguard)
    assert quantizers.AUTO_QUANTIZER_MAPPING["gradguard"].__name__ == "PatchLoader"
    load_patched(tf.AutoModelForCausalLM, tmp_path)


LOAD = "model = transformers.AutoModelForCausalLM.from_pretrained({path!r})"
ORDERS = {
    "before": "import hf_gradguard, transformers",
    "after": "import transformers; transformers.AutoModelForCausalLM; import hf_gradguard",
    "after the quantizers": "import transformers.modeling_utils, hf_gradguard",
    "between": "import transformers, hf_gradguard; from transformers import AutoModelForCausalLM",
}


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)


@pytest.mark.parametrize(
    "order", [pytest.param(o, marks=[] if o == "before" else [pytest.mark.slow]) for o in (*ORDERS, "not at all")]
)
def test_whichever_is_imported_first(order: str, tmp_path: Path) -> None:
    model = patched("gpt2", "rezero")
    model.save_pretrained(tmp_path)
    expected = logits(model, CASES["gpt2"].inputs())
    ids = CASES["gpt2"].inputs()["input_ids"].tolist()
    torch.save(expected, tmp_path / "expected")
    code = [
        ORDERS.get(order, "import transformers"),
        "import torch; torch.set_num_threads(1)",
        LOAD.format(path=str(tmp_path)),
        f"out = model(input_ids=torch.tensor({ids})).logits",
        f"print(torch.equal(out, torch.load({str(tmp_path / 'expected')!r})))",
    ]
    result = run("\n".join(code))
    assert result.stdout.strip() == str(order in ORDERS)
    if order not in ORDERS:  # as the documentation says
        assert "Unknown quantization type, got gradguard" in result.stdout + result.stderr


def test_importing_imports_neither_torch_nor_transformers() -> None:
    run("import sys, hf_gradguard; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'imported'")


@pytest.mark.slow
def test_importing_transformers_imports_no_patch() -> None:
    heavy = "[name for name in sys.modules if name.startswith('hf_gradguard.patch')]"
    run(f"import sys, hf_gradguard; from transformers import Trainer, AutoModel; assert not {heavy}, {heavy}")
