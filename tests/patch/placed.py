"""Layers written out plainly with their norms in any place, to compare converted models with.

Of each architecture only the branches are given, as functions of what goes into them; where norms act, and what joins a
branch to the stream, is then the same formula for all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_gradguard.patch import CONTAINER, read_architecture
from hf_gradguard.patch.model import patch_model
from hf_gradguard.patch.norm import NormPatch, Placement
from tests.patch.models import CASES
from tests.patch.plain import written_out

RMS = {"llama", "mistral", "qwen2", "qwen3", "t5", "t5-gated"}
"""Architectures whose norms are root-mean-square norms; the others have layer norms."""
PARALLEL = "gpt_neox-parallel"
HAS_FINAL_NORM = {*RMS, "gpt2", "gpt2-cross", "gpt_neox-sequential", PARALLEL, "modernbert", "opt-pre"}
EPS = 0.05
"""Large enough for a wrong one to be seen."""


@dataclass(frozen=True)
class OutputOnly(NormPatch):
    """A placement of a user's own: x + norm(f(x))."""

    summary, citation = "x + norm(f(x))", "nobody"
    placement = Placement(own="off", output=True, final=True)


Given = dict[str, Any]
"""What a layer was called with, beside the stream."""
Function = Callable[[Tensor], Tensor]
Branches = list[tuple[str, nn.Module, Callable[[Tensor, Given], tuple[Any, ...]]]]
"""Of each branch its kind, its norm, and the function; what that gives beside y the layer returns, too."""


def only(given: Given, *names: str) -> Given:
    return {name: given[name] for name in names if given.get(name) is not None}


def bert(layer: Any) -> Branches:
    def attention(module: Any, *names: str) -> Callable[[Tensor, Given], tuple[Tensor]]:
        def branch(u: Tensor, given: Given) -> tuple[Tensor]:
            return (module.output.dropout(module.output.dense(module.self(u, **only(given, *names))[0])),)

        return branch

    found: Branches = [
        ("attention", layer.attention.output.LayerNorm, attention(layer.attention, "attention_mask", "past_key_values"))
    ]
    if hasattr(layer, "crossattention"):
        cross = layer.crossattention
        names = ("encoder_hidden_states", "past_key_values")
        found.append(("cross_attention", cross.output.LayerNorm, attention(cross, *names)))
    out = layer.output
    mlp = ("mlp", out.LayerNorm, lambda u, given: (out.dropout(out.dense(layer.intermediate(u))),))
    return [*found, mlp]


def distilbert(layer: Any) -> Branches:
    return [
        ("attention", layer.sa_layer_norm, lambda u, given: (layer.attention(u, **only(given, "attention_mask"))[0],)),
        ("mlp", layer.output_layer_norm, lambda u, given: (layer.ffn(u),)),
    ]


def modernbert(layer: Any) -> Branches:
    return [
        ("attention", layer.attn_norm, lambda u, given: (layer.attn(u, **given)[0],)),
        ("mlp", layer.mlp_norm, lambda u, given: (layer.mlp(u),)),
    ]


def gpt2(layer: Any) -> Branches:
    names = ("past_key_values", "attention_mask")
    found: Branches = [("attention", layer.ln_1, lambda u, given: (layer.attn(u, **only(given, *names))[0],))]
    if hasattr(layer, "crossattention"):
        crossed = ("past_key_values", "encoder_hidden_states")
        cross = layer.crossattention
        found.append(("cross_attention", layer.ln_cross_attn, lambda u, given: (cross(u, **only(given, *crossed))[0],)))
    return [*found, ("mlp", layer.ln_2, lambda u, given: (layer.mlp(u),))]


def llama(layer: Any) -> Branches:
    return [
        ("attention", layer.input_layernorm, lambda u, given: (layer.self_attn(u, **given)[0],)),
        ("mlp", layer.post_attention_layernorm, lambda u, given: (layer.mlp(u),)),
    ]


