"""Rules for tests, and layers with a gate written out by hand, to compare the taps with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_gradguard.patch import Branch


class MixingGate(nn.Module):
    """A gate whose answer depends on x and y in different ways, with parameters of its own."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.from_x = nn.Parameter(torch.randn(width, width, generator=generator) * 0.3)
        self.from_y = nn.Parameter(torch.randn(width, width, generator=generator) * 0.3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = torch.sigmoid(x @ self.from_x + y @ self.from_y)
        return z * x + (1 - z) * torch.tanh(y)


def make_gate(branch: Branch) -> MixingGate:
    return MixingGate(branch.output.out_features, seed=branch.index)


Gate = Callable[[Tensor, Tensor], Tensor]


def bert_layer(layer: Any, attention_gate: Gate, mlp_gate: Gate) -> Callable[..., Tensor]:
    def forward(x: Tensor, mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        out = layer.attention.output
        y = out.dropout(out.dense(layer.attention.self(x, attention_mask=mask)[0]))
        x = out.LayerNorm(attention_gate(x, y))
        out = layer.output
        y = out.dropout(out.dense(layer.intermediate(x)))
        return out.LayerNorm(mlp_gate(x, y))

    return forward


def gpt2_layer(layer: Any, attention_gate: Gate, mlp_gate: Gate) -> Callable[..., Tensor]:
    def forward(x: Tensor, cache: Any = None, mask: Tensor | None = None, *_: Any, **kwargs: Any) -> Tensor:
        y = layer.attn(layer.ln_1(x), past_key_values=cache, attention_mask=mask)[0]
        x = attention_gate(x, y)
        return mlp_gate(x, layer.mlp(layer.ln_2(x)))

    return forward


def llama_layer(layer: Any, attention_gate: Gate, mlp_gate: Gate) -> Callable[..., Tensor]:
    def forward(x: Tensor, **kwargs: Any) -> Tensor:
        x = attention_gate(x, layer.self_attn(layer.input_layernorm(x), **kwargs)[0])
        return mlp_gate(x, layer.mlp(layer.post_attention_layernorm(x)))

    return forward


def opt_post_layer(layer: Any, attention_gate: Gate, mlp_gate: Gate) -> Callable[..., Tensor]:
    def forward(x: Tensor, **kwargs: Any) -> Tensor:
        y = F.dropout(layer.self_attn(x, **kwargs)[0], layer.dropout, layer.training)
        x = layer.self_attn_layer_norm(attention_gate(x, y))
        y = F.dropout(layer.fc2(layer.activation_fn(layer.fc1(x))), layer.dropout, layer.training)
        return layer.final_layer_norm(mlp_gate(x, y))

    return forward


def opt_pre_layer(layer: Any, attention_gate: Gate, mlp_gate: Gate) -> Callable[..., Tensor]:
    def forward(x: Tensor, **kwargs: Any) -> Tensor:
        y = F.dropout(layer.self_attn(layer.self_attn_layer_norm(x), **kwargs)[0], layer.dropout, layer.training)
        x = attention_gate(x, y)
        y = layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))
        return mlp_gate(x, F.dropout(y, layer.dropout, layer.training))

    return forward


def neox_parallel_layer(layer: Any, gate: Gate) -> Callable[..., Tensor]:
    def forward(x: Tensor, **kwargs: Any) -> Tensor:
        attention = layer.post_attention_dropout(layer.attention(layer.input_layernorm(x), **kwargs)[0])
        mlp = layer.post_mlp_dropout(layer.mlp(layer.post_attention_layernorm(x)))
        return gate(x, attention + mlp)

    return forward


def neox_sequential_layer(layer: Any, attention_gate: Gate, mlp_gate: Gate) -> Callable[..., Tensor]:
    def forward(x: Tensor, **kwargs: Any) -> Tensor:
        y = layer.post_attention_dropout(layer.attention(layer.input_layernorm(x), **kwargs)[0])
        x = attention_gate(x, y)
        return mlp_gate(x, layer.post_mlp_dropout(layer.mlp(layer.post_attention_layernorm(x))))

    return forward


def distilbert_layer(layer: Any, attention_gate: Gate, mlp_gate: Gate) -> Callable[..., Tensor]:
    def forward(x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        y = layer.attention(x, attention_mask=attention_mask, **kwargs)[0]
        x = layer.sa_layer_norm(attention_gate(x, y))
        return layer.output_layer_norm(mlp_gate(x, layer.ffn(x)))

    return forward


def bart_layer(layer: Any, *gates: Gate) -> Callable[..., Tensor]:
    """Of the encoder with two gates, of the decoder with three."""

    def drop(y: Tensor) -> Tensor:
        return F.dropout(y, layer.dropout, layer.training)

    def forward(
        x: Tensor,
        attention_mask: Tensor | None,
        states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        if states is not None:
            kwargs["past_key_values"] = past_key_values
        y = layer.self_attn(x, attention_mask=attention_mask, **kwargs)[0]
        x = layer.self_attn_layer_norm(gates[0](x, drop(y)))
        if states is not None:
            kwargs |= {"key_value_states": states, "attention_mask": encoder_attention_mask}
            x = layer.encoder_attn_layer_norm(gates[1](x, drop(layer.encoder_attn(x, **kwargs)[0])))
        y = F.dropout(layer.activation_fn(layer.fc1(x)), layer.activation_dropout, layer.training)
        return layer.final_layer_norm(gates[-1](x, drop(layer.fc2(y))))

    return forward


def t5_layer(layer: Any, *gates: Gate) -> Callable[..., Any]:
    """Of the encoder with two gates, of the decoder with three; the order of sublayers is the model's own."""

    def attention(sub: Any, inner: Any, gate: Gate) -> Callable[..., Any]:
        def forward(
            x: Tensor, key_value_states: Tensor | None = None, attention_mask: Any = None, **kwargs: Any
        ) -> Any:
            if key_value_states is not None:
                kwargs["key_value_states"] = key_value_states
            y, *others = inner(sub.layer_norm(x), mask=attention_mask, **kwargs)
            return gate(x, sub.dropout(y)), *others

        return forward

    def feed_forward(sub: Any, gate: Gate) -> Callable[[Tensor], Tensor]:
        return lambda x: gate(x, sub.dropout(sub.DenseReluDense(sub.layer_norm(x))))

    first, *cross, last = layer.layer
    first.forward = attention(first, first.SelfAttention, gates[0])
    for sub in cross:
        sub.forward = attention(sub, sub.EncDecAttention, gates[1])
    last.forward = feed_forward(last, gates[-1])
    return layer.forward  # type: ignore[no-any-return]


LAYERS: dict[str, tuple[Callable[..., Callable[..., Tensor]], int]] = {
    "bert": (bert_layer, 2),
    "gpt2": (gpt2_layer, 2),
    "llama": (llama_layer, 2),
    "opt-post": (opt_post_layer, 2),
    "opt-pre": (opt_pre_layer, 2),
    "gpt_neox-parallel": (neox_parallel_layer, 1),
}
"""For each case the layer by hand, and how many gates it takes."""

PLAIN: dict[str, Callable[..., Callable[..., Any]]] = {
    **{name: layer for name, (layer, _) in LAYERS.items()},
    "bart": bart_layer,
    "distilbert": distilbert_layer,
    "gpt_neox-sequential": neox_sequential_layer,
    "t5": t5_layer,
    "t5-gated": t5_layer,
}
"""For more cases the layer by hand; it takes one gate for each addition."""
