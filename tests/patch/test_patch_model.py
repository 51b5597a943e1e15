"""Patching a model, and taking the patch away: whole patches by text, on every architecture."""

from __future__ import annotations

import copy
import doctest
import json
import logging
import math
import random
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import Trainer

from hf_gradguard import GradGuardCallback
from hf_gradguard.patch import CONTAINER, read_architecture
from hf_gradguard.patch.config import PARTS, PatchConfig
from hf_gradguard.patch.embedding import UnitRMS
from hf_gradguard.patch.init import LSUV, Xavier
from hf_gradguard.patch.model import patch_model, unpatch_model
from hf_gradguard.patch.norm.no_norms import NoNorms
from hf_gradguard.patch.optimizer import param_groups
from hf_gradguard.patch.presets import PRESETS
from hf_gradguard.patch.residual import LayerScale
from tests.patch.models import ALL, CASES, gradients, logits
from tests.patch.runs import examples
from tests.patch.test_norm import ALREADY
from tests.patch.test_taps import close, hooks, with_adapters
from tests.training import arguments

PARALLEL = "gpt_neox-parallel"
UNFIT = {("deepnorm", PARALLEL), ("gtrxl", PARALLEL)}
"""Presets that a model can't have."""
PRESET_ON_MODEL = [(preset, name) for preset in PRESETS for name in ALL if (preset, name) not in UNFIT]


def is_new(key: str) -> bool:
    return CONTAINER in key


def everything(model: Any) -> dict[str, Any]:
    """All that can be seen of a model, weights aside."""
    return {
        "repr": repr(model),
        "class": type(model),
        "keys": list(model.state_dict()),
        "hooks": hooks(model),
        "configs": [m.config.to_dict() for m in model.modules() if isinstance(m, tf.PreTrainedModel)],
        "trained": {key: parameter.requires_grad for key, parameter in model.named_parameters()},
        "layers": [
            {key: value for key, value in vars(layer.module).items() if isinstance(value, float)}
            for layer in read_architecture(model).layers
        ],
        "attributes": set(vars(model)),
        "eps": [getattr(branch.norm.value, "eps", None) for branch in read_architecture(model).branches],
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def same_weights(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[key], value) for key, value in expected.items())


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_gradguard")]


# The text of a patch


SAMPLES: dict[str, list[str]] = {
    "residual": ["rezero", "layerscale:init=0.1", "skipinit:init=1", "gru_gate:bias=1,relu=false", "branch_scale"],
    "norm": ["pre", "post", "none", "none:final=false", "sandwich"],
    "init": ["xavier:gain=0.5", "orthogonal", "normal:std=0.01", "lsuv:tolerance=0.1", "gpt2"],
    "activation": ["relu", "leaky_relu", "gelu", "silu"],
    "embedding": ["norm", "unit_rms"],
}


def random_parts(seed: int) -> dict[str, str]:
    source = random.Random(seed)
    chosen = source.sample(sorted(SAMPLES), source.randint(1, len(SAMPLES)))
    return {part: source.choice(SAMPLES[part]) for part in chosen}


@pytest.mark.parametrize("seed", range(40))
def test_every_form_of_a_patch_gives_the_same_patch(seed: int) -> None:
    parts = random_parts(seed)
    config = PatchConfig(**parts)
    assert config.to_dict() == parts
    assert PatchConfig.parse(str(config)) == config
    assert PatchConfig.parse(config) is config
    assert PatchConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert PatchConfig(**{part: PARTS[part].parse(text) if part in PARTS else text for part, text in parts.items()})
    pieces = [f" {part} = {text} " for part, text in parts.items()]
    random.Random(seed).shuffle(pieces)
    assert PatchConfig.parse(" ; ".join(pieces)) == config
    unnamed = [f"{part}={text}" if text.partition(":")[0] in ("none", "norm") else text for part, text in parts.items()]
    if not {"layerscale", "rezero", "sandwich"} & {text.partition(":")[0] for text in unnamed}:
        assert PatchConfig.parse(";".join(unnamed)) == config


@pytest.mark.parametrize("part", [*PARTS])
def test_every_name_of_every_part_survives_its_text(part: str) -> None:
    for name in PARTS[part].names():
        if name != PARTS[part].absent:
            config = PatchConfig(**{part: name})
            of_object = PatchConfig(**{part: PARTS[part].parse(name)})
            assert PatchConfig.parse(str(of_object)) == of_object
            assert PARTS[part].parse(getattr(of_object, part)) == PARTS[part].parse(getattr(config, part))