def gpt_neox(layer: Any) -> Branches:
    def attention(u: Tensor, given: Given) -> tuple[Tensor]:
        return (layer.post_attention_dropout(layer.attention(u, **given)[0]),)

    mlp = ("mlp", layer.post_attention_layernorm, lambda u, given: (layer.post_mlp_dropout(layer.mlp(u)),))
    return [("attention", layer.input_layernorm, attention), mlp]


def fairseq(layer: Any) -> Branches:
    """OPT and BART."""

    def drop(y: Tensor) -> Tensor:
        return F.dropout(y, layer.dropout, layer.training)

    def attention(u: Tensor, given: Given) -> tuple[Tensor]:
        given = {key: value for key, value in given.items() if not key.startswith("encoder_") and key != "use_cache"}
        return (drop(layer.self_attn(hidden_states=u, **given)[0]),)

    def cross(u: Tensor, given: Given) -> tuple[Tensor]:
        states, mask = given["encoder_hidden_states"], given.get("encoder_attention_mask")
        cache = only(given, "past_key_values")
        return (drop(layer.encoder_attn(u, key_value_states=states, attention_mask=mask, **cache)[0]),)

    def mlp(u: Tensor, given: Given) -> tuple[Tensor]:
        y = layer.activation_fn(layer.fc1(u))
        return (drop(layer.fc2(F.dropout(y, getattr(layer, "activation_dropout", 0.0), layer.training))),)

    found: Branches = [("attention", layer.self_attn_layer_norm, attention)]
    if hasattr(layer, "encoder_attn"):
        found.append(("cross_attention", layer.encoder_attn_layer_norm, cross))
    return [*found, ("mlp", layer.final_layer_norm, mlp)]


def t5(sub: Any) -> Branches:
    """Of one of the parts of a layer, which is a module of its own with one branch."""
    if hasattr(sub, "DenseReluDense"):
        return [("mlp", sub.layer_norm, lambda u, given: (sub.dropout(sub.DenseReluDense(u)),))]

    def attention(inner: Any) -> Callable[[Tensor, Given], tuple[Any, ...]]:
        def branch(u: Tensor, given: Given) -> tuple[Any, ...]:
            y, *others = inner(u, mask=given.pop("attention_mask", None), **given)
            return sub.dropout(y), *others

        return branch

    if hasattr(sub, "SelfAttention"):
        return [("attention", sub.layer_norm, attention(sub.SelfAttention))]
    return [("cross_attention", sub.layer_norm, attention(sub.EncDecAttention))]


BRANCHES: dict[str, Callable[[Any], Branches]] = {
    **dict.fromkeys(("bert", "bert-cross", "roberta", "electra"), bert),
    **dict.fromkeys(("gpt2", "gpt2-cross"), gpt2),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), llama),
    **dict.fromkeys((PARALLEL, "gpt_neox-sequential"), gpt_neox),
    **dict.fromkeys(("opt-pre", "opt-post", "bart"), fairseq),
    **dict.fromkeys(("t5", "t5-gated"), t5),
    "distilbert": distilbert,
    "modernbert": modernbert,
}


def plain_norm(name: str, weights: Mapping[str, Tensor]) -> Function:
    """A new norm of a model's kind."""

    def norm(t: Tensor) -> Tensor:
        if name in RMS:
            return t / (t.square().mean(-1, keepdim=True) + EPS).sqrt() * weights["weight"]
        t = t - t.mean(-1, keepdim=True)
        t = t / (t.square().mean(-1, keepdim=True) + EPS).sqrt() * weights["weight"]
        return t + weights["bias"] if "bias" in weights else t

    return norm


class Added:
    """The parameters that a patch has added to one layer, by their place."""

    def __init__(self, layer: nn.Module) -> None:
        self.parameters = dict(layer.named_parameters())

    def at(self, place: str) -> dict[str, Tensor]:
        start = f"{CONTAINER}.{place}."
        return {key.removeprefix(start): value for key, value in self.parameters.items() if key.startswith(start)}


