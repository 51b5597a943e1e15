"""Parameter groups: what is decayed, what is scaled, and that no optimizer forgets it."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import SGD, Adafactor, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import BertConfig, BertForSequenceClassification, GPT2LMHeadModel, Trainer, TrainerCallback

from hf_gradguard import GradGuard, GradGuardCallback, param_groups
from hf_gradguard.integrations import optimizer_check
from hf_gradguard.patch import CONTAINER, Multiplier
from hf_gradguard.patch.config import PatchConfig
from hf_gradguard.patch.model import patch_model, unpatch_model
from hf_gradguard.patch.presets import PRESETS
from hf_gradguard.patch.residual import Factors, Place, ResidualPatch, rules
from tests.models import make
from tests.patch.models import ALL, CASES, gradients, logits
from tests.training import arguments, assert_bit_equal, trainer, weights

SCALED = "residual=completep:base_depth=4,alpha=0.5,base_width=4"
LINE = r"Trainer\(…, optimizers=\(AdamW\(param_groups\(model, lr=0.01, weight_decay=0.1\)\), None\)\)"


def patched(name: str = "gpt2", patch: str = SCALED, **changes: Any) -> Any:
    return patch_model(CASES[name].make(**changes), patch)


def options(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each parameter gets."""
    own = {id(p): {k: v for k, v in group.items() if k != "params"} for group in groups for p in group["params"]}
    return {name: own[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def one_step(model: Any, optimizer: Any, name: str = "gpt2") -> None:
    gradients(model, CASES[name].inputs())
    optimizer.step()


# What is decayed, and that nothing is forgotten


@pytest.mark.parametrize("name", ALL)
def test_weights_are_decayed_as_by_the_trainer_in_a_patched_model_too(name: str, tmp_path: Path) -> None:
    for patch in (None, "residual=layerscale;norm=sandwich;embedding=norm", "residual=output_gate"):
        model = CASES[name].make()
        if patch is not None:
            patch_model(model, patch)
        stock = Trainer(model, arguments(tmp_path, weight_decay=0.1)).create_optimizer()
        expected = [{id(p) for p in group["params"]} for group in stock.param_groups]
        groups = param_groups(model, weight_decay=0.1)
        assert [(group["name"], group["weight_decay"]) for group in groups] == [("decayed", 0.1), ("not decayed", 0.0)]
        assert [{id(p) for p in group["params"]} for group in groups] == expected
        own = [group["weight_decay"] for key, group in options(model, groups).items() if CONTAINER in key]
        assert not any(own)


@pytest.mark.parametrize("name", ALL)
def test_each_trainable_parameter_is_in_one_group(name: str) -> None:
    for patch in ("residual=gru_gate:relu=false", SCALED, "residual=completep;norm=sandwich;embedding=norm"):
        if name == "gpt_neox-parallel" and patch != SCALED:
            continue
        model = patched(name, patch)
        for number, parameter in enumerate(model.parameters()):
            parameter.requires_grad = number % 3 != 1
        found = [id(p) for group in param_groups(model, lr=0.1) for p in group["params"]]
        assert len(found) == len(set(found))
        assert set(found) == {id(p) for p in model.parameters() if p.requires_grad}


def test_modules_of_any_kind_have_groups() -> None:
    tied = nn.ModuleDict({"one": nn.Linear(3, 3), "other": nn.Linear(3, 3), "layernorm_of_mine": nn.Linear(3, 3)})
    tied["other"].weight = tied["one"].weight
    found = options(tied, param_groups(tied, lr=0.5, weight_decay=0.2, eps=1e-5))
    assert {name for name, group in found.items() if group["weight_decay"]} == {"one.weight"}
    assert all(group["lr"] == 0.5 and group["eps"] == 1e-5 for group in found.values())


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW, Adafactor])
def test_any_optimizer_takes_them(kind: Any) -> None:
    scaled = [] if kind is Adafactor else [patched()]  # whose epsilon is not one number
    for model in (CASES["gpt2"].make(), patched("gpt2", "residual=rezero;norm=sandwich"), *scaled):
        optimizer = kind(param_groups(model, lr=1e-3, weight_decay=0.1))
        before = weights(model)
        one_step(model, optimizer)
        assert not torch.equal(before["lm_head.weight"], model.lm_head.weight)
        copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())