def test_parts_may_be_given_as_objects() -> None:
    config = PatchConfig(
        residual=LayerScale(init=0.1), norm=NoNorms(final=False), init=Xavier(gain=0.5), embedding=UnitRMS()
    )
    assert config.residual_patch == LayerScale(init=0.1)
    assert config.norm_patch == NoNorms(final=False)
    assert config.initialisation == Xavier(gain=0.5)
    assert config.embedding_patch == UnitRMS()
    assert PatchConfig.parse(str(config)) == config


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("gtrxl", "residual=gru_gate:bias=none;norm=pre;embedding=unit_rms"),
        ("gtrxl:bias=3", "residual=gru_gate:bias=3;norm=pre;embedding=unit_rms"),
        ("gtrxl:relu=false", "residual=gru_gate:bias=none,relu=false;norm=pre;embedding=unit_rms"),
        ("gtrxl:bias=3,relu=false", "residual=gru_gate:bias=3,relu=false;norm=pre;embedding=unit_rms"),
        ("gtrxl;init=xavier", "residual=gru_gate:bias=none;norm=pre;init=xavier;embedding=unit_rms"),
        ("gtrxl:bias=1;norm=none:final=false", "residual=gru_gate:bias=1;norm=none:final=false;embedding=unit_rms"),
        ("gtrxl;highway_gate;embedding=none", "residual=highway_gate;norm=pre"),
        ("gtrxl;residual=rezero:init=1", "residual=rezero:init=1;norm=pre;embedding=unit_rms"),
        ("sandwich;embedding=none", "norm=sandwich"),
        ("t_fixup", "norm=none:final=false;init=t_fixup"),
        ("gru_gate", "residual=gru_gate"),
        ("skipinit:init=1;pre;leaky_relu", "residual=skipinit:init=1;norm=pre;activation=leaky_relu"),
        ("pre ; unit_rms", "norm=pre;embedding=unit_rms"),
        ("residual=layerscale", "residual=layerscale"),
        ("deepnorm", "residual=deepnorm;norm=post;init=deepnorm"),
        ("residual=deepnorm", "residual=deepnorm"),
        ("norm=sandwich", "norm=sandwich"),
    ],
)
def test_a_text_stands_for_these_parts(text: str, parts: str) -> None:
    assert PatchConfig.parse(text).to_dict() == dict(part.split("=", 1) for part in parts.split(";"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rezro", r"unknown patch 'rezro'; did you mean 'rezero'\?"),
        ("layerscal:init=1", r"unknown patch 'layerscal'; did you mean 'layerscale'\?"),
        ("orthogonl", r"unknown patch 'orthogonl'; did you mean 'orthogonal'\?"),
        ("leaky_rel", r"unknown patch 'leaky_rel'; did you mean 'leaky_relu'\?"),
        ("residul=rezero", r"unknown part 'residul'; did you mean 'residual'\?"),
        ("rezero,norm=pre", r"unknown part 'rezero,norm'.*separated by ';'"),
        ("residual=rezro", r"unknown residual rule 'rezro'; did you mean 'rezero'\?"),
        ("norm=pree", r"unknown norm placement 'pree'; did you mean 'pre'\?"),
        ("activation=gelo", r"unknown activation 'gelo'; did you mean 'gelu'\?"),
        ("embedding=unit_rm", r"unknown embedding patch 'unit_rm'; did you mean 'unit_rms'\?"),
        ("layerscale:int=1", r"unknown option 'int'; did you mean 'init'\?"),
        ("rezero:init=big", r"init='big' must be of type float"),
        ("norm=pre:final=false", r"unknown option 'final'. It takes no options"),
        ("deepnorm:alpha=2", r"residual='deepnorm:alpha=2': unknown option 'alpha'"),
        ("none", r"'none' can be residual=none or norm=none .*; say which"),
        ("norm=pre;rezero", r"the preset 'rezero' must come first.*or write residual=rezero for that part alone"),
        ("rezero;layerscale", r"the preset 'layerscale' must come first"),
        ("norm=pre;norm=post", r"norm is given twice, 'pre' and 'post'"),
        ("xavier;kaiming", r"init is given twice, 'xavier' and 'kaiming'"),
        ("residual=rezero norm=pre", r"write ';' between parts, and .* in 'residual=rezero norm=pre'"),
        ("rezero;norm=pre,init=xavier", r"write ';' between parts, and .* in 'norm=pre,init=xavier'"),
        ("", r"an empty patch changes nothing; give one of residual, norm, init"),
        (" ; ", r"an empty patch"),
        ("residual=none", r"an empty patch"),
    ],
)
def test_a_text_that_stands_for_nothing_is_refused_with_what_would(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchConfig.parse(text)
    model = CASES["bert"].make()
    before = everything(model)
    with pytest.raises(ValueError, match=message):
        patch_model(model, text)
    assert everything(model) == before


@pytest.mark.parametrize("name", ["config", "model", "norm", "embedding"])
def test_the_examples_in_docstrings_are_true(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in PARTS.values():  # what an example registers goes again
        monkeypatch.setattr(registry, "_policies", dict(registry._policies))
    result = doctest.testmod(import_module(f"hf_gradguard.patch.{name}"))
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("patch", [None, 3, {"norm": "pre"}, ["rezero"]])
def test_what_is_no_text_is_refused(patch: Any) -> None:
    with pytest.raises(TypeError, match=r"a patch is text or a PatchConfig, not a .*'rezero'"):
        patch_model(CASES["bert"].make(), patch)


def test_an_activation_is_a_name() -> None:
    for activation in (nn.ReLU(), nn.ReLU, 3):
        with pytest.raises(ValueError, match=r"unknown activation .*Known: gelu"):
            PatchConfig(activation=activation)  # type: ignore[arg-type]


def test_an_empty_configuration_is_refused() -> None:
    for parts in ({}, {"residual": "none"}, {"embedding": "none", "attention": "none"}):
        with pytest.raises(ValueError, match="an empty patch changes nothing"):
            PatchConfig(**parts)
    with pytest.raises(ValueError, match=r"unknown part 'layers' of a patch. Known: residual"):
        PatchConfig.from_dict({"layers": "3"})


# Presets


def check_trains(preset: str, name: str, output_dir: Path) -> None:
    case = CASES[name]
    model = case.make().train()
    kind = type(model)
    assert patch_model(model, preset, generator=torch.Generator().manual_seed(1)) is model
    assert type(model) is kind
    callback = GradGuardCallback()
    optimizer = AdamW(param_groups(model, lr=1e-2))
    args = arguments(output_dir, max_steps=3)
    trainer = Trainer(model, args, train_dataset=examples(case, 12), callbacks=[callback], optimizers=(optimizer, None))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert trainer.model is model
    assert [event.kind for event in callback.guard.events if event.kind != "clipped"] == []
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values() if tensor.is_floating_point())


FEW = {"bert", "gpt2", "t5"}


@pytest.mark.parametrize(("preset", "name"), [each for each in PRESET_ON_MODEL if each[1] in FEW])
def test_a_model_with_a_preset_trains(preset: str, name: str, tmp_path: Path) -> None:
    check_trains(preset, name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "name"), [each for each in PRESET_ON_MODEL if each[1] not in FEW])
