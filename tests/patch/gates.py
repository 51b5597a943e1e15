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


LAYERS: dict[str, tuple[Callable[..., Callable[..., Tensor]], int]] = {
    "bert": (bert_layer, 2),
    "gpt2": (gpt2_layer, 2),
    "llama": (llama_layer, 2),
    "opt-post": (opt_post_layer, 2),
    "opt-pre": (opt_pre_layer, 2),
    "gpt_neox-parallel": (neox_parallel_layer, 1),
}
"""For each case the layer by hand, and how many gates it takes."""
