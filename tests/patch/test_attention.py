"""Attention patches: what they compute, in every architecture, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.modernbert import modeling_modernbert
from transformers.models.qwen2 import modeling_qwen2

from hf_gradguard.patch import CONTAINER, read_architecture
from hf_gradguard.patch.attention import attentions
from hf_gradguard.patch.fold import fold_patches
from hf_gradguard.patch.model import patch_model, unpatch_model
from tests.patch.models import ALL, CASES, GENERATIVE, check_generation, gradients, logits
from tests.patch.test_taps import close, close_gradients, hooks

NORMED = "qwen3"  # which has norms of its own
OTHERS = [name for name in ALL if name != NORMED]
ROTARY = {
    "gpt_neox-parallel": modeling_gpt_neox,
    "gpt_neox-sequential": modeling_gpt_neox,
    "llama": modeling_llama,
    "mistral": modeling_mistral,
    "modernbert": modeling_modernbert,
    "qwen2": modeling_qwen2,
}
SPECS = ["qk_norm", "qk_norm:kind=layer,eps=0.1", "logit_scale", "logit_scale:factor=3"]
CROSS = ("cross", "encoder_attn", "EncDecAttention")
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}

Weights = dict[tuple[str, str], Tensor]
"""The weight of each norm, by its attention module and `query` or `key`."""


def patched(name: str, spec: str, **changes: Any) -> Any:
    """A model with an attention patch whose parameters are random."""
    model = patch_model(CASES[name].make(**changes), f"attention={spec}")
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        if CONTAINER in key:
            with torch.no_grad():
                parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def weights_of(model: Any) -> Weights:
    """The norms' weights, in the order in which attention runs in each stack."""
    found = {}
    for key, parameter in model.named_parameters():
        if CONTAINER in key:
            layer, _, rest = key.partition(f".{CONTAINER}.")
            kind, role = rest.split(".")[0].rsplit("_", 1)
            found[f"{layer}.{kind}", role] = parameter.detach().double()
    return found


def normalised(x: Tensor, weight: Tensor, spec: str) -> Tensor:
    """The formula, for [..., d]."""
    if "kind=layer" in spec:
        x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 0.1) * weight
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * weight


