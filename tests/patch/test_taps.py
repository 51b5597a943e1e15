"""The taps let a rule act where a branch meets the stream, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer

from hf_gradguard.observe.structure import read_layout
from hf_gradguard.patch import CONTAINER, Branch, Identity, Multiplier, attach, detach, read_architecture
from tests.patch.gates import LAYERS, make_gate
from tests.patch.models import ALL, CASES, GENERATIVE, WIDTH, check_generation, gradients, logits

GAIN = 0.37


def gain(branch: Branch) -> Multiplier:
    return Multiplier(GAIN)


def gains(branch: Branch) -> Multiplier:
    return Multiplier(torch.linspace(-1.0, 1.5, branch.output.out_features))


def identity(branch: Branch) -> Identity:
    return Identity()


def base_name(name: str) -> bool:
    return CONTAINER not in name


def close(found: Tensor, expected: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def close_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Each gradient within a fraction of the largest entry of all."""
    assert set(found) == set(expected)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=tolerance * largest, rtol=0, msg=f"gradient of {name}")


def hooks(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """How many hooks of each kind each module has."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return {name: tuple(len(getattr(m, kind)) for kind in kinds) for name, m in model.named_modules()}


# Identity


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_the_identity_changes_no_logit_and_no_gradient(name: str, is_training: bool) -> None:
    model, inputs = CASES[name].make().train(is_training), CASES[name].inputs()

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(3)
        return logits(model, inputs), gradients(model, inputs, seed=3)

    out, grads = run()
    for make_rule in (identity, lambda branch: Multiplier(1.0)):
        attach(model, make_rule)
        found, found_grads = run()
        close(found, out)
        close_gradients({key: value for key, value in found_grads.items() if base_name(key)}, grads)
        detach(model)


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart", "opt-pre"])
def test_dropout_is_on_in_the_models_that_are_tested_with_it(name: str) -> None:
    model, inputs = CASES[name].make().train(), CASES[name].inputs()
    assert not torch.allclose(logits(model, inputs), logits(model, inputs))


def test_the_identity_is_exact_where_no_branch_is_larger_than_the_stream() -> None:
    model, inputs = CASES["gpt2"].make(), CASES["gpt2"].inputs()
    for branch in read_architecture(model).branches:
        branch.output.write(branch.output.read() * 1e-3)
        branch.output.write_bias(0.0)
    expected = logits(model, inputs)
    attach(model, identity)
    assert torch.equal(logits(model, inputs), expected)


# Multipliers


def scaled_outputs(model: Any, factor: Tensor | float) -> None:
    """The same function as a multiplier, by way of the weights."""
    for module in {branch.output.module for branch in read_architecture(model).branches}:
        is_conv = type(module).__name__ == "Conv1D"
        with torch.no_grad():
            module.weight.mul_(factor if is_conv or isinstance(factor, float) else factor[:, None])
            if module.bias is not None:
                module.bias.mul_(factor)


@pytest.mark.parametrize("name", ALL)
def test_a_multiplier_equals_scaled_output_weights(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs()
    for make_rule, factor in ((gain, GAIN), (gains, torch.linspace(-1.0, 1.5, WIDTH))):
        model, reference = case.make(), case.make()
        attach(model, make_rule)
        scaled_outputs(reference, factor)
        assert not torch.allclose(logits(reference, inputs), logits(case.make(), inputs), atol=1e-2)
        close(logits(model, inputs), logits(reference, inputs), atol=1e-5)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_a_multipliers_gradients_follow_from_those_of_scaled_output_weights(name: str, is_training: bool) -> None:
    """W' = m W: the gradient of W is m times that of W', and of m the inner product of W with that of W'."""
    model, reference = (CASES[name].make().train(is_training) for _ in range(2))
    scaled_outputs(reference, GAIN)
    anatomy = attach(model, gain)
    expected = gradients(reference, CASES[name].inputs())
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    for branch in anatomy.branches:
        of_gain = torch.zeros(1)
        for parameter in (branch.output.weight, branch.output.bias):
            if parameter is not None:
                key = names[id(parameter)]
                of_gain += (expected[key] * parameter.detach()).sum()
                expected[key] = expected[key] * GAIN
        layer = anatomy.stacks[[stack.name for stack in anatomy.stacks].index(branch.stack)].layers[branch.layer]
        rule = layer.module.get_submodule(f"{CONTAINER}.{branch.kind}.rule")
        expected[names[id(rule.gain)]] = of_gain
    found = gradients(model, CASES[name].inputs())
    close_gradients(found, expected)


def test_a_fixed_multiplier_has_no_parameter_and_no_buffer_if_it_is_a_number() -> None:
    assert not Multiplier(0.5, learnable=False).state_dict()
    assert [*Multiplier(torch.ones(3), learnable=False).state_dict()] == ["gain"]
    assert not [*Multiplier(torch.ones(3), learnable=False).parameters()]


# Gates, against layers written by hand


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_a_gate_equals_the_layer_written_by_hand(name: str, is_training: bool) -> None:
    case = CASES[name]
    write, gates_a_layer = LAYERS[name]
    model, reference = case.make().train(is_training), case.make().train(is_training)
    attach(model, make_gate)
    for number, layer in enumerate(read_architecture(reference).layers):
        gates = [make_gate(branch) for branch in layer.branches[:gates_a_layer]]
        layer.module.forward = write(layer.module, *gates)
        layer.module.add_module("gates", nn.ModuleList(gates))
        taps = [module for key, module in read_architecture(model).layers[number].module.named_children()]
        assert len(list(taps[-1].children())) == gates_a_layer
    torch.manual_seed(5)
    expected = logits(reference, case.inputs())
    torch.manual_seed(5)
    found = logits(model, case.inputs())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, logits(case.make().train(is_training), case.inputs()), atol=1e-2)

    by_hand = gradients(reference, case.inputs(), seed=7)
    by_taps = gradients(model, case.inputs(), seed=7)
    own = {key: value for key, value in by_taps.items() if base_name(key)}
    close_gradients(own, {key: value for key, value in by_hand.items() if ".gates." not in key})
    close_gradients(
        dict(enumerate(value for key, value in by_taps.items() if not base_name(key))),  # type: ignore[arg-type]
        dict(enumerate(value for key, value in by_hand.items() if ".gates." in key)),  # type: ignore[arg-type]
    )


