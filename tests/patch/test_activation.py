from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from hf_gradguard.patch import Multiplier, attach, read_architecture
from hf_gradguard.patch.activation import replace_activation
from tests.patch.models import ALL, CASES, logits

NAMES = sorted(ACT2FN)
T5_NAMES = [("t5-gated", name) for name in ("gelu", "gelu_new", "relu", "prelu")]


def saved_and_loaded(model, path):
    """The model as stock Transformers makes it of its checkpoint."""
    model.save_pretrained(path)
    return type(model).from_pretrained(path).eval()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("activation", ["leaky_relu", "tanh"])
def test_every_mlp_gets_it_and_a_stock_reload_computes_the_same(name, activation, tmp_path):
    case = CASES[name]
    model = case.make()
    before = logits(model, case.inputs())

    replaced = replace_activation(read_architecture(model), activation)

    anatomy = read_architecture(model)
    found = [branch.activation.value for branch in anatomy.branches if branch.activation is not None]
    assert len(found) == sum(branch.kind == "mlp" for branch in anatomy.branches) >= 2
    assert {type(module) for module in found} == {type(ACT2FN[activation])}
    assert replaced.field is not None
    after = logits(model, case.inputs())
    assert not torch.allclose(after, before, atol=1e-5)
    assert torch.equal(logits(saved_and_loaded(model, tmp_path), case.inputs()), after)


@pytest.mark.parametrize("name", ALL)
def test_what_it_computes_is_what_the_stock_class_makes_of_that_config(name):
    case = CASES[name]
    model = case.make()
    prefix = "gated-" if name == "t5-gated" else ""
    field = {"t5": "feed_forward_proj", "t5-gated": "feed_forward_proj"}.get(name) or next(
        field
        for field in ("hidden_act", "activation_function", "hidden_activation", "activation")
        if isinstance(getattr(model.config, field, None), str)
    )
    stock = type(model)(case.config(**{field: prefix + "sigmoid"})).eval()
    stock.load_state_dict(model.state_dict())

    replace_activation(read_architecture(model), "sigmoid")

    assert torch.equal(logits(model, case.inputs()), logits(stock, case.inputs()))


@pytest.mark.parametrize(("name", "activation"), [*(("bert", name) for name in NAMES), *T5_NAMES])
def test_any_name_survives_a_stock_reload(name, activation, tmp_path):
    # of T5, `gated-gelu` alone would be loaded as gelu_new
    case = CASES[name]
    model = case.make()
    replace_activation(read_architecture(model), activation)
    mlp = next(branch for branch in read_architecture(model).branches if branch.kind == "mlp")
    with torch.no_grad():
        for parameter in mlp.activation.value.parameters():
            parameter.add_(0.125)

    loaded = saved_and_loaded(model, tmp_path)

    assert torch.equal(logits(loaded, case.inputs()), logits(model, case.inputs()))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("activation", ["mish", "prelu"])
def test_restoring_gives_back_modules_config_and_outputs(name, activation):
    case = CASES[name]
    model = case.make()
    modules, settings, before = dict(model.named_modules()), model.config.to_dict(), logits(model, case.inputs())
    names = list(model.state_dict())

    replaced = replace_activation(read_architecture(model), activation)
    assert model.config.to_dict() != settings
    replaced.restore()

    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == names
    assert model.config.to_dict() == settings
    assert torch.equal(logits(model, case.inputs()), before)


def test_restoring_gives_back_a_function_that_was_no_module():
    case = CASES["bert"]
    model = case.make()
    slot = next(branch.activation for branch in read_architecture(model).branches if branch.activation)
    delattr(slot.owner, slot.name)
    slot.replace(F.gelu)
    before = logits(model, case.inputs())

    replaced = replace_activation(read_architecture(model), "relu")
    assert isinstance(slot.value, nn.ReLU)
    replaced.restore()

    assert slot.value is F.gelu
    assert torch.equal(logits(model, case.inputs()), before)


def test_the_configs_of_t5s_stacks_change_with_the_models():
    model = CASES["t5-gated"].make()
    replaced = replace_activation(read_architecture(model), "silu")

    configs = [model.config, model.encoder.config, model.decoder.config]
    assert [(config.feed_forward_proj, config.dense_act_fn) for config in configs] == [("gated-silu", "silu")] * 3
    replaced.restore()
    assert [(config.feed_forward_proj, config.dense_act_fn) for config in configs] == [("gated-gelu", "gelu_new")] * 3


def test_a_head_with_an_activation_of_its_own_keeps_it():
    model = CASES["electra"].make()
    own = model.generator_predictions.activation
    replace_activation(read_architecture(model), "relu")
    assert model.generator_predictions.activation is own


def test_a_learned_activation_is_one_for_each_mlp_in_the_models_dtype():
    model = CASES["llama"].make().to(torch.bfloat16)
    replace_activation(read_architecture(model), "prelu")

    learned = [parameter for path, parameter in model.named_parameters() if "act_fn" in path]
    assert len(learned) == model.config.num_hidden_layers
    assert {parameter.dtype for parameter in learned} == {torch.bfloat16}
    model(**CASES["llama"].inputs()).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in learned)


@pytest.mark.parametrize("name", ALL)
def test_neither_weights_nor_random_numbers_are_touched(name):
    model = CASES[name].make().train()
    weights = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()

    replace_activation(read_architecture(model), "leaky_relu")

    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[path]) for path, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_it_works_on_a_model_with_residual_rules():
    case = CASES["gpt2"]
    model, stock = case.make(), case.make()
    replace_activation(read_architecture(stock), "tanh")

    for each in (model, stock):
        attach(each, lambda branch: Multiplier(0.3))
    replaced = replace_activation(read_architecture(model), "tanh")

    assert replaced.field == "activation_function"
    assert torch.equal(logits(model, case.inputs()), logits(stock, case.inputs()))


def test_a_class_that_patches_itself_is_not_patched_while_its_config_is_asked():
    case = CASES["bert"]
    stock = type(case.make())
    made = []

    class Patching(stock):
        def __init__(self, config):
            super().__init__(config)
            if hasattr(config, "gradguard"):
                made.append(config)
                replace_activation(read_architecture(self), config.gradguard["activation"])

    config = case.config()
    config.gradguard = {"activation": "relu"}
    model = Patching(config)

    assert len(made) == 1
    assert model.config.hidden_act == "relu"
    assert model.config.gradguard == {"activation": "relu"}


def test_a_config_that_does_not_decide_about_the_mlps_stays_as_it_is():
    class Stubborn(type(CASES["bert"].make())):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.bert.encoder.layer:
                layer.intermediate.intermediate_act_fn = nn.ReLU()

    model = Stubborn(CASES["bert"].config())
    replaced = replace_activation(read_architecture(model), "tanh")

    assert replaced.field is None
    assert model.config.hidden_act == "gelu"
    assert all(isinstance(layer.intermediate.intermediate_act_fn, nn.Tanh) for layer in model.bert.encoder.layer)
    assert isinstance(model.cls.predictions.transform.transform_act_fn, type(ACT2FN["gelu"]))


def test_an_unknown_name_is_refused_with_the_nearest_known_and_nothing_is_changed():
    model = CASES["bert"].make()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match="unknown activation 'leaky_rleu'; did you mean 'leaky_relu'"):
        replace_activation(read_architecture(model), "leaky_rleu")
    assert dict(model.named_modules()) == modules
    assert model.config.hidden_act == "gelu"