def test_what_is_not_given_is_left_to_the_optimizer() -> None:
    optimizer = AdamW(param_groups(CASES["gpt2"].make()), lr=0.25, eps=0.5, weight_decay=0.75)
    assert {(group["lr"], group["eps"]) for group in optimizer.param_groups} == {(0.25, 0.5)}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]


# What is scaled


def test_completep_scales_as_table_1_of_the_paper_says() -> None:
    """Two layers where the base has four, width 16 where it has 4; worked out by hand."""
    deep, wide = 0.5, 4.0
    found = options(model := patched("bert"), param_groups(model, lr=0.1, weight_decay=0.3, eps=1e-3))
    layer, head = "bert.encoder.layer.1.", "cls.predictions."
    inside, outside = 1e-3 / wide * deep**-0.5, 1e-3 / wide
    for name, lr, eps, weight_decay in (
        (f"{layer}attention.self.query.weight", 0.1 / wide * deep**-0.5, inside, 0.3 * wide),
        (f"{layer}output.dense.weight", 0.1 / wide * deep**-0.5, inside, 0.3 * wide),
        (f"{layer}attention.self.query.bias", 0.1 * deep**-0.5, inside, 0.0),
        (f"{layer}output.LayerNorm.weight", 0.1 * deep**-0.5, inside, 0.0),
        ("bert.embeddings.word_embeddings.weight", 0.1, outside, 0.3),
        ("bert.embeddings.LayerNorm.weight", 0.1, outside, 0.0),
        (f"{head}bias", 0.1, outside, 0.0),
        (f"{head}transform.dense.weight", 0.1 / wide, outside, 0.3 * wide),
        (f"{head}transform.dense.bias", 0.1, outside, 0.0),
    ):
        got = tuple(found[name][key] for key in ("lr", "eps", "weight_decay"))
        assert got == pytest.approx((lr, eps, weight_decay), rel=1e-12), name


def test_alpha_one_scales_only_epsilon_by_depth() -> None:
    model = patched("gpt2", "residual=completep", n_layer=5)
    found = options(model, param_groups(model, lr=0.1, weight_decay=0.3))
    assert {group["lr"] for group in found.values()} == {0.1}
    assert {group["eps"] for name, group in found.items() if ".h." in name} == {1e-8 / 5}
    assert {group["eps"] for name, group in found.items() if ".h." not in name} == {1e-8}
    assert {group["weight_decay"] for group in found.values()} == {0.0, 0.3}


def test_each_stack_has_its_own_depth() -> None:
    model = patched("bart", "residual=completep:base_depth=3,alpha=0.5", encoder_layers=12, decoder_layers=1)
    found = options(model, param_groups(model, lr=0.1))
    rate = {stack: found[f"model.{stack}.layers.0.fc1.weight"]["lr"] for stack in ("encoder", "decoder")}
    assert rate == {"encoder": pytest.approx(0.1 / 2), "decoder": pytest.approx(0.1 * 3**0.5)}


def test_what_lies_in_a_layer_and_acts_outside_of_it_is_scaled_as_outside() -> None:
    model = patched("opt-post", "residual=completep:base_depth=4,alpha=0.5;norm=pre;embedding=norm")
    found = options(model, param_groups(model, lr=0.1))
    own = {key: group["lr"] for key, group in found.items() if CONTAINER in key}
    assert {key.split(".")[-3]: rate for key, rate in own.items()} == {"final": 0.1, "embedding": 0.1}
    assert found["model.decoder.layers.0.final_layer_norm.weight"]["lr"] == pytest.approx(0.1 * 2**0.5)


def test_t5s_relative_positions_are_no_matrix_of_the_width() -> None:
    model = patched("t5")
    found = options(model, param_groups(model, lr=0.1, weight_decay=0.3))
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert found[name]["lr"] == pytest.approx(0.1 * 2**0.5)