class Plain:
    """An attention function for Transformers, and a rotation of positions, that have a patch written out."""

    def __init__(self, model: Any, spec: str, weights: Weights, is_rotary: bool) -> None:
        self.spec = spec
        self.is_rotary = is_rotary
        self.weights = weights
        self.calls = iter(dict.fromkeys(key for key, _ in weights))
        self.names = {id(module): name for name, module in model.named_modules()}
        self.layers = {name: f"{name}." for name in {key.rpartition(".")[0] for key, _ in weights}}

    def place(self, module: nn.Module) -> str:
        name = self.names[id(module)]
        layer = next(layer for layer, start in self.layers.items() if name.startswith(start))
        return f"{layer}.{'cross_attention' if any(word in name for word in CROSS) else 'attention'}"

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Of [batch, heads, length, d]; without dropout."""
        d = q.shape[-1]
        if self.spec.startswith("qk_norm") and not self.is_rotary:
            own = module.scaling if scaling == 1 else 1.0  # OPT's queries come divided already
            place = self.place(module)
            q = normalised(q / own, self.weights[place, "query"], self.spec) * own
            k = normalised(k, self.weights[place, "key"], self.spec)
        if self.spec.startswith("logit_scale"):
            scaling *= 3 if "factor=3" in self.spec else d**-0.5
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * scaling
        bias = kwargs.get("position_bias")
        scores = scores if bias is None else scores + bias
        scores = scores if mask is None else scores + mask
        return torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v).contiguous(), None

    def rotated(self, rotate: Callable[..., Any]) -> Callable[..., Any]:
        """The rotation of a model, after the norms."""

        def of_norms(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
            place = next(self.calls)
            q, k = (normalised(x, self.weights[place, r], self.spec) for x, r in ((q, "query"), (k, "key")))
            return rotate(q, k, *args, **kwargs)

        return of_norms


def written_out(name: str, spec: str, weights: Weights, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """The model without the patch, in float64, with attention that has it written out."""
    model = CASES[name].make(**changes).double()
    plain = Plain(model, spec, weights, name in ROTARY)
    if name in ROTARY and weights:
        rotate = ROTARY[name].apply_rotary_pos_emb
        monkeypatch.setattr(ROTARY[name], "apply_rotary_pos_emb", plain.rotated(rotate))
    AttentionInterface.register("written_out", plain.attend)
    AttentionMaskInterface.register("written_out", eager_mask)
    model.set_attn_implementation("written_out")
    return model


# What is computed


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", OTHERS)
def test_logits_are_those_of_attention_written_out(name: str, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched(name, spec).double()
    inputs = CASES[name].inputs(dtype=torch.float64)
    found = logits(model, inputs)
    assert not torch.allclose(found, logits(CASES[name].make().double(), inputs), atol=1e-3)
    reference = written_out(name, spec, weights_of(model), monkeypatch)
    torch.testing.assert_close(found, logits(reference, inputs), atol=3e-6, rtol=0)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", GROUPED),
        ("t5", {"d_kv": 6, "num_heads": 4}),
        ("bart", {"encoder_attention_heads": 4, "decoder_attention_heads": 8}),
        ("gpt_neox-parallel", {"num_attention_heads": 4}),
        ("gpt2-cross", {"n_head": 4}),
        ("distilbert", {"n_heads": 4}),
    ],
)
def test_heads_are_those_of_the_model(
    name: str, changes: dict[str, Any], spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patched(name, spec, **changes).double()
    inputs = CASES[name].inputs(dtype=torch.float64)
    found = logits(model, inputs)
    reference = written_out(name, spec, weights_of(model), monkeypatch, **changes)
    torch.testing.assert_close(found, logits(reference, inputs), atol=3e-6, rtol=0)


@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt_neox-parallel", "llama", "t5"])
def test_gradients_are_those_of_attention_written_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = CASES[name].inputs(dtype=torch.float64)
    for spec in ("qk_norm", "logit_scale:factor=3"):
        model = patched(name, spec).double()
        found = gradients(model, inputs)
        weights = {key: weight.clone().requires_grad_() for key, weight in weights_of(model).items()}
        with monkeypatch.context() as patch:
            reference = written_out(name, spec, weights, patch)
            expected = gradients(reference, inputs)
        own = {key: found.pop(key) for key in list(found) if CONTAINER in key}
        close_gradients(found, expected)
        assert [gradient.shape for gradient in own.values()] == [weight.shape for weight in weights.values()]
        largest = max(gradient.abs().max() for gradient in expected.values())
        for gradient, weight in zip(own.values(), weights.values(), strict=True):
            assert weight.grad is not None
            torch.testing.assert_close(gradient, weight.grad, atol=1e-5 * float(largest), rtol=0)


@pytest.mark.parametrize("name", OTHERS)
def test_every_weight_is_a_heads_and_begins_at_one_but_where_the_model_does_not_divide(name: str) -> None:
    model = patch_model(CASES[name].make(), "attention=qk_norm")
    own = {key: parameter for key, parameter in model.named_parameters() if CONTAINER in key}
    branches = [branch for branch in read_architecture(model).branches if branch.query is not None]
    assert len(own) == 2 * len(branches)
    for key, parameter in own.items():
        start = 8**-0.5 if "t5" in name and "_query" in key else 1.0
        assert torch.equal(parameter, torch.full((8,), start)), key


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_attention_begins_as_soft_in_models_that_do_not_divide(name: str) -> None:
    """The logits' standard deviation over random queries and keys is then 1: a sum of d products, ÷ √d."""
    sizes = {"d_kv": 64} if name == "t5" else {"hidden_size": 128}
    model = patch_model(CASES[name].make(**sizes), "attention=qk_norm")
    layer = next(module for module in model.modules() if hasattr(module, CONTAINER))
    norms = getattr(layer, CONTAINER)
    q, k = torch.randn(2, 2000, 1, 64, generator=torch.Generator().manual_seed(0))
    scale = 1.0 if name == "t5" else 64**-0.5
    products = (norms.attention_query.change(q) * norms.attention_key.change(k)).sum(-1) * scale
    assert products.std().item() == pytest.approx(1.0, abs=0.05)