def test_every_model_with_every_preset_trains(preset: str, name: str, tmp_path: Path) -> None:
    check_trains(preset, name, tmp_path)


@pytest.mark.parametrize(("preset", "name"), sorted(UNFIT))
def test_presets_that_do_not_fit_parallel_residual_are_refused(preset: str, name: str) -> None:
    model = CASES[name].make()
    before, old = everything(model), weights(model)
    with pytest.raises(ValueError, match="parallel residual"):
        patch_model(model, preset)
    assert everything(model) == before
    assert same_weights(model, old)


@pytest.mark.parametrize("name", ALL)
def test_a_preset_never_fights_with_itself(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for preset in PRESETS:
            if (preset, name) not in UNFIT:
                patch_model(CASES[name].make(), preset)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("name", ALL)
def test_trainer_decays_no_new_parameter(name: str) -> None:
    decayed = Trainer.get_decay_parameter_names(None, CASES[name].make())
    for preset in [*PRESETS, "norm=sandwich;residual=input_gate;embedding=norm;init=xavier"]:
        if (preset, name) not in UNFIT and not (name == PARALLEL and "input_gate" in preset):
            model = patch_model(CASES[name].make(), preset)
            assert Trainer.get_decay_parameter_names(None, model) == decayed, preset


# What keeps the function


@pytest.mark.parametrize("name", ALL)
def test_settings_of_the_identity_leave_the_outputs_as_they_are(name: str) -> None:
    inputs = CASES[name].inputs()
    expected = logits(CASES[name].make(), inputs)
    for rule in ("layerscale:init=1", "rezero:init=1", "skipinit:init=1", "branch_scale:scale=1"):
        placement = next((f";norm={where}" for where, names in ALREADY.items() if name in names), "")
        for patch in (f"residual={rule}", f"residual={rule}{placement}"):
            close(logits(patch_model(CASES[name].make(), patch), inputs), expected)


# Taking away


RESTORED = {*FEW, "bart", "llama", "opt-post"}


@pytest.mark.parametrize(("preset", "name"), [each for each in PRESET_ON_MODEL if each[1] in RESTORED])
def test_unpatching_restores_every_weight_and_output_bit_for_bit_after_training(preset: str, name: str) -> None:
    model, inputs = CASES[name].make(), CASES[name].inputs()
    before, old, expected = everything(model), weights(model), logits(model, inputs)
    patch_model(model, f"{preset};activation=relu", keep_original=True)
    step(model, inputs)
    assert not same_weights(model, old)
    twin = copy.deepcopy(model)
    for one in (twin, model):
        assert unpatch_model(one) is one
        assert everything(one) == before
        assert same_weights(one, old)
        assert torch.equal(logits(one, inputs), expected)


def step(model: Any, inputs: dict[str, Tensor]) -> None:
    optimizer = AdamW(param_groups(model, lr=0.1))
    gradients(model, inputs)
    optimizer.step()
    model.zero_grad()


def test_without_keep_original_weights_stay_as_they_were_learned() -> None:
    model, inputs = CASES["bert"].make(), CASES["bert"].inputs()
    patch_model(model, "gtrxl")
    step(model, inputs)
    learned = {key: value for key, value in weights(model).items() if not is_new(key)}
    unpatch_model(model)
    assert same_weights(model, learned)


def test_what_was_kept_is_written_below_adapters() -> None:
    model = CASES["opt-post"].make()
    old, expected = weights(model), logits(model, CASES["opt-post"].inputs())
    patch_model(model, "pre_ln_scaled", keep_original=True)
    adapted = with_adapters(model)
    unpatch_model(adapted)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, CASES["opt-post"].inputs()), expected)
    assert same_weights(adapted.unload(), old)