def test_the_first_group_has_the_rate_that_was_given_so_that_trainer_logs_it() -> None:
    for name in ALL:
        groups = param_groups(patched(name), lr=0.1, weight_decay=0.3)
        assert groups[0]["lr"] == 0.1
        assert len({group["name"] for group in groups}) == len(groups)


def test_a_rate_has_to_be_given_where_it_is_scaled() -> None:
    with pytest.raises(ValueError, match=r"base_width=4' scales .* AdamW\(param_groups\(model, lr=1e-3"):
        param_groups(patched(), weight_decay=0.1)


def test_an_update_is_adams_with_the_scaled_options() -> None:
    """The first step of Adam is lr · g / (|g| + ε), after weights × (1 − lr · weight decay)."""
    model = patched().double()
    found = options(model, groups := param_groups(model, lr=1e-2, weight_decay=0.3, eps=1e-4))
    before = weights(model)
    found_gradients = gradients(model, CASES["gpt2"].inputs())
    AdamW(groups).step()
    for name, parameter in model.named_parameters():
        lr, eps, decay = (found[name][key] for key in ("lr", "eps", "weight_decay"))
        g = found_gradients[name]
        expected = before[name] * (1 - lr * decay) - lr * g / (g.abs() + eps)
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-12, rtol=1e-9)


def test_a_rule_of_ones_own_that_scales_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_policies", dict(rules._policies))

    @rules.register("slow")
    @dataclasses.dataclass(frozen=True)
    class Slow(ResidualPatch):
        summary, citation, norm = "x + y, slowly", "nobody", "pre"

        def make(self, anatomy: Any) -> Any:
            return lambda branch: Multiplier(1.0, learnable=False)

        def optimizer_scaling(self, anatomy: Any) -> Any:
            return lambda place: Factors(lr=0.5 if place == Place(2, True) else 1.0)

    model = patched("gpt2", "residual=slow")
    found = options(model, param_groups(model, lr=0.1))
    assert {name for name, group in found.items() if group["lr"] == 0.05} == {
        name for name, p in model.named_parameters() if ".h." in name and p.ndim == 2
    }
    with pytest.raises(ValueError, match="residual='slow' scales"):
        one_step(model, AdamW(model.parameters()))


def movement(model: Any, groups: list[dict[str, Any]]) -> float:
    """How far the logits are after six steps from where they were, root mean square."""
    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    before = model(ids).logits.detach()
    optimizer = AdamW(groups)
    for _ in range(6):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (model(ids).logits.detach() - before).square().mean().sqrt().item()


def moved(patch: str | None, depth: int, width: int) -> float:
    torch.manual_seed(0)
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "n_head": width // 16}
    model = GPT2LMHeadModel(CASES["gpt2"].config(n_layer=depth, n_embd=width, **options))
    if patch is not None:
        patch_model(model, patch)
    return movement(model, param_groups(model, lr=3e-3))


def test_a_deeper_and_a_wider_model_learn_as_fast_as_the_small_one() -> None:
    """What the whole is for: with the same rate, logits of random weights move as far in the first steps."""
    patch = "completep:base_depth=2,base_width=64"
    base = moved(patch, depth=2, width=64)
    for depth, width in ((16, 64), (2, 256)):
        assert moved(patch, depth, width) == pytest.approx(base, rel=0.2)
    assert moved(None, depth=2, width=256) > 2 * moved(None, depth=2, width=64)


# base_width


@pytest.mark.parametrize("name", ALL)
def test_with_a_base_width_logits_are_divided_but_not_their_bias(name: str) -> None:
    inputs = CASES[name].inputs()
    plain = patched(name, "residual=completep")
    bias = getattr(plain.get_output_embeddings(), "bias", None)
    bias = 0.0 if bias is None else bias.detach()
    expected = (logits(plain, inputs) - bias) / 4 + bias
    model = patched(name, "residual=completep:base_width=4")
    torch.testing.assert_close(logits(model, inputs), expected)
    torch.testing.assert_close(logits(copy.deepcopy(model), inputs), expected)
    torch.testing.assert_close(logits(pickle.loads(pickle.dumps(model)), inputs), expected)
    assert torch.equal(logits(unpatch_model(model), inputs), logits(CASES[name].make(), inputs))


