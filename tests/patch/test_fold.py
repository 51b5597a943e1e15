"""Folding: the same outputs from a model that stock Transformers makes and loads."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from hf_gradguard.patch import CONTAINER, Anatomy, Branch, Multiplier, Scaling, activation, read_architecture, rescale
from hf_gradguard.patch.applied import ATTRIBUTE
from hf_gradguard.patch.fold import fold_patches
from hf_gradguard.patch.loading import load_patched
from hf_gradguard.patch.model import patch_model, unpatch_model
from hf_gradguard.patch.residual import MultiplierPatch, ResidualPatch, SkipInit, rules
from hf_gradguard.patch.residual.installed import installed
from tests.patch.models import ALL, CASES, logits

POST = ["bart", "bert", "bert-cross", "distilbert", "electra", "opt-post", "roberta"]
PRE = [name for name in ALL if name not in POST]
NORMED = [*POST[:-2], "roberta", "modernbert"]
TOLERANCE = 1e-5

EVERYWHERE = [
    "residual=rezero",
    "residual=rezero:shared=false",
    "skipinit",
    "residual=layerscale:init=0.5",
    "branch_scale",
    "residual=branch_scale:exponent=0.7",
    "unit_rms",
    "activation=relu",
    "residual=layerscale:init=0.5;init=xavier;activation=silu;embedding=unit_rms",
]
FOLDING = [
    *((name, spec) for name in ALL for spec in EVERYWHERE),
    *((name, spec) for name in PRE for spec in ("pre_ln_scaled", "layerscale:init=0.5", "norm=pre")),
    *((name, spec) for name in POST for spec in ("deepnorm", "residual=layerscale:init=0.5;norm=post")),
    *((name, "embedding=norm;skipinit") for name in NORMED if name != "opt-post"),
    *((name, "completep:base_width=4") for name in PRE),
    *((name, "skipinit;attention=logit_scale") for name in ALL if name != "qwen3"),
    *((name, "residual=completep:base_width=4,alpha=0.5") for name in POST if name != "bart"),
]


def patched(name: str, spec: str, *, keep_original: bool = False, **changes: Any) -> Any:
    """A model with random weights, whose patch has random values, too."""
    model = CASES[name].make(**changes)
    patch_model(model, spec, keep_original=keep_original, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for gain in {gain for _, rule in installed(read_architecture(model)) for gain in rule.parameters()}:
            gain.copy_(torch.randn(gain.shape, generator=generator))
    return model


def outputs(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        return logits(model, CASES[name].inputs())


def assert_stock(model: Any) -> None:
    """Nothing in a model differs from one that its class makes of its config."""
    config = copy.deepcopy(model.config)
    assert not {"gradguard", "quantization_config"} & config.to_dict().keys()
    assert ATTRIBUTE not in vars(model)
    stock = type(model)(config)
    assert list(model.state_dict()) == list(stock.state_dict())
    theirs = dict(stock.named_modules())
    for path, module in model.named_modules():
        assert type(module) is type(theirs[path])
        assert not hasattr(module, CONTAINER)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        for setting in ("eps", "variance_epsilon", "dropout"):
            if isinstance(getattr(module, setting, None), float):
                assert getattr(module, setting) == getattr(theirs[path], setting)


@pytest.mark.parametrize(("name", "spec"), FOLDING)
def test_outputs_stay_and_the_model_is_a_stock_one(name: str, spec: str) -> None:
    model = patched(name, spec)
    before = outputs(model, name)
    assert fold_patches(model) is model
    torch.testing.assert_close(outputs(model, name), before, rtol=TOLERANCE, atol=TOLERANCE)
    assert_stock(model)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt-pre", "qwen3", "t5-gated"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_logits_stay_whether_embeddings_are_tied_or_not(name: str, is_tied: bool) -> None:
    model = patched(name, "embedding=unit_rms;residual=skipinit", tie_word_embeddings=is_tied)
    before, head = outputs(model, name), model.get_output_embeddings().weight.detach().clone()
    fold_patches(model)
    torch.testing.assert_close(outputs(model, name), before, rtol=TOLERANCE, atol=TOLERANCE)
    model.tie_weights()
    torch.testing.assert_close(outputs(model, name), before, rtol=TOLERANCE, atol=TOLERANCE)
    if not name.startswith("t5"):  # whose head takes over the factor 1/√d
        assert torch.equal(model.get_output_embeddings().weight, head)


def test_a_head_whose_embeddings_are_not_scaled_stays_tied() -> None:
    model = patched("opt-post", "embedding=unit_rms")
    fold_patches(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings


def test_the_row_of_a_padding_token_stays_zero() -> None:
    model = patched("opt-pre", "embedding=unit_rms", pad_token_id=1)
    row = model.get_input_embeddings().weight[1]
    with torch.no_grad():
        row.zero_()
    fold_patches(model)
    assert not row.any()


@pytest.mark.parametrize("name", POST)
def test_deepnorm_folds_exactly_however_large_epsilon_is(name: str) -> None:
    model = CASES[name].make()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.05
    patch_model(model, "deepnorm", generator=torch.Generator().manual_seed(0))
    before = outputs(model, name)
    fold_patches(model)
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {0.05}
    torch.testing.assert_close(outputs(model, name), before, rtol=TOLERANCE, atol=TOLERANCE)


def test_deepnorm_is_the_papers_form_where_epsilon_is_large() -> None:
    model = patched("opt-post", "deepnorm")
    with torch.no_grad():
        before = model(**CASES["opt-post"].inputs(), output_hidden_states=True).hidden_states
        fold_patches(model)
        after = model(**CASES["opt-post"].inputs(), output_hidden_states=True).hidden_states
    alpha = 4**0.25
    torch.testing.assert_close(after[1], alpha * before[1])
    torch.testing.assert_close(after[-1], before[-1])


@pytest.mark.parametrize("name", ["bert", "distilbert", "electra"])
def test_deepnorm_keeps_hidden_states_where_epsilon_is_small(name: str) -> None:
    model = patched(name, "deepnorm", **({"num_hidden_layers": 40} if name == "bert" else {}))
    with torch.no_grad():
        before = model(**CASES[name].inputs(), output_hidden_states=True).hidden_states
        fold_patches(model)
        after = model(**CASES[name].inputs(), output_hidden_states=True).hidden_states
    for ours, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "spec"), [("gpt2", "layerscale:init=0.5"), ("bert", "residual=rezero")])
def test_a_trained_model_folds(name: str, spec: str) -> None:
    model = patched(name, spec).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for seed in range(3):
        inputs = CASES[name].inputs(seed)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    before = outputs(model, name)
    fold_patches(model)
    torch.testing.assert_close(outputs(model, name), before, rtol=TOLERANCE, atol=TOLERANCE)


def test_kept_weights_are_dropped() -> None:
    model = patched("gpt2", "pre_ln_scaled;activation=relu", keep_original=True)
    before = outputs(model, "gpt2")
    fold_patches(model)
    torch.testing.assert_close(outputs(model, "gpt2"), before, rtol=TOLERANCE, atol=TOLERANCE)
    assert_stock(model)
    patch_model(model, "branch_scale:scale=1")  # and it can be patched again
    unpatch_model(model)
    torch.testing.assert_close(outputs(model, "gpt2"), before, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("gpt2", "pre_ln_scaled;activation=prelu"),
        ("bart", "deepnorm"),
        ("t5-gated", "layerscale:init=0.5;activation=relu"),
    ],
)
def test_a_loaded_model_folds(name: str, spec: str, tmp_path: Path) -> None:
    model = patched(name, spec)
    model.save_pretrained(tmp_path)
    before = outputs(model, name)
    loaded = load_patched(type(model), tmp_path)
    fold_patches(loaded)
    torch.testing.assert_close(outputs(loaded, name), before, rtol=TOLERANCE, atol=TOLERANCE)
    assert_stock(loaded)
    assert getattr(loaded, "hf_quantizer", None) is None


def test_dropout_is_as_before_the_patch_and_training_goes_on() -> None:
    model = patched("opt-pre", "residual=skipinit", dropout=0.3).train()
    fold_patches(model)
    assert {layer.module.dropout for layer in read_architecture(model).layers} == {0.3}
    inputs = CASES["opt-pre"].inputs()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_frozen_weights_stay_frozen() -> None:
    model = CASES["gpt2"].make().requires_grad_(False)
    patch_model(model, "pre_ln_scaled", generator=torch.Generator().manual_seed(0))
    fold_patches(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float64, 1e-12)])
def test_other_dtypes_fold_to_their_own_precision(dtype: torch.dtype, tolerance: float) -> None:
    model = CASES["gpt2"].make().to(dtype)
    patch_model(model, "pre_ln_scaled", generator=torch.Generator().manual_seed(0))
    before = outputs(model, "gpt2")
    fold_patches(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    torch.testing.assert_close(outputs(model, "gpt2"), before, rtol=0, atol=tolerance)


def test_a_model_without_a_head_loads_no_tied_head_later() -> None:
    from transformers import GPT2Model

    model = patch_model(GPT2Model(CASES["gpt2"].config()).eval(), "embedding=unit_rms")
    inputs = CASES["gpt2"].inputs()
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        after = fold_patches(model)(**inputs).last_hidden_state
    torch.testing.assert_close(after, before, rtol=TOLERANCE, atol=TOLERANCE)
    assert not model.config.tie_word_embeddings


# What can't be folded


def assert_refused(model: Any, name: str, *words: str) -> None:
    """Folding raises one error that says all of this, and changes nothing."""
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config, before = model.config.to_dict(), outputs(model, name)
    with pytest.raises(ValueError, match="can't become a stock model") as error:
        fold_patches(model)
    for word in words:
        assert word in str(error.value)
    assert {key: tensor.tolist() for key, tensor in state.items()} == {
        key: tensor.tolist() for key, tensor in model.state_dict().items()
    }
    assert model.config.to_dict() == config
    assert torch.equal(outputs(model, name), before)
    unpatch_model(model)


@pytest.mark.parametrize(
    ("name", "spec", "words"),
    [
        ("gpt2", "gtrxl", ["residual='gru_gate:bias=none': a gate's answer is not linear"]),
        ("gpt2", "sandwich", ["norm='sandwich': where norms act is said by a model's code"]),
        ("bert", "pre_ln_scaled", ["norm='pre'"]),
        ("bert", "rezero", ["norm='none'"]),
        ("opt-pre", "norm=post", ["norm='post'", "do_layer_norm_before"]),
        ("gpt2", "embedding=norm", ["embedding='norm': a norm is not linear in the embeddings"]),
        ("gpt2", "deepnorm", ["norm='post'", "residual='deepnorm': it changes the ε of norms"]),
        ("bert", "lstm_gate;norm=sandwich;activation=relu", ["residual='lstm_gate'", "norm='sandwich'"]),
        ("bart", "residual=completep:base_width=4", ["residual='completep:base_width=4': the output embeddings have"]),
        ("gpt2", "attention=qk_norm;skipinit", ["attention='qk_norm': a norm is not linear in queries and keys"]),
        ("gpt2", "layerscale;embedding=norm;norm=post", ["embedding='norm'", "norm='post'"]),
    ],
)
def test_parts_that_are_no_factors_are_refused_all_at_once(name: str, spec: str, words: list[str]) -> None:
    assert_refused(patched(name, spec), name, *words)


def test_a_rule_of_ones_own_folds_if_it_is_a_multiplier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_policies", dict(rules._policies))

    @rules.register("half")
    @dataclass(frozen=True)
    class Half(MultiplierPatch):
        summary, citation, norm = "x + y ÷ 2", "nobody", "pre"

        def make(self, anatomy: Anatomy) -> Any:
            return lambda branch: Multiplier(0.5, learnable=False) if branch.layer == 0 else None

    model = patched("gpt2", "half")
    before = outputs(model, "gpt2")
    fold_patches(model)
    torch.testing.assert_close(outputs(model, "gpt2"), before, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_rule_of_ones_own_that_changes_more_than_branches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_policies", dict(rules._policies))

    @rules.register("more")
    @dataclass(frozen=True)
    class More(SkipInit):
        def hang(self, anatomy: Anatomy) -> None:
            pass

    assert_refused(patched("gpt2", "more"), "gpt2", "residual='more': it changes more than the branches")


def test_a_rule_of_ones_own_that_names_no_gain_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_policies", dict(rules._policies))

    class Bent(nn.Module):
        def scale(self, y: Tensor) -> Tensor:
            return y.tanh()

    @rules.register("bent")
    @dataclass(frozen=True)
    class BentPatch(ResidualPatch):
        summary: ClassVar[str] = "x + tanh(y)"
        citation: ClassVar[str] = "nobody"
        norm: ClassVar[Any] = "pre"

        def make(self, anatomy: Anatomy) -> Any:
            def rule(branch: Branch) -> Scaling:
                return Bent()

            return rule

    assert_refused(patched("gpt2", "bent"), "gpt2", "what the rule does on the attention of decoder layer 0")


def test_an_activation_that_no_config_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "_FIELDS", ())
    assert_refused(patched("gpt2", "activation=relu"), "gpt2", "activation='relu': no field of GPT2Config")


def test_weights_of_unknown_use_in_a_layer_are_refused_only_where_the_stream_changes() -> None:
    for name, is_refused in (("bart", True), ("bert", False)):
        model = CASES[name].make()
        for layer in read_architecture(model).layers:
            layer.module.adapter = nn.Linear(2, 2)
        patch_model(model, "deepnorm", generator=torch.Generator().manual_seed(0))
        if is_refused:
            assert_refused(model, name, "adapter in the layers of the encoder may read the stream, too")
        else:
            fold_patches(model)


def test_ties_that_would_be_lost_with_the_heads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched("t5", "embedding=unit_rms")
    monkeypatch.setattr(rescale, "TIED", "tie_words")  # a field that T5's config does not set to what it wants
    model.config.tie_words = True
    assert_refused(model, "t5", "embedding='unit_rms': the output embeddings have to be untied", "encoder.embed_tokens")


def test_a_model_that_is_not_patched_is_refused() -> None:
    model = CASES["gpt2"].make()
    with pytest.raises(ValueError, match="this GPT2LMHeadModel is not patched, so there is nothing to fold"):
        fold_patches(model)
    with pytest.raises(ValueError, match="not patched"):
        fold_patches(fold_patches(patch_model(model, "branch_scale")))


def test_a_wrapped_model_is_refused() -> None:
    model = patched("gpt2", "branch_scale")
    with pytest.raises(ValueError, match="is inside a Sequential; fold the model itself"):
        fold_patches(nn.Sequential(model))


def test_a_model_with_adapters_folds_when_they_are_merged() -> None:
    from peft import LoraConfig, get_peft_model

    model = patched("bert", "residual=skipinit")
    adapted = get_peft_model(model, LoraConfig(target_modules=["query", "output.dense"], init_lora_weights=False))
    adapted.eval()
    with pytest.raises(ValueError, match="this BertForMaskedLM has adapters; merge them into it first"):
        fold_patches(adapted)
    before = outputs(adapted, "bert")
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(outputs(fold_patches(merged), "bert"), before, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: model.to("meta"), "has no weights .* is on the meta device"),
        (lambda model: model.to(torch.float8_e4m3fn), "is quantised .* is torch.float8_e4m3fn"),
    ],
)
def test_weights_that_can_not_be_written_are_refused(change: Any, words: str) -> None:
    model = patched("gpt2", "branch_scale")
    change(model)
    with pytest.raises(ValueError, match=words):
        fold_patches(model)


# Without GradGuard

SAVED = {
    "gpt2-tied": ("gpt2", "pre_ln_scaled", {}),
    "gpt2-prelu": ("gpt2", "activation=prelu;embedding=unit_rms", {}),
    "gpt2-untied": ("gpt2", "layerscale:init=0.5", {"tie_word_embeddings": False}),
    "llama-tied": ("llama", "pre_ln_scaled;activation=relu", {"tie_word_embeddings": True}),
    "opt": ("opt-pre", "pre_ln_scaled", {}),
    "opt-projection": ("opt-post", "deepnorm;embedding=unit_rms", {}),
    "t5": ("t5", "pre_ln_scaled", {}),
    "t5-gated": ("t5-gated", "layerscale:init=0.5;activation=silu", {}),
    "neox": ("gpt_neox-parallel", "pre_ln_scaled", {}),
    "modernbert": ("modernbert", "residual=rezero;activation=relu", {}),
    "bert": ("bert", "deepnorm;activation=relu", {}),
    "electra": ("electra", "deepnorm", {"layer_norm_eps": 1e-3}),
    "bart": ("bart", "deepnorm", {}),
    "neox-queries": ("gpt_neox-sequential", "attention=logit_scale", {}),
    "bert-untied": ("bert", "residual=completep:base_width=4", {}),
    "t5-untied": ("t5", "completep:base_width=4", {}),
}
LOADING = """
import json, sys, torch, transformers
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    (name,) = json.load(open(folder + "/config.json"))["architectures"]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    with torch.no_grad():
        torch.save(model(**torch.load(folder + "/inputs.pt")).logits, folder + "/logits.pt")
assert not any(module.startswith("hf_gradguard") for module in sys.modules)
"""


def test_saved_models_load_without_gradguard(tmp_path: Path) -> None:
    expected = {}
    for key, (name, spec, changes) in SAVED.items():
        model = patched(name, spec, **changes)
        expected[key] = outputs(model, name)
        fold_patches(model).save_pretrained(tmp_path / key)
        torch.save(CASES[name].inputs(), tmp_path / key / "inputs.pt")
        assert "gradguard" not in json.dumps(json.loads((tmp_path / key / "config.json").read_text()))
    folders = [str(tmp_path / key) for key in SAVED]
    subprocess.run([sys.executable, "-c", LOADING, *folders], check=True, cwd=tmp_path)
    for key, theirs in expected.items():
        ours = torch.load(tmp_path / key / "logits.pt")
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, msg=key)
