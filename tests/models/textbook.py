"""Recurrent networks as textbooks write them: one step after another, in float64, without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

Array = np.ndarray
Weights = dict[str, Array]
State = tuple[Array, ...]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def gates(w: Weights, x: Array, h: Array, count: int) -> tuple[list[Array], list[Array]]:
    """What the input and what the state brings to each gate, biases included."""
    from_input = x @ w["weight_ih_l0"].T + w["bias_ih_l0"]
    from_state = h @ w["weight_hh_l0"].T + w["bias_hh_l0"]
    return np.split(from_input, count, axis=-1), np.split(from_state, count, axis=-1)


def lstm(w: Weights, x: Array, state: State) -> State:
    """Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000."""
    h, c = state
    a, b = gates(w, x, h, 4)
    i, f, o = sigmoid(a[0] + b[0]), sigmoid(a[1] + b[1]), sigmoid(a[3] + b[3])
    c = f * c + i * np.tanh(a[2] + b[2])
    return o * np.tanh(c), c


def gru(w: Weights, x: Array, state: State) -> State:
    """Cho et al. 2014, arXiv 1406.1078v1: the reset gate acts on the recurrent product."""
    (h,) = state
    a, b = gates(w, x, h, 3)
    r, z = sigmoid(a[0] + b[0]), sigmoid(a[1] + b[1])
    return ((1 - z) * np.tanh(a[2] + r * b[2]) + z * h,)


def gru_of_version_3(w: Weights, x: Array, state: State) -> State:
    """Cho et al. 2014, arXiv 1406.1078v3: the reset gate acts on the state, before the recurrent product."""
    (h,) = state
    a, b = gates(w, x, h, 3)
    r, z = sigmoid(a[0] + b[0]), sigmoid(a[1] + b[1])
    recurrent, bias = np.split(w["weight_hh_l0"], 3)[2], np.split(w["bias_hh_l0"], 3)[2]
    return ((1 - z) * np.tanh(a[2] + (r * h) @ recurrent.T + bias) + z * h,)


def rnn_tanh(w: Weights, x: Array, state: State) -> State:
    (a,), (b,) = gates(w, x, state[0], 1)
    return (np.tanh(a + b),)


def rnn_relu(w: Weights, x: Array, state: State) -> State:
    (a,), (b,) = gates(w, x, state[0], 1)
    return (np.maximum(a + b, 0),)


Step = Callable[[Weights, Array, State], State]
STEPS: dict[str, Step] = {"lstm": lstm, "gru": gru, "rnn_tanh": rnn_tanh, "rnn_relu": rnn_relu}


def weights_of(module: nn.Module) -> Weights:
    return {name: tensor.detach().double().numpy() for name, tensor in module.state_dict().items()}


def read(step: Step, w: Weights, x: Array, width: int) -> tuple[Array, State]:
    """Outputs `[steps, width]` and last state of one layer for one row `[steps, input width]`."""
    state: State = (np.zeros(width), np.zeros(width)) if step is lstm else (np.zeros(width),)
    outputs = []
    for token in x:
        state = step(w, token, state)
        outputs.append(state[0])
    return np.stack(outputs), state


def normalised(w: Weights, prefix: str, x: Array, eps: float) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return scaled * w[f"{prefix}.weight"] + w[f"{prefix}.bias"]


def logits(model: Any, ids: Array, step: Step | None = None) -> Array:
    """What a `RecurrentForCausalLM` predicts for one row of tokens, `[steps, vocabulary]`."""
    config, w = model.config, weights_of(model)
    step = step or STEPS[config.cell]
    hidden = w["model.embed_tokens.weight"][ids]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        cell = {name.removeprefix(f"{prefix}.cell."): value for name, value in w.items() if f"{prefix}.cell." in name}
        output, _ = read(step, cell, hidden, config.hidden_size)
        if config.layer_norm:
            output = normalised(w, f"{prefix}.norm", output, config.layer_norm_eps)
        hidden = hidden + output if config.residual and hidden.shape == output.shape else output
    if "projection.weight" in w:
        hidden = hidden @ w["projection.weight"].T
    return hidden @ w["lm_head.weight"].T + w["lm_head.bias"]