def test_logits_are_bounded() -> None:
    """However large the weights are."""
    model = patch_model(CASES["bert"].make(), "attention=qk_norm")
    for branch in read_architecture(model).branches:
        if branch.query is not None:
            branch.query.write(branch.query.read() * 1e4)
    model.set_attn_implementation("eager")
    attention = model(**CASES["bert"].inputs(), output_attentions=True).attentions
    # logits are within ±√d, and so no probability is above this
    assert max(a.max().item() for a in attention) <= 1 / (1 + 6 * torch.tensor(-2 * 8**0.5).exp().item()) + 1e-6


# Nothing else


@pytest.mark.parametrize("name", OTHERS)
def test_a_factor_of_one_changes_nothing(name: str) -> None:
    assert attentions.parse("logit_scale:factor=1").preserving
    assert not attentions.parse("logit_scale").preserving
    assert not attentions.parse("qk_norm").preserving
    inputs = CASES[name].inputs()
    assert torch.equal(logits(patched(name, "logit_scale:factor=1"), inputs), logits(CASES[name].make(), inputs))


@pytest.mark.parametrize("spec", ["qk_norm", "logit_scale"])
@pytest.mark.parametrize("name", OTHERS)
def test_taken_away_nothing_is_left(name: str, spec: str) -> None:
    model, stock = patched(name, spec), CASES[name].make()
    assert set(stock.state_dict()) == {key for key in model.state_dict() if CONTAINER not in key}
    unpatch_model(model)
    assert hooks(model) == hooks(stock)
    assert set(model.state_dict()) == set(stock.state_dict())
    assert torch.equal(logits(model, CASES[name].inputs()), logits(stock, CASES[name].inputs()))


@pytest.mark.parametrize("spec", ["qk_norm:kind=layer", "logit_scale:factor=3"])
@pytest.mark.parametrize("name", OTHERS)
def test_copies_compute_the_same_and_share_nothing(name: str, spec: str) -> None:
    model, inputs = patched(name, spec), CASES[name].inputs()
    expected = logits(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, inputs), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("spec", ["qk_norm", "logit_scale:factor=3"])
@pytest.mark.parametrize("name", [name for name in GENERATIVE if name != NORMED])
def test_generation_with_a_cache_is_generation_without(name: str, spec: str) -> None:
    check_generation(patched(name, spec), CASES[name])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2-cross", "gpt_neox-parallel", "llama", "t5"])
def test_checkpointing_changes_no_gradient(name: str, use_reentrant: bool) -> None:
    model, inputs = patched(name, "qk_norm").train(), CASES[name].inputs()
    expected = gradients(model, inputs, seed=3)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    close_gradients(gradients(model, inputs, seed=3), expected)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("gpt_neox-parallel", "qk_norm"),
        ("llama", "logit_scale"),
        *(
            pytest.param(name, spec, marks=pytest.mark.slow)
            for name in ("bert", "gpt2-cross", "llama", "t5")
            for spec in ("qk_norm", "qk_norm:kind=layer")
        ),
    ],
)
def test_it_compiles_to_one_graph(name: str, spec: str) -> None:
    model, inputs = patched(name, spec), CASES[name].inputs()
    expected = logits(model, inputs)
    torch.compiler.reset()
    close(logits(torch.compile(model, backend="eager", fullgraph=True), inputs), expected)