def test_a_new_head_of_another_size_is_divided_too() -> None:
    inputs = CASES["bert"].inputs()
    model, other = patched("bert", "residual=completep:base_width=4"), patched("bert", "residual=completep")
    for each in (model, other):
        torch.manual_seed(0)
        each.resize_token_embeddings(80)
    assert logits(model, inputs).shape[-1] == 80
    bias = model.get_output_embeddings().bias.detach()
    torch.testing.assert_close((logits(model, inputs) - bias) * 4 + bias, logits(other, inputs))


def test_a_base_width_survives_compiling() -> None:
    inputs = CASES["gpt2"].inputs()
    model = patched()
    torch.testing.assert_close(
        logits(torch.compile(model, backend="eager", fullgraph=True), inputs), logits(model, inputs)
    )


def test_a_base_width_is_refused_where_there_are_no_logits_to_divide() -> None:
    config = BertConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=16)
    model = BertForSequenceClassification(config)
    with pytest.raises(ValueError, match="BertForSequenceClassification has none; leave base_width out"):
        patch_model(model, "residual=completep:base_width=4")
    patch_model(model, "residual=completep")


def test_the_preset_tells_the_initialisation_of_the_base_width(caplog: pytest.LogCaptureFixture) -> None:
    config = PatchConfig.parse("completep:base_width=4,base_depth=2")
    assert config.residual == "completep:base_width=4,base_depth=2"
    assert config.init == "normal:base_width=4"
    patch_model(CASES["opt-pre"].make(), config)
    assert not caplog.records
    patch_model(CASES["opt-pre"].make(), "completep;residual=completep:base_width=4")
    assert "models of different width" in caplog.text
    assert PRESETS["completep"].parts("base_depth=2")["init"] == "normal"


# No optimizer without it


@pytest.mark.parametrize("kind", [SGD, AdamW, Adafactor])
def test_an_optimizer_without_scaled_groups_is_refused_before_its_first_update(kind: Any) -> None:
    model = patched()
    before = weights(model)
    optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.1)
    with pytest.raises(ValueError, match=LINE.replace("AdamW", kind.__name__)):
        one_step(model, optimizer)
    assert_bit_equal(weights(model), before)


def test_groups_for_another_patch_are_refused() -> None:
    model = patched(patch="residual=completep")
    optimizer = AdamW(param_groups(model, lr=0.1))
    patch_model(unpatch_model(model), "residual=completep:base_depth=2")
    with pytest.raises(ValueError, match=r"base_depth=2,.* scales .* was made for residual='completep:base_depth=1,"):
        one_step(model, optimizer)
    patch_model(unpatch_model(model), "residual=completep:base_depth=1")  # the same in other words
    one_step(model, optimizer)


def test_groups_made_before_patching_are_refused() -> None:
    model = CASES["gpt2"].make()
    optimizer = AdamW(param_groups(model, lr=0.1))
    patch_model(model, SCALED)
    with pytest.raises(ValueError, match="was made without that"):
        one_step(model, optimizer)


def test_only_the_models_own_optimizers_are_looked_at() -> None:
    model, other = patched(), CASES["gpt2"].make()
    one_step(other, AdamW(other.parameters()))
    one_step(patched(patch="residual=rezero"), AdamW(other.parameters()))
    optimizer = AdamW([*param_groups(model, lr=0.1), {"params": [nn.Parameter(torch.zeros(3))]}])
    for _ in range(3):
        one_step(model, optimizer)
    with pytest.raises(ValueError, match="param_groups"):
        one_step(model, AdamW(model.parameters()))
    unpatch_model(model)
    one_step(model, AdamW(model.parameters()))


