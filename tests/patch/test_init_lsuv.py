from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM

from hf_gradguard.patch import Multiplier, attach, detach, read_architecture
from hf_gradguard.patch.init import LSUV, inits
from hf_gradguard.patch.init.initialisation import sites
from tests.patch.models import ALL, CASES, logits


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def branch_stds(model, batch):
    """The standard deviation of what each branch gives to the addition, in evaluation mode."""
    found, handles = [], []
    was_training = model.training
    for branch in read_architecture(model).branches:

        def see(module, args, output):
            found.append((output[0] if isinstance(output, tuple) else output).detach().double().std(correction=0))

        handles.append(branch.end.register_forward_hook(see, prepend=True))
    model.eval()
    model(**batch)
    model.train(was_training)
    for handle in handles:
        handle.remove()
    return torch.stack(found)


@pytest.mark.parametrize("name", ALL)
def test_every_branch_has_unit_variance_and_is_a_multiple_of_orthogonal(name):
    case = CASES[name]
    model = case.make()
    batch = case.inputs()
    assert (branch_stds(model, batch) - 1).abs().max() > 0.2

    anatomy = read_architecture(model)
    LSUV().apply(anatomy, batch=batch, generator=seeded())

    stds = branch_stds(model, batch)
    assert len(stds) == len(anatomy.branches)
    assert (stds - 1).abs().max() < 1e-4
    assert logits(model, batch).isfinite().all()
    for site in sites(anatomy):
        weight = site.part.read().double()
        short = weight if weight.shape[0] <= weight.shape[1] else weight.T
        square = short @ short.T
        scale = square.diagonal().mean() if site.role == "output" else 1.0
        assert torch.allclose(square / scale, torch.eye(len(short), dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "bart", "gpt_neox-parallel"])
def test_one_pass_does_what_the_papers_loop_does_branch_by_branch(name):
    case = CASES[name]
    batch = case.inputs()
    model, slow = case.make(), case.make()
    LSUV().apply(read_architecture(model), batch=batch, generator=seeded())

    inits.parse("orthogonal").apply(read_architecture(slow), generator=seeded())
    for index, branch in enumerate(read_architecture(slow).branches):
        std = branch_stds(slow, batch)[index].float()
        with torch.no_grad():
            branch.output.module.weight.div_(std)

    for ours, theirs in zip(model.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "opt-post", "bart", "t5"])
def test_modes_gradients_buffers_hooks_and_random_state_are_restored(name):
    case = CASES[name]
    model = case.make().train()
    next(iter(model.children())).eval()
    frozen = next(model.parameters()).requires_grad_(False)
    logits(model, case.inputs()).sum().backward()
    modes = [module.training for module in model.modules()]
    gradients = {path: None if p.grad is None else p.grad.clone() for path, p in model.named_parameters()}
    buffers = {path: (id(buffer), buffer.clone()) for path, buffer in model.named_buffers()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()

    LSUV().apply(read_architecture(model), batch=case.inputs(), generator=seeded())

    assert [module.training for module in model.modules()] == modes
    assert not frozen.requires_grad
    for path, parameter in model.named_parameters():
        old = gradients[path]
        assert parameter.grad is None if old is None else torch.equal(parameter.grad, old)
    assert all(
        (id(b), True) == (buffers[path][0], torch.equal(b, buffers[path][1])) for path, b in model.named_buffers()
    )
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


class Counting(nn.Module):
    """Counts its calls in a buffer, replaces another, and draws a random number."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last = torch.rand(())
        return x


def test_a_module_that_counts_its_calls_ends_as_it_began():
    model = CASES["bert"].make()
    counting = model.bert.encoder.layer[0].output.dropout = Counting()
    before = counting.last
    state = torch.get_rng_state()
    LSUV().apply(read_architecture(model), batch=CASES["bert"].inputs(), generator=seeded())
    assert counting.calls == 0
    assert counting.last is before
    assert counting.last == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_the_dropout_of_a_training_model_does_not_count():
    case = CASES["gpt2"]
    weights = []
    for is_training in (False, True):
        model = case.make(resid_pdrop=0.5).train(is_training)
        LSUV().apply(read_architecture(model), batch=case.inputs(), generator=seeded())
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("name", ["bert", "gpt_neox-parallel", "bart"])
def test_the_branch_is_measured_before_a_residual_rule(name):
    case = CASES[name]
    model = case.make()
    attach(model, lambda branch: Multiplier(0.0))
    LSUV().apply(read_architecture(model), batch=case.inputs(), generator=seeded())
    assert (branch_stds(model, case.inputs()) - 1).abs().max() < 1e-4
    detach(model)


def test_a_bfloat16_model_comes_as_near_as_its_numbers_allow():
    case = CASES["gpt2"]
    model = case.make().to(torch.bfloat16)
    LSUV().apply(read_architecture(model), batch=case.inputs(), generator=seeded())
    assert (branch_stds(model, case.inputs()) - 1).abs().max() < 0.01


def test_without_a_batch_it_says_that_it_needs_one_and_changes_nothing():
    model = CASES["bert"].make()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"LSUV measures the model on a batch and got none.*batch="):
        LSUV().apply(read_architecture(model))
    with pytest.raises(TypeError, match="batch is a Tensor; give what the model's forward takes, by name"):
        LSUV().apply(read_architecture(model), batch=CASES["bert"].inputs()["input_ids"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_a_batch_that_does_not_reach_a_branch_is_refused_and_the_model_is_left_in_its_mode():
    model = CASES["gpt2-cross"].make().train()
    batch = {"input_ids": CASES["gpt2-cross"].inputs()["input_ids"]}
    with pytest.raises(ValueError, match=r"cross_attention of decoder layer 0 took no part.*encoder_hidden_states"):
        LSUV().apply(read_architecture(model), batch=batch)
    assert all(module.training for module in model.modules())


def test_a_branch_without_variance_is_refused_and_no_hook_is_left():
    model = CASES["bert"].make()
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = nn.Threshold(1e9, 0.0)  # zeros whatever it gets
    anatomy = read_architecture(model)
    with pytest.raises(ValueError, match="mlp of encoder layer 1 has standard deviation 0"):
        LSUV().apply(anatomy, batch=CASES["bert"].inputs())
    assert not any(module._forward_hooks for module in model.modules())


def test_rounding_does_not_grow_with_depth():
    # With the outputs divided and not the weights, the two passes drift apart: by 4e-5 here, by 0.03 in 1000 layers.
    torch.manual_seed(0)
    config = CASES["bert"].config(num_hidden_layers=300, hidden_size=32, intermediate_size=128)
    model = BertForMaskedLM(config)
    batch = {"input_ids": torch.randint(3, 64, (4, 32), generator=seeded(1))}
    LSUV(tolerance=5e-6).apply(read_architecture(model), batch=batch, generator=seeded())


def test_a_norm_behind_the_output_projection_is_found_out():
    model = CASES["bert"].make()
    norm = nn.LayerNorm(16)
    nn.init.constant_(norm.weight, 3.0)
    model.bert.encoder.layer[1].output.dropout = norm
    with pytest.raises(ValueError, match="mlp of encoder layer 1 has standard deviation 3 after it was divided, not 1"):
        LSUV().apply(read_architecture(model), batch=CASES["bert"].inputs())