def test_a_model_can_be_patched_again_once_it_is_unpatched_but_not_before() -> None:
    model, inputs = CASES["gpt2"].make(), CASES["gpt2"].inputs()
    expected = logits(model, inputs)
    patch_model(model, "residual=layerscale")
    before = everything(model)
    with pytest.raises(ValueError, match=r"this GPT2LMHeadModel is patched already; .*\(unpatch_model\)"):
        patch_model(model, "gtrxl")
    assert everything(model) == before
    unpatch_model(model)
    with pytest.raises(ValueError, match="this GPT2LMHeadModel is not patched"):
        unpatch_model(model)
    patch_model(model, "norm=post;residual=deepnorm")
    unpatch_model(model)
    assert torch.equal(logits(model, inputs), expected)


def test_compiled_code_does_not_outlive_the_patch() -> None:
    model, inputs = CASES["gpt2"].make(), CASES["gpt2"].inputs()
    expected = logits(model, inputs)
    patch_model(model, "gtrxl")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    assert not torch.allclose(logits(compiled, inputs), expected, atol=1e-3)
    unpatch_model(compiled)
    close(logits(compiled, inputs), expected)


# The config


def test_the_config_says_how_the_model_is_patched_and_forgets_it() -> None:
    model = CASES["t5"].make()
    before = [stack.config.to_dict() for stack in (model, model.encoder, model.decoder)]
    patch_model(model, "rezero;activation=silu")
    for stack in (model, model.encoder, model.decoder):
        assert stack.config.gradguard["patch"] == PatchConfig.parse("rezero;activation=silu").to_dict()
    unpatch_model(model)
    assert [stack.config.to_dict() for stack in (model, model.encoder, model.decoder)] == before