def test_models_are_let_go_and_with_them_the_check() -> None:
    gc.collect()
    before = len(optimizer_check._CHECKS)
    model = patched()
    assert len(optimizer_check._CHECKS) == before + 1
    watched = weakref.ref(model)
    one_step(model, AdamW(param_groups(model, lr=0.1)))
    del model
    assert watched() is None or gc.collect() >= 0
    assert watched() is None
    assert len(optimizer_check._CHECKS) == before


def by_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), by_torch_save])
def test_a_copy_of_the_model_is_checked_for_itself(copied: Any) -> None:
    model = patched()
    twin = copied(model)
    assert torch.equal(logits(twin, CASES["gpt2"].inputs()), logits(model, CASES["gpt2"].inputs()))
    one_step(model, AdamW(param_groups(model, lr=0.1)))
    del model
    gc.collect()
    with pytest.raises(ValueError, match="param_groups"):
        one_step(twin, AdamW(twin.parameters()))
    one_step(twin, AdamW(param_groups(twin, lr=0.1)))


def test_accelerates_wrapper_is_seen_through() -> None:
    accelerator = Accelerator(cpu=True)
    model = patched()
    wrapped = accelerator.prepare(AdamW(model.parameters(), lr=0.01, weight_decay=0.1))
    with pytest.raises(ValueError, match=LINE):
        one_step(model, wrapped)
    with pytest.raises(ValueError, match=LINE):
        GradGuard(model, wrapped, {"record": False})
    one_step(model, right := accelerator.prepare(AdamW(param_groups(model, lr=0.01))))
    GradGuard(model, right, {"record": False}).close()


def test_a_schedule_keeps_the_ratios() -> None:
    model = patched()
    optimizer = AdamW(param_groups(model, lr=0.1))
    given = [group["lr"] for group in optimizer.param_groups]
    schedule = LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for step in range(3):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr / (step + 1) for lr in given])
        one_step(model, optimizer)
        schedule.step()


def test_a_compiled_step_is_looked_at_too() -> None:
    model = patched()
    for optimizer, is_right in ((AdamW(model.parameters()), False), (AdamW(param_groups(model, lr=0.1)), True)):
        gradients(model, CASES["gpt2"].inputs())
        step = torch.compile(optimizer.step, backend="eager")
        if is_right:
            step()
        else:
            with pytest.raises(ValueError, match="param_groups"):
                step()


# Under the Trainer


def scaled_model() -> Any:
    return patch_model(make("gpt2"), "completep:base_depth=1,alpha=0.5,base_width=8")


@pytest.mark.parametrize("is_guarded", [False, True])
def test_the_trainers_own_optimizer_is_refused_before_the_first_update(is_guarded: bool, tmp_path: Path) -> None:
    model = scaled_model()
    before = weights(model)
    run = trainer(model, tmp_path, *([GradGuardCallback()] if is_guarded else []), weight_decay=0.1, learning_rate=0.01)
    with pytest.raises(ValueError, match=LINE):
        run.train()
    assert_bit_equal(weights(model), before)


def test_a_wrong_optimizer_is_refused_before_training_by_the_callback(tmp_path: Path) -> None:
    model = scaled_model()
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    run = trainer(model, tmp_path, GradGuardCallback(), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=LINE):
        run.train()
    assert not (tmp_path / "gradguard").exists()


@pytest.mark.parametrize("patch", ["rezero", "gtrxl", "sandwich", "residual=layerscale;activation=relu"])
def test_an_optimizer_that_was_made_before_the_patch_is_refused(patch: str, tmp_path: Path) -> None:
    model = make("gpt2")
    optimizer = AdamW(model.parameters(), lr=0.01)
    patch_model(model, patch)
    message = rf"does not train .*{CONTAINER}.* made before patch_model was called. Make it afterwards"
    with pytest.raises(ValueError, match=message):
        trainer(model, tmp_path, GradGuardCallback(), optimizers=(optimizer, None)).train()
    with pytest.raises(ValueError, match=message):
        GradGuard(model, optimizer, output_dir=tmp_path)
    for name, parameter in model.named_parameters():
        if CONTAINER in name:
            parameter.requires_grad_(False)
    GradGuard(model, optimizer, output_dir=tmp_path).close()