# Company: checkpointing, cache, copies, compilers, adapters, dtypes


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_gradient_checkpointing_gives_equal_gradients(name: str, use_reentrant: bool) -> None:
    for make_rule in (make_gate, gain):
        model = CASES[name].make().train()
        attach(model, make_rule)
        expected = gradients(model, CASES[name].inputs())
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        close_gradients(gradients(model, CASES[name].inputs()), expected, tolerance=1e-6)


@pytest.mark.parametrize("name", GENERATIVE)
def test_generation_with_cache_equals_generation_without(name: str) -> None:
    for make_rule in (make_gate, gains):
        model = CASES[name].make()
        attach(model, make_rule)
        check_generation(model, CASES[name])


@pytest.mark.parametrize("name", ALL)
def test_a_copys_taps_act_on_the_copys_own_parameters(name: str) -> None:
    inputs = CASES[name].inputs()
    for make_rule in (make_gate, gain):
        model = CASES[name].make()
        attach(model, make_rule)
        expected = logits(model, inputs)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(twin, inputs), expected)
            own = {key: parameter for key, parameter in twin.named_parameters() if not base_name(key)}
            assert own
            with torch.no_grad():
                for parameter in own.values():
                    parameter.mul_(0.5)
            assert not torch.allclose(logits(twin, inputs), expected, atol=1e-3)
            assert set(own) <= set(gradients(twin, inputs))
            assert torch.equal(logits(model, inputs), expected)
            detach(twin)
            assert torch.equal(logits(twin, inputs), logits(CASES[name].make(), inputs))
            assert torch.equal(logits(model, inputs), expected)


