"""Residual rules in whole models."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_gradguard.patch import CONTAINER, read_architecture
from hf_gradguard.patch.model import patch_model, unpatch_model
from hf_gradguard.patch.residual import LSTMGate, rules
from hf_gradguard.patch.residual.installed import installed
from tests.patch.gates import PLAIN, bart_layer, bert_layer, distilbert_layer, opt_post_layer
from tests.patch.models import ALL, CASES, GENERATIVE, check_generation, gradients, logits
from tests.patch.plain import pair
from tests.patch.test_taps import close, close_gradients

PARALLEL = "gpt_neox-parallel"
POST = ["bart", "bert", "bert-cross", "distilbert", "electra", "opt-post", "roberta"]
WEIGHING = {"gru_gate", "highway_gate", "lstm_gate"}
SPECS = [
    "branch_scale",
    "branch_scale:exponent=0.7",
    "completep",
    "completep:base_depth=8,alpha=0.5",
    "deepnorm",
    "gru_gate",
    "gru_gate:relu=false",
    "highway_gate",
    "input_gate",
    "layerscale",
    "lstm_gate",
    "output_gate",
    "output_gate:relu=false",
    "rezero",
    "rezero:shared=false",
    "sigmoid_tanh_gate",
    "skipinit",
]


def fits(spec: str, name: str) -> bool:
    rule = spec.partition(":")[0]
    return not (rule in WEIGHING and name == PARALLEL) and (rule != "deepnorm" or name in POST)


def some(*names: str) -> list[tuple[str, str]]:
    """Each of the models with each rule that can be put on it."""
    return [(name, spec) for name in names for spec in SPECS if fits(spec, name)]


# In a parallel layer those that can be written out are the ones with one gate for both branches.
WRITTEN_OUT = [(name, spec) for name, spec in some(*sorted(PLAIN)) if name != PARALLEL or "_gate" in spec]


def model_with(name: str, spec: str, seed: int = 0, **changes: Any) -> Any:
    model = CASES[name].make(**changes)
    torch.manual_seed(seed)
    patch_model(model, f"residual={spec}")
    return model


def without_branches(name: str) -> Any:
    """A model in which every branch is zero."""
    model = CASES[name].make()
    for branch in read_architecture(model).branches:
        branch.output.write(torch.zeros(branch.output.shape))
        branch.output.write_bias(0.0)
    return model


# Against models written out


@pytest.mark.parametrize(("name", "spec"), WRITTEN_OUT)
def test_outputs_and_gradients_are_those_of_the_model_written_out(name: str, spec: str) -> None:
    changes = {"layer_norm_eps": 0.05} if name == "bert" else {}
    model, reference, names = pair(name, spec, is_training=True, **changes)
    inputs = CASES[name].inputs()
    torch.manual_seed(5)
    found = logits(model, inputs)
    torch.manual_seed(5)
    torch.testing.assert_close(found, logits(reference, inputs), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, logits(CASES[name].make(**changes).train(), inputs), atol=1e-2)

    by_rule, by_hand = gradients(model, inputs, seed=7), gradients(reference, inputs, seed=7)
    plain = [key for key, _ in reference.named_parameters() if key.startswith("plain.")]
    for key, key_by_hand in zip(names, plain, strict=True):
        by_hand[key] = by_hand.pop(key_by_hand)
    close_gradients(by_rule, by_hand)


@pytest.mark.parametrize("name", sorted(set(ALL) - set(PLAIN)))
def test_in_the_other_architectures_every_parameter_of_every_rule_gets_a_gradient(name: str) -> None:
    inputs = CASES[name].inputs()
    expected = logits(CASES[name].make(), inputs)
    for spec in SPECS:
        if fits(spec, name):
            model = model_with(name, spec)
            assert not torch.allclose(logits(model, inputs), expected, atol=1e-3), spec
            own = [key for key, _ in model.named_parameters() if CONTAINER in key]
            found = gradients(model, inputs)
            assert all(found[key].isfinite().all() and found[key].any() for key in own), spec


# Settings that leave a model as it is


@pytest.mark.parametrize("name", ALL)
def test_what_is_called_preserving_leaves_the_model_as_it_is(name: str) -> None:
    inputs = CASES[name].inputs()
    expected = logits(CASES[name].make(), inputs)
    for spec in ("rezero:init=1", "rezero:init=1,shared=false", "skipinit:init=1", "layerscale:init=1"):
        assert rules.parse(spec).preserving
        close(logits(model_with(name, spec), inputs), expected)
    assert rules.parse("branch_scale:scale=1").preserving
    close(logits(model_with(name, "branch_scale:scale=1"), inputs), expected)
    close(logits(model_with(name, "output_gate:relu=false,bias=-60"), inputs), expected)


@pytest.mark.parametrize(("name", "spec"), some("bert", "gpt2", "bart"))
def test_what_is_not_called_preserving_changes_the_model(name: str, spec: str) -> None:
    assert not rules.parse(spec).preserving
    inputs = CASES[name].inputs()
    assert not torch.allclose(logits(model_with(name, spec), inputs), logits(CASES[name].make(), inputs), atol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_a_shut_gate_is_as_if_there_were_no_branches(name: str) -> None:
    inputs = CASES[name].inputs()
    expected = logits(without_branches(name), inputs)
    specs = ["rezero", "skipinit", "layerscale:init=0", "output_gate:bias=60", "sigmoid_tanh_gate:bias=60"]
    for spec in [*specs, *([] if name == PARALLEL else ["gru_gate:bias=60", "highway_gate:bias=60"])]:
        close(logits(model_with(name, spec), inputs), expected)


# Folding, taking away


@pytest.mark.parametrize("name", ALL)
def test_the_gain_of_a_rule_folds_into_the_output_projection(name: str) -> None:
    inputs = CASES[name].inputs()
    for spec in ("branch_scale", "layerscale:init=0.5", "rezero:init=0.4", "skipinit:init=-0.6"):
        model = model_with(name, spec)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if CONTAINER in key:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.3)
        expected = logits(model, inputs)
        patch = rules.parse(spec)
        folds = [(branch, patch.gain(rule)) for branch, rule in installed(read_architecture(model))]
        unpatch_model(model)
        for branch, gain in folds:
            assert gain is not None
            column = gain.reshape(-1, 1) if isinstance(gain, Tensor) else gain
            branch.output.write(branch.output.read() * column)
            bias = branch.output.read_bias()
            if bias is not None:
                branch.output.write_bias(bias * gain)
        close(logits(model, inputs), expected, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_uninstall_gives_the_model_back(name: str) -> None:
    inputs = CASES[name].inputs()
    text, expected = repr(CASES[name].make()), logits(CASES[name].make(), inputs)
    for spec in ("rezero", "deepnorm", "lstm_gate", "output_gate"):
        if fits(spec, name):
            model = model_with(name, spec)
            logits(model, inputs)
            for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
                unpatch_model(one)
                assert torch.equal(logits(one, inputs), expected)
                assert repr(one) == text


@pytest.mark.parametrize(("name", "spec"), some("bert", "gpt2", "t5"))
def test_autocast_computes_nearly_the_same(name: str, spec: str) -> None:
    model, inputs = model_with(name, spec), CASES[name].inputs()
    expected = logits(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, inputs)
        difference = (logits(model, inputs).float() - expected).norm() / expected.norm()
    assert 0 < difference < 0.05
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize(("name", "spec"), some("bert", "gpt2", "t5"))
def test_bfloat16_stays_bfloat16(name: str, spec: str) -> None:
    model = CASES[name].make().bfloat16()
    patch_model(model, f"residual={spec}")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert logits(model, CASES[name].inputs(dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert {gradient.dtype for gradient in gradients(model, CASES[name].inputs()).values()} == {torch.bfloat16}


# DeepNorm


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize(
    ("name", "layer_by_hand"),
    [("bert", bert_layer), ("bart", bart_layer), ("distilbert", distilbert_layer), ("opt-post", opt_post_layer)],
)
def test_deepnorm_is_the_norm_of_a_larger_residual_with_the_norms_own_epsilon(
    name: str, layer_by_hand: Any, is_training: bool
) -> None:
    """Two layers in each stack, and an epsilon that is large enough to be seen."""
    model, reference = CASES[name].make().train(is_training), CASES[name].make().train(is_training)
    for one in (model, reference):
        for branch in read_architecture(one).branches:
            branch.norm.value.eps = 0.3
    alphas = {"encoder": 0.81 * 32 ** (1 / 16), "decoder": 6**0.25} if name == "bart" else {}
    for layer in read_architecture(reference).layers:
        alpha = alphas.get(layer.branches[0].stack, 4**0.25)
        gates = [lambda x, y, alpha=alpha: alpha * x + y for _ in layer.branches]
        layer.module.forward = layer_by_hand(layer.module, *gates)
    patch_model(model, "residual=deepnorm")

    def run(one: Any) -> Tensor:
        torch.manual_seed(5)
        return logits(one, CASES[name].inputs())

    close(run(model), run(reference), atol=2e-6)
    for branch in read_architecture(model).branches:
        branch.norm.value.eps = 0.3
    assert not torch.allclose(run(model), run(reference), atol=1e-3)


# The LSTM over depth

SEQUENTIAL = sorted(set(ALL) - {PARALLEL})


def cell_states(model: nn.Module) -> list[Tensor | None]:
    return [module.state.cell for module in model.modules() if isinstance(module, LSTMGate)]


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_no_cell_state_is_left_for_the_next_pass(name: str) -> None:
    inputs, others = CASES[name].inputs(), CASES[name].inputs(seed=1)
    model = model_with(name, "lstm_gate").train(False)
    expected = logits(model_with(name, "lstm_gate"), inputs)
    gradients(model, others)
    assert cell_states(model) == [None] * len(read_architecture(model).branches)
    assert torch.equal(logits(model, inputs), expected)
    with torch.no_grad():
        close(logits(model, inputs), expected, atol=1e-5)


def test_a_pass_that_ended_in_the_middle_has_no_part_in_the_next() -> None:
    inputs = CASES["gpt2"].inputs()
    model = model_with("gpt2", "lstm_gate")
    expected = logits(model, inputs)
    handle = model.transformer.h[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, CASES["gpt2"].inputs(seed=1))
    handle.remove()
    assert cell_states(model)[0] is not None
    assert torch.equal(logits(copy.deepcopy(model), inputs), expected)
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("name", sorted(set(GENERATIVE) - {PARALLEL}))
def test_an_lstm_over_depth_generates_the_same_with_a_cache_and_without(name: str) -> None:
    check_generation(model_with(name, "lstm_gate:forget_bias=1"), CASES[name])


def test_a_cell_state_is_not_shared_with_a_copy() -> None:
    model = model_with("gpt2", "lstm_gate")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        states = [{id(m.state) for m in one.modules() if isinstance(m, LSTMGate)} for one in (model, twin)]
        assert [len(each) for each in states] == [1, 1]
        assert not states[0] & states[1]
        assert torch.equal(logits(twin, CASES["gpt2"].inputs()), logits(model, CASES["gpt2"].inputs()))


def test_what_the_first_branch_makes_reaches_the_last_through_the_cell_state_alone() -> None:
    """With the hidden state cut, the first gate still gets a gradient."""
    model = model_with("gpt2", "lstm_gate")
    gates = [module for module in model.modules() if isinstance(module, LSTMGate)]
    for gate in gates[1:]:
        gate.register_forward_pre_hook(lambda module, args: (args[0].detach(), args[1].detach()))
    found = gradients(model, CASES["gpt2"].inputs())
    first = next(key for key in found if "h.0." in key and CONTAINER in key and "attention" in key)
    assert found[first].any()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", SEQUENTIAL)
def test_checkpointing_that_is_switched_on_later_is_refused_in_training(name: str, use_reentrant: bool) -> None:
    model = model_with(name, "lstm_gate")
    expected = logits(model, CASES[name].inputs())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert torch.equal(logits(model, CASES[name].inputs()), expected)
    with pytest.raises(RuntimeError, match=r"attention of .* layer 0: .*gradient_checkpointing=False"):
        gradients(model.train(), CASES[name].inputs())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_by_other_means_is_refused_when_it_recomputes(use_reentrant: bool) -> None:
    model = model_with("gpt2", "lstm_gate")
    for layer in model.transformer.h:

        def forward(x: Tensor, *args: Any, own: Any = layer.forward, **kwargs: Any) -> Any:
            return checkpoint(lambda x: own(x, *args, **kwargs), x, use_reentrant=use_reentrant)

        layer.forward = forward
    with pytest.raises(RuntimeError, match=r"layer 1: there is no cell state from the layer below.*checkpointing"):
        gradients(model, CASES["gpt2"].inputs())


def test_a_layer_by_itself_is_refused() -> None:
    model = model_with("gpt2", "lstm_gate")
    with pytest.raises(RuntimeError, match="attention of decoder layer 1: there is no cell state"):
        model.transformer.h[1](torch.zeros(1, 3, 16))


@pytest.mark.parametrize("name", ["bert", pytest.param("t5", marks=pytest.mark.slow)])
def test_an_lstm_over_depth_compiles_to_one_graph(name: str) -> None:
    model, inputs = model_with(name, "lstm_gate"), CASES[name].inputs()
    expected, by_eager = logits(model, inputs), gradients(model, inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(logits(compiled, inputs), expected)
    found = gradients(compiled, inputs)
    close_gradients({key.removeprefix("_orig_mod."): value for key, value in found.items()}, by_eager)