def test_a_model_made_of_the_same_config_is_not_said_to_be_patched() -> None:
    config = CASES["bert"].config()
    stock, model, other = (tf.BertForMaskedLM(config) for _ in range(3))
    before = json.dumps(config.to_dict(), sort_keys=True)
    patch_model(model, "rezero;activation=relu")
    patch_model(other, "gtrxl")
    unpatch_model(other)
    assert stock.config is config
    assert json.dumps(config.to_dict(), sort_keys=True) == before
    assert model.config.gradguard["patch"]["residual"] == "rezero"
    assert model.config.hidden_act == "relu"
    assert {id(m.config) for m in model.modules() if hasattr(m, "config")} == {id(model.config)}


def test_attention_can_still_be_chosen_afterwards() -> None:
    model, inputs = patch_model(CASES["gpt2"].make(), "gtrxl"), CASES["gpt2"].inputs()
    expected = logits(model, inputs)
    model.set_attn_implementation("eager")
    assert len(model(**inputs, output_attentions=True).attentions) == 2
    close(logits(model, inputs), expected, atol=1e-5)


# What fails leaves nothing behind


TOKENS = {"input_ids": torch.ones(2, 3, dtype=torch.long)}


@pytest.mark.parametrize(
    ("name", "patch", "batch", "message"),
    [
        ("gpt2", "residual=deepnorm", None, "norm='post'"),
        ("gpt2", "norm=pre;deepnorm", None, "must come first"),
        ("bert", "lsuv", None, r"init='lsuv' measures .* batch=next\(iter\(dataloader\)\)"),
        ("gpt2-cross", "norm=post;init=lsuv", TOKENS, "cross_attention of decoder layer 0 took no part"),
        ("bert", "rezero;init=lsuv", {"tokens": torch.ones(2, 3)}, "exactly one of input_ids or inputs_embeds"),
        ("bert", "lsuv;activation=relu", [1], "batch is a list"),
        ("t5", "lsuv;embedding=norm;norm=post", {"input_ids": torch.full((1, 2), 900)}, "index out of range|decoder_"),
        ("bert", "xavier", TOKENS, "needs no batch"),
        ("bert", "norm=pre", TOKENS, "needs no batch"),
        ("bert", "residual=rezero;init=fixup", None, "no branch would ever learn"),
        (PARALLEL, "output_gate;norm=sandwich;activation=relu", None, "each branch is to get a norm of its own"),
        (PARALLEL, "residual=gru_gate", None, "parallel residual"),
    ],
)
def test_a_patch_that_fails_leaves_the_model_as_it_was(name: str, patch: str, batch: Any, message: str) -> None:
    model = CASES[name].make()
    before, old, expected = everything(model), weights(model), logits(model, CASES[name].inputs())
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        patch_model(model, patch, batch=batch)
    assert everything(model) == before
    assert same_weights(model, old)
    assert torch.equal(logits(model, CASES[name].inputs()), expected)
    patch_model(model, "residual=layerscale:init=1")


def test_lsuv_measures_the_model_as_it_is_patched() -> None:
    """Its outputs have standard deviation one with the norms where the patch has put them."""
    model, inputs = CASES["bert"].make(), CASES["bert"].inputs()
    patch_model(model, "norm=pre;init=lsuv:tolerance=1e-3", batch=inputs)
    stds: list[float] = []
    for branch in read_architecture(model).branches:
        branch.end.register_forward_hook(lambda *call: stds.append(call[2].std(correction=0).item()))
    logits(model, inputs)
    assert stds == pytest.approx([1.0] * 4, abs=2e-3)