def test_a_model_can_be_copied_after_a_pass_that_ended_between_the_hooks() -> None:
    model = CASES["gpt2"].make()
    attach(model, make_gate)
    model.transformer.h[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, CASES["gpt2"].inputs())
    copy.deepcopy(model)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("make_rule", [identity, make_gate])
@pytest.mark.parametrize("name", ALL)
def test_at_most_one_x_is_left_after_a_pass_with_checkpointing(name: str, make_rule: Any, use_reentrant: bool) -> None:
    """Recomputation need not reach the end of a branch whose gate saves nothing for backward."""
    model = CASES[name].make().train()
    attach(model, make_rule)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    seen: list[weakref.ref[Tensor]] = []
    for branch in read_architecture(model).branches:
        branch.residual.module.register_forward_pre_hook(
            lambda module, args, kwargs, argument=branch.residual.argument: seen.append(
                weakref.ref(kwargs[argument] if isinstance(argument, str) else args[argument])
            ),
            with_kwargs=True,
        )
    gradients(model, CASES[name].inputs())
    left = {id(x()) for x in seen if x() is not None}
    assert len(seen) > 4
    assert len(left) <= 1


COMPILED = ["bert", "gpt2", "opt-post", "gpt_neox-parallel", "t5-gated"]


def check_compiled(name: str) -> None:
    inputs = CASES[name].inputs()
    for make_rule in (gains, make_gate):
        model = CASES[name].make()
        attach(model, make_rule)
        expected = gradients(model, inputs)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        close(logits(compiled, inputs), logits(model, inputs))
        found = gradients(compiled, inputs)
        close_gradients({key.removeprefix("_orig_mod."): value for key, value in found.items()}, expected)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize(("make_rule", "fullgraph"), [(gains, True), (make_gate, False)])
def test_compiled_checkpointing_gives_equal_gradients(make_rule: Any, fullgraph: bool) -> None:
    """To keep x inside a checkpoint breaks the graph, so that gates compile in pieces there."""
    model = CASES["gpt2"].make(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False).train()
    attach(model, make_rule)
    expected = gradients(model, CASES["gpt2"].inputs())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.compiler.reset()
    found = gradients(torch.compile(model, backend="aot_eager", fullgraph=fullgraph), CASES["gpt2"].inputs())
    close_gradients({key.removeprefix("_orig_mod."): value for key, value in found.items()}, expected)


@pytest.mark.parametrize("name", COMPILED)
def test_a_patched_model_compiles_to_one_graph(name: str) -> None:
    check_compiled(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ALL) - set(COMPILED)))
def test_a_patched_model_of_the_other_kinds_compiles_to_one_graph(name: str) -> None:
    check_compiled(name)


def with_adapters(model: Any, seed: int = 9) -> Any:
    """LoRA on every linear module, with random weights."""
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapted.eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", ALL)
def test_adapters_may_come_before_the_patch_or_after_it(name: str) -> None:
    # in double precision, as merging rounds the weights
    inputs = CASES[name].inputs(dtype=torch.float64)
    after = CASES[name].make().double()
    attach(after, make_gate)
    after = with_adapters(after)
    before = with_adapters(CASES[name].make().double())
    unpatched = logits(before, inputs)
    attach(before, make_gate)
    expected = logits(before, inputs)
    close(logits(after, inputs), expected, atol=1e-9)
    assert not torch.allclose(expected, unpatched, atol=1e-2)

    merged = CASES[name].make().double()
    attach(merged, make_gate)
    merged = with_adapters(merged).merge_and_unload()
    close(logits(merged, inputs), expected, atol=1e-9)
    detach(before)
    assert torch.equal(logits(before, inputs), unpatched)
    detach(merged)
    close(logits(merged, inputs), unpatched, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_stays_bfloat16(name: str) -> None:
    case = CASES[name]
    vanilla = case.make().bfloat16()
    expected = logits(vanilla, case.inputs(dtype=torch.bfloat16))
    for make_rule in (identity, lambda branch: Multiplier(1.0), make_gate):
        model = case.make().bfloat16()
        attach(model, make_rule)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        found = logits(model, case.inputs(dtype=torch.bfloat16))
        assert found.dtype == expected.dtype
        if make_rule is not make_gate:
            close(found.float(), expected.float(), atol=0.05)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "opt-pre"])