def test_optimizers_that_know_the_patch_or_leave_out_more_than_it_are_taken(tmp_path: Path) -> None:
    model = patch_model(make("gpt2"), "gtrxl")
    for parameters in (model.parameters(), model.transformer.wte.parameters(), [nn.Parameter(torch.zeros(2))]):
        GradGuard(model, AdamW(parameters), output_dir=tmp_path).close()
    early = trainer(plain := make("gpt2"), tmp_path, GradGuardCallback(), max_steps=1)
    patch_model(plain, "residual=layerscale")  # before the Trainer has made its optimizer
    before = weights(plain)
    early.train()
    changed = {name for name, value in weights(plain).items() if not torch.equal(value, before[name])}
    assert any(CONTAINER in name for name in changed)


class Scaling(Trainer):
    """What to do where `optimizers` can't be given."""

    def create_optimizer(self, model: Any = None) -> Any:
        groups = param_groups(self.model if model is None else model, lr=self.args.learning_rate, weight_decay=0.1)
        self.optimizer = AdamW(groups)
        return self.optimizer


def test_an_overridden_create_optimizer_trains_as_a_given_optimizer(tmp_path: Path) -> None:
    own = trainer(scaled_model(), tmp_path / "own", GradGuardCallback(), kind=Scaling)
    own.train()
    model = scaled_model()
    given = (AdamW(param_groups(model, lr=0.01, weight_decay=0.1)), None)
    trainer(model, tmp_path / "given", optimizers=given).train()
    assert_bit_equal(weights(own.model), weights(model))


class Rates(TrainerCallback):
    """The rate of each group before each update."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append({group["name"]: group["lr"] for group in kwargs["optimizer"].param_groups})


@pytest.mark.parametrize("schedule", ["linear", "cosine_with_restarts", "constant_with_warmup"])
def test_the_trainers_schedules_keep_the_ratios(schedule: str, tmp_path: Path) -> None:
    model, rates = scaled_model(), Rates()
    groups = param_groups(model, lr=0.01, weight_decay=0.1)
    given = {group["name"]: group["lr"] for group in groups}
    run = trainer(
        model,
        tmp_path,
        rates,
        GradGuardCallback(),
        optimizers=(AdamW(groups), None),
        lr_scheduler_type=schedule,
        warmup_steps=2,
    )
    run.train()
    assert len(set(given.values())) == 3
    assert len(rates.seen) == 6
    for seen in rates.seen[1:]:
        assert {name: lr / seen["embeddings and output, decayed"] for name, lr in seen.items()} == pytest.approx(
            {name: lr / 0.01 for name, lr in given.items()}
        )
    logged = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert logged[1] == rates.seen[1]["embeddings and output, decayed"]


def test_a_run_resumed_from_a_checkpoint_ends_as_one_that_was_not_interrupted(tmp_path: Path) -> None:
    def run_of(**options: Any) -> tuple[Any, Rates]:
        model, rates = scaled_model(), Rates()
        run = trainer(
            model,
            tmp_path,
            rates,
            optimizers=(AdamW(param_groups(model, lr=0.01, weight_decay=0.1)), None),
            save_strategy="steps",
            save_steps=3,
            **options,
        )
        return run, rates

    whole, rates = run_of()
    whole.train()
    rest, rates_of_rest = run_of()
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_bit_equal(weights(rest.model), weights(whole.model))
    assert rates_of_rest.seen == rates.seen[3:]
    assert {group["scaled_for"] for group in rest.optimizer.param_groups} == {
        "completep:base_depth=1,alpha=0.5,base_width=8"
    }


def test_a_checkpoint_of_an_optimizer_that_was_not_scaled_is_refused(tmp_path: Path) -> None:
    model = scaled_model()
    right = AdamW(param_groups(model, lr=0.01))
    wrong = [{key: value for key, value in group.items() if key != "scaled_for"} for group in right.param_groups]
    right.load_state_dict(AdamW(wrong).state_dict())
    with pytest.raises(ValueError, match="was made without that"):
        right.step()