def test_a_generator_decides_about_an_initialisation() -> None:
    def patched(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return weights(patch_model(CASES["bert"].make(), "xavier", generator=torch.Generator().manual_seed(3)))

    one, other = patched(1), patched(2)
    assert all(torch.equal(one[key], other[key]) for key in one)


# Models that can't be patched


def meta_model() -> Any:
    with torch.device("meta"):
        return tf.BertForMaskedLM(CASES["bert"].config())


def quantised() -> Any:
    model = CASES["bert"].make()
    model.is_quantized = True
    return model


def partitioned() -> Any:
    """As DeepSpeed's ZeRO-3 leaves a model that is made while it is on."""
    model = CASES["bert"].make()
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
        parameter.data = torch.empty(0)
    return model


def of_integers() -> Any:
    model = CASES["bert"].make()
    dense = model.bert.encoder.layer[0].output.dense
    dense.weight = nn.Parameter(torch.zeros(dense.weight.shape, dtype=torch.int8), requires_grad=False)
    return model


def compiled_in_place(whole: bool) -> Any:
    model = CASES["bert"].make()
    (model if whole else model.bert.encoder.layer[1]).compile(backend="eager")
    return model


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


REFUSED: dict[str, tuple[Any, str]] = {
    "meta": (meta_model, r"on the meta device\); load them, and patch it then"),
    "quantised": (quantised, "is quantised.*patch it before it is quantised"),
    "partitioned": (partitioned, r"is sharded .*; patch it before it is sharded"),
    "integers": (of_integers, r"output.dense.weight is torch.int8\); patch it before it is quantised"),
    "adapted": (
        lambda: get_peft_model(CASES["bert"].make(), LoraConfig(target_modules="all-linear", r=2)),
        r"inside another module \(PeftModel\); patch it before it is wrapped",
    ),
    "compiled": (
        lambda: torch.compile(CASES["bert"].make(), backend="eager"),
        r"inside another module \(OptimizedModule\); patch it before it is wrapped",
    ),
    "compiled in place": (lambda: compiled_in_place(True), "is compiled, .*patch it before it is compiled"),
    "layer compiled in place": (lambda: compiled_in_place(False), "is compiled, .*patch it before it is compiled"),
    "wrapped": (lambda: Wrapper(CASES["bert"].make()), "patch it before it is wrapped"),
    "parallel": (lambda: nn.DataParallel(CASES["bert"].make()), r"\(DataParallel\); patch it before it is wrapped"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_is_not_ready_is_refused_with_what_to_do(kind: str) -> None:
    make, message = REFUSED[kind]
    model = make()
    text, keys = repr(model), list(model.state_dict())
    for patch in ("rezero", "init=xavier"):
        with pytest.raises(ValueError, match=message):
            patch_model(model, patch)
    assert (repr(model), list(model.state_dict())) == (text, keys)


def test_what_is_no_transformers_model_is_refused() -> None:
    for nothing, called in (("gpt2", "str 'gpt2'"), (tf.GPT2LMHeadModel, "the class GPT2LMHeadModel"), (None, "None")):
        with pytest.raises(TypeError, match=rf"patches need a model, not .*{called}; make one first"):
            patch_model(nothing, "rezero")
    with pytest.raises(TypeError, match="Linear holds no Transformers model"):
        patch_model(nn.Linear(2, 2), "rezero")
    with pytest.raises(ValueError, match=r"model_type 'vit' is not in the table of architectures; supported: bart"):
        patch_model(tf.ViTModel(tf.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)), "rezero")


# Pretrained models


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    def load(name: str) -> Any:
        model = CASES[name].make()
        model.save_pretrained(tmp_path / name)
        return type(model).from_pretrained(tmp_path / name)

    return load


@pytest.mark.parametrize(
    ("name", "patch", "changed"),
    [
        ("bert", "gtrxl", "residual=gru_gate:bias=none and norm=pre make another function"),
        ("bert", "norm=pre", "norm=pre makes another function"),
        ("gpt2", "norm=pre;residual=gru_gate", "residual=gru_gate makes another function"),
        ("gpt2", "embedding=unit_rms", "embedding=unit_rms makes another function"),
        ("gpt2", "init=xavier", "init=xavier makes another function"),
        ("gpt2", "activation=relu", "activation=relu makes another function"),
        ("t5", "norm=sandwich;embedding=norm", "norm=sandwich and embedding=norm make another function"),
    ],
)
def test_a_patch_that_makes_another_function_of_a_pretrained_model_says_so(
    name: str, patch: str, changed: str, saved: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = saved(name)
    patch_model(model, patch)
    (message,) = [message for message in warnings_of(caplog) if "pretrained" in message]
    assert changed in message
    assert "residual=layerscale:init=1" in message


@pytest.mark.parametrize("rule", ["layerscale:init=1", "rezero:init=1", "skipinit:init=1", "branch_scale:scale=1"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_a_patch_that_keeps_the_function_of_a_pretrained_model_is_silent(
    name: str, rule: str, saved: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = saved(name), CASES[name].inputs()
    expected = logits(model, inputs)
    patch_model(model, f"residual={rule}" + (";norm=post;embedding=unit_rms" if name == "bert" else ";norm=pre"))
    close(logits(model, inputs), expected)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("patch", ["rezero", "deepnorm", "embedding=norm"])
def test_a_new_model_is_not_taken_for_a_pretrained_one(
    patch: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even one that is made of a checkpoint's config, and so has its name."""
    CASES["gpt2"].make().save_pretrained(tmp_path)
    model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.from_pretrained(tmp_path))
    assert model.name_or_path
    patch_model(model, patch)
    patch_model(CASES["gpt2"].make(), patch)
    assert warnings_of(caplog) == []


# Conflicts


TWICE = "branches are scaled twice"
CANCELS = "undoes the scale"
HALF = "half a recipe"
NORMED = "made for branches without norms"
ON_STREAM = "no gain makes a layer the identity"


@pytest.mark.parametrize(
    ("name", "patch", "message"),
    [
        ("bert", "norm=pre;residual=branch_scale;init=gpt2", TWICE),
        ("llama", "residual=branch_scale;init=small", TWICE),
        ("llama", "residual=branch_scale;init=normal", None),
        ("gpt2", "residual=branch_scale", TWICE),
        ("gpt2", "residual=branch_scale;init=normal", None),
        ("llama", "residual=branch_scale", None),
        ("gpt2", "residual=branch_scale:scale=1", None),
        ("gpt2", "residual=layerscale", None),
        ("gpt2", "norm=sandwich;init=gpt2", CANCELS),
        ("gpt2", "norm=sandwich;init=ds_init", CANCELS),
        ("gpt2", "norm=sandwich;init=xavier", None),
        ("gpt2", "norm=pre;init=ds_init", None),
        ("bert", "residual=deepnorm", HALF),
        ("bert", "residual=deepnorm;init=xavier", HALF),
        ("bert", "init=deepnorm", HALF),
        ("bert", "residual=deepnorm;init=deepnorm", None),
        ("gpt2", "residual=deepnorm;init=deepnorm;norm=post", None),
        ("gpt2", "init=t_fixup", NORMED),
        ("bert", "init=fixup", NORMED),
        ("gpt2", "init=fixup;norm=none", None),
        ("bert", "residual=layerscale", ON_STREAM),
        ("bert", "residual=rezero", ON_STREAM),
        ("bert", "residual=gru_gate", ON_STREAM),
        ("bert", "residual=layerscale;norm=pre", None),
        ("bert", "residual=layerscale:init=1", None),
        ("gpt2", "residual=layerscale;norm=post", ON_STREAM),
        ("bert", "residual=rezero;norm=none", None),
        ("bert", "residual=rezero;norm=none;init=fixup", "each keeps the other's gradient at zero"),
        ("bert", "residual=skipinit:init=0;norm=none;init=fixup", "each keeps the other's gradient at zero"),
        ("bert", "residual=rezero:init=1;norm=none;init=fixup", None),
        ("bert", "residual=layerscale:init=0;norm=none;init=fixup", "each keeps the other's gradient at zero"),
    ],
)
def test_parts_that_fight_are_told_of_and_others_are_not(
    name: str, patch: str, message: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    is_refused = message is not None and message.startswith("each keeps")
    try:
        patch_model(CASES[name].make(), patch)
        assert not is_refused
        told = warnings_of(caplog)
    except ValueError as error:
        assert is_refused
        told = [str(error)]
    assert len(told) == (message is not None)
    assert all(message in text for text in told if message is not None)


def test_no_branch_learns_where_two_zeros_meet() -> None:
    """Why that conflict is refused: both gradients are products with the other's zero."""
    model = CASES["bert"].make()
    patch_model(model, "norm=none;residual=rezero:init=1;init=fixup")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if is_new(key):
                parameter.zero_()
    found = gradients(model, CASES["bert"].inputs())
    layers = {key: value for key, value in found.items() if ".layer." in key and "final" not in key}
    assert layers
    assert not any(value.any() for value in layers.values())
    assert isinstance(PARTS["init"].parse("lsuv"), LSUV)


def test_pretrained_weights_are_no_reason_to_warn_of_their_old_initialisation(
    saved: Any, caplog: pytest.LogCaptureFixture
) -> None:
    patch_model(saved("gpt2"), "residual=branch_scale")
    assert not any(TWICE in message for message in warnings_of(caplog))