def test_autocast_gives_what_it_gives_without_a_patch(name: str) -> None:
    model, inputs = CASES[name].make(), CASES[name].inputs()
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model, inputs)
        attach(model, identity)
        found = logits(model, inputs)
    assert found.dtype == expected.dtype
    close(found.float(), expected.float(), atol=0.05)


def test_hidden_states_and_attentions_can_still_be_asked_for() -> None:
    model, inputs = CASES["bert"].make(), CASES["bert"].inputs()
    model.set_attn_implementation("eager")
    expected = model(**inputs, output_hidden_states=True, output_attentions=True)
    attach(model, identity)
    found = model(**inputs, output_hidden_states=True, output_attentions=True)
    for key in ("hidden_states", "attentions"):
        for one, other in zip(found[key], expected[key], strict=True):
            close(one, other)


def test_a_feed_forward_network_in_chunks_is_gated_as_a_whole_one_is() -> None:
    whole, chunked = CASES["bert"].make(), CASES["bert"].make(chunk_size_feed_forward=1)
    for model in (whole, chunked):
        attach(model, make_gate)
    close(logits(chunked, CASES["bert"].inputs()), logits(whole, CASES["bert"].inputs()))


# What is left behind


@pytest.mark.parametrize("name", ALL)
def test_detach_leaves_the_model_as_it_was(name: str) -> None:
    model, inputs = CASES[name].make(), CASES[name].inputs()
    text, keys, before = repr(model), list(model.state_dict()), hooks(model)
    settings = [dict(vars(layer.module)) for layer in read_architecture(model).layers]
    expected = logits(model, inputs)
    attach(model, make_gate)
    assert [key for key in model.state_dict() if base_name(key)] == keys
    assert len(model.state_dict()) > len(keys)
    assert not torch.allclose(logits(model, inputs), expected, atol=1e-2)
    detach(model)
    assert torch.equal(logits(model, inputs), expected)
    assert (repr(model), list(model.state_dict()), hooks(model)) == (text, keys, before)
    assert [dict(vars(layer.module)) for layer in read_architecture(model).layers] == settings


@pytest.mark.parametrize("name", ["opt-pre", "opt-post", "bart"])
def test_detach_gives_functional_dropout_back(name: str) -> None:
    model, inputs = CASES[name].make().train(), CASES[name].inputs()

    def run() -> Tensor:
        torch.manual_seed(1)
        return logits(model, inputs)

    expected = run()
    attach(model, make_gate)
    detach(model)
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("name", ALL)
def test_trainer_decays_no_parameter_of_a_rule(name: str) -> None:
    model = CASES[name].make()
    decayed = Trainer.get_decay_parameter_names(None, model)
    attach(model, make_gate)
    assert Trainer.get_decay_parameter_names(None, model) == decayed


@pytest.mark.parametrize("name", ALL)
def test_the_layout_that_is_watched_has_the_same_layers_and_the_rules_in_them(name: str) -> None:
    model = CASES[name].make()
    groups = read_layout(model)[0].groups
    attach(model, make_gate)
    layout = read_layout(model)[0]
    assert layout.groups == groups
    for info in layout.parameters:
        if not base_name(info.name):
            assert layout.groups[info.group].kind == "layer"


# Which branches get a rule


@pytest.mark.parametrize("name", ["opt-pre", "opt-post", "bart"])
def test_a_branch_without_a_rule_keeps_its_dropout(name: str) -> None:
    model, inputs = CASES[name].make().train(), CASES[name].inputs()

    def run() -> Tensor:
        torch.manual_seed(1)
        return logits(model, inputs)

    expected = run()
    attach(model, lambda branch: Identity() if branch.kind == "mlp" and branch.layer == 0 else None)
    close(run(), expected)
    containers = [key for key, _ in model.named_modules() if key.endswith(CONTAINER)]
    assert len(containers) == len(read_architecture(model).stacks)