@pytest.mark.parametrize("spec", ["qk_norm", "qk_norm:kind=layer", "logit_scale"])
@pytest.mark.parametrize("name", OTHERS)
def test_in_bfloat16_and_under_autocast_dtypes_stay(name: str, spec: str) -> None:
    inputs = CASES[name].inputs()
    model = patched(name, spec)
    expected = logits(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loose = logits(model, inputs)
    half = model.bfloat16()
    found = logits(half, CASES[name].inputs(dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    scale = expected.abs().max().item()
    for each in (loose.float(), found.float()):
        torch.testing.assert_close(each, expected, atol=0.1 * scale, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox-parallel", "bert"])
def test_it_is_behind_an_adapter_that_comes_later(name: str) -> None:
    targets = {"llama": ["q_proj"], "gpt2": ["c_attn"], "bert": ["query"]}.get(name, ["query_key_value"])
    inputs = CASES[name].inputs()
    model = patched(name, "qk_norm")
    reference = copy.deepcopy(model)
    adapted = get_peft_model(
        model, LoraConfig(target_modules=targets, init_lora_weights=False, fan_in_fan_out=name == "gpt2")
    ).eval()
    found = logits(adapted, inputs)
    assert not torch.allclose(found, logits(reference, inputs), atol=1e-3)
    close(found, logits(adapted.merge_and_unload(), inputs), atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_saved_model_is_loaded_with_it(name: str, tmp_path: Path) -> None:
    model, inputs = patched(name, "qk_norm:eps=0.01"), CASES[name].inputs()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("spec", ["logit_scale", "logit_scale:factor=3"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_factor_folds_into_the_queries(name: str, spec: str) -> None:
    inputs = CASES[name].inputs()
    model = patched(name, spec)
    expected = logits(model, inputs)
    stock = CASES[name].make()
    changed = {
        key
        for (key, old), new in zip(stock.state_dict().items(), fold_patches(model).state_dict().values(), strict=True)
        if not torch.equal(old, new)
    }
    close(logits(model, inputs), expected, atol=1e-5)
    assert hooks(model) == hooks(stock)
    names = {id(module): key for key, module in model.named_modules()}
    queries = {names[id(b.query.module)] for b in read_architecture(model).branches if b.query is not None}
    assert {key.rpartition(".")[0] for key in changed} == queries


def test_norms_do_not_fold() -> None:
    with pytest.raises(ValueError, match="a norm is not linear in queries and keys"):
        fold_patches(patched("gpt2", "qk_norm"))


# What is refused


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "qk_norm",
            r"'qk_norm' would do the same again: the attention of decoder layer 0 in this qwen3 model .*q_norm",
        ),
        ("logit_scale", r"'logit_scale' would be undone: the attention of decoder layer 0 .*q_norm.*; leave it out"),
    ],
)
def test_a_model_with_norms_of_its_own_is_refused(spec: str, message: str) -> None:
    model = CASES[NORMED].make()
    with pytest.raises(ValueError, match=message):
        patch_model(model, f"attention={spec}")
    assert hooks(model) == hooks(CASES[NORMED].make())


@pytest.mark.parametrize("spec", ["qk_norm", "logit_scale"])
def test_heads_that_nobody_can_count_are_refused(spec: str) -> None:
    model = CASES["gpt2"].make()
    model.config.num_attention_heads = 3
    with pytest.raises(ValueError, match=r"the 16 features of queries in the attention of .* be cut into 3 heads"):
        patch_model(model, f"attention={spec}")
    model.config.num_attention_heads = None
    with pytest.raises(ValueError, match="GPT2Config has no num_attention_heads, which the attention of decoder"):
        patch_model(model, f"attention={spec}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("qk_norm:eps=0", "eps=0.0 must be above 0"),
        ("qk_norm:kind=batch", "kind='batch' must be one of rms, layer"),
        ("logit_scale:factor=0", "factor=0.0 must be above 0"),
        ("logit_scale:factor=nan", "factor=nan must be above 0"),
    ],
)
def test_impossible_options_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attentions.parse(spec)


@pytest.mark.parametrize("name", [name for name in attentions.names() if name != attentions.absent])
def test_every_patch_says_what_it_is(name: str) -> None:
    patch = attentions.parse(name)
    assert 20 < len(patch.summary) < 100
    assert all(number in (type(patch).__doc__ or "") for number in re.findall(r"\d{4}\.\d{5}", patch.citation))
    assert attentions.parse(attentions.text(patch)) == patch