def written(name: str, module: nn.Module, added: Added, placement: str, rules: Mapping[str, Any]) -> Callable[..., Any]:
    """The forward of a layer, or of a part of one, with its norms where `placement` says."""
    signature = inspect.signature(type(module).forward)

    def normed(kind: str, norm: nn.Module) -> Function:
        return plain_norm(name, added.at(f"{kind}.joined_norm")) if isinstance(norm, nn.Identity) else norm

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(module, *args, **kwargs).arguments
        given = {key: value for key, value in given.items() if key != "self"} | given.get("kwargs", {})
        given.pop("kwargs", None)
        x, others, ys = given.pop("hidden_states", None), (), []
        for kind, norm, branch in BRANCHES[name](module):
            y, *others = branch(norm(x) if placement in ("pre", "sandwich") else x, dict(given))
            y = plain_norm(name, added.at(f"{kind}.norm"))(y) if placement in ("sandwich", "output_only") else y
            if name == PARALLEL:
                ys.append(rules[kind](0.0, y))
                continue
            x = rules[kind](x, y)
            x = normed(kind, norm)(x) if placement == "post" else x
        x = x + sum(ys) if ys else x
        return (x, *others) if others else x

    return forward


def write_out(model: Any, name: str, placement: str, rule: str) -> None:
    """Gives each layer of a model a forward of its own, and switches the final norm off where there is to be none.

    Args:
        model: unpatched, but with the parameters of the patch where the patched model has them.
        name: its case.
        placement: `pre`, `post`, `none`, `none:final=false`, `sandwich`, or `output_only` (see `OutputOnly`).
        rule: the residual rule's text, or nothing for x + y.
    """
    anatomy, cells = read_architecture(model), dict[str, Tensor]()
    depths = {stack.name: len(stack.layers) for stack in anatomy.stacks}
    for stack in anatomy.stacks:
        for layer in stack.layers:
            added, rules = Added(layer.module), {}
            for branch in layer.branches:
                weights = added.at(f"{branch.kind}.rule") or added.at("attention.rule")
                written_rule = written_out(rule, branch, weights, cells, depths) if rule else torch.add
                rules[branch.kind] = written_rule
            where = placement.partition(":")[0]
            for part in layer.module.layer if name.startswith("t5") else (layer.module,):
                part.forward = written(name, part, added, where, rules)
        if placement in ("post", "none:final=false"):
            if stack.final_norm is not None:
                stack.final_norm.value.forward = lambda x: x
        elif stack.final_norm is None:
            _end_with(stack.layers[-1].module, plain_norm(name, Added(stack.layers[-1].module).at("final.norm")))


def _end_with(layer: Any, norm: Function) -> None:
    def forward(*args: Any, own: Any = layer.forward, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        return (norm(out[0]), *out[1:]) if isinstance(out, tuple) else norm(out)

    layer.forward = forward


def _adopt(model: nn.Module, key: str, value: Tensor) -> None:
    """Gives a model a parameter under a name, with plain modules on the way where there are none."""
    *path, last = key.split(".")
    owner = model
    for step in path:
        if not hasattr(owner, step):
            owner.add_module(step, nn.Module())
        owner = getattr(owner, step)
    owner.register_parameter(last, nn.Parameter(value.clone()))


def with_eps(model: Any) -> Any:
    for module in model.modules():
        for attribute in ("eps", "variance_epsilon"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, EPS)
    return model


def pair(name: str, placement: str, rule: str = "", *, is_training: bool = False) -> tuple[Any, Any]:
    """A patched model whose new parameters are random, and the same written out; both have the same names."""
    model, reference = (with_eps(CASES[name].make()).train(is_training) for _ in range(2))
    torch.manual_seed(11)
    patch_model(model, f"norm={placement}" + (f";residual={rule}" if rule else ""))
    generator = torch.Generator().manual_seed(12)
    for key, parameter in model.named_parameters():
        if CONTAINER in key:
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            _adopt(reference, key, parameter.detach())
    write_out(reference, name, placement, rule)
    return model, reference