def test_a_rule_may_serve_several_branches_and_is_stored_once() -> None:
    inputs = CASES["gpt2"].inputs()
    rules: dict[int, Multiplier] = {}
    shared, each = CASES["gpt2"].make(), CASES["gpt2"].make()
    attach(shared, lambda branch: rules.setdefault(branch.layer, Multiplier(GAIN)))
    attach(each, gain)
    assert sum(not base_name(key) for key in shared.state_dict()) == 2
    assert torch.equal(logits(shared, inputs), logits(each, inputs))
    twin = copy.deepcopy(shared)
    with torch.no_grad():
        for model in (twin, each):
            for key, parameter in model.named_parameters():
                if not base_name(key):
                    parameter.fill_(0.8)
    assert torch.equal(logits(twin, inputs), logits(each, inputs))
    assert not torch.equal(logits(shared, inputs), logits(each, inputs))


def test_parallel_branches_may_have_a_multiplier_each() -> None:
    inputs = CASES["gpt_neox-parallel"].inputs()
    model, reference = CASES["gpt_neox-parallel"].make(), CASES["gpt_neox-parallel"].make()
    attach(model, lambda branch: Multiplier(0.2 if branch.kind == "mlp" else 0.7))
    with torch.no_grad():
        for branch in read_architecture(reference).branches:
            branch.output.module.weight.mul_(0.2 if branch.kind == "mlp" else 0.7)
            branch.output.module.bias.mul_(0.2 if branch.kind == "mlp" else 0.7)
    close(logits(model, inputs), logits(reference, inputs), atol=1e-5)


def test_a_gate_for_the_later_of_parallel_branches_alone_is_refused() -> None:
    model = CASES["gpt_neox-parallel"].make()
    with pytest.raises(ValueError, match=r"mlp of decoder layer 0: MixingGate is a gate.*give the gate for attention"):
        attach(model, lambda branch: make_gate(branch) if branch.kind == "mlp" else None)


class GateWithScale(nn.Module):
    """A gate that calls a parameter what scalings call their method."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scale * x + y


def test_a_gate_may_have_a_parameter_called_scale() -> None:
    """In a post-norm model half of x and y is, for the norm, x and two times y, but for the norm's epsilon."""
    inputs = CASES["bert"].inputs()
    model, reference = CASES["bert"].make(layer_norm_eps=0.0), CASES["bert"].make(layer_norm_eps=0.0)
    attach(model, lambda branch: GateWithScale())
    attach(reference, lambda branch: Multiplier(2.0))
    close(logits(model, inputs), logits(reference, inputs), atol=1e-5)


def test_patching_twice_is_refused() -> None:
    model = CASES["bert"].make()
    attach(model, gain)
    with pytest.raises(ValueError, match="BertForMaskedLM is patched already"):
        attach(model, gain)


def test_taking_away_what_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="BertForMaskedLM is not patched"):
        detach(CASES["bert"].make())


@pytest.mark.parametrize("rule", [nn.Module(), lambda x, y: x + y])
def test_what_is_no_rule_is_refused_and_leaves_the_model_alone(rule: Any) -> None:
    model = CASES["bert"].make()
    before = hooks(model)
    with pytest.raises(TypeError, match=r"mlp of encoder layer 1: .* is no residual rule"):
        attach(model, lambda branch: rule if branch.index == 3 else Identity())
    assert hooks(model) == before


def test_a_residual_that_was_not_seen_is_an_error_that_says_where() -> None:
    model = CASES["gpt2"].make()
    attach(model, make_gate)
    layer = model.transformer.h[1]
    layer.ln_2 = copy.deepcopy(CASES["gpt2"].make().transformer.h[1].ln_2)
    with pytest.raises(RuntimeError, match="mlp of decoder layer 1: the branch ended, but its residual was not seen"):
        logits(model, CASES["gpt2"].inputs())
