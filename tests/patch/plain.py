"""Residual rules written out plainly, from the papers, and models that have them without taps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradguard.patch import Branch, read_architecture
from hf_gradguard.patch.model import patch_model
from hf_gradguard.patch.residual.installed import installed
from tests.patch.gates import PLAIN, Gate
from tests.patch.models import CASES

Weights = Mapping[str, Tensor]


def sigmoid(t: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-t))


def relu(t: Tensor) -> Tensor:
    return torch.where(t > 0, t, torch.zeros_like(t))


def affine(v: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("oi,...i->...o", weight, v)


def gru(w: Weights, x: Tensor, y: Tensor) -> Tensor:
    w_r, w_z, w_g = w["from_y.weight"].chunk(3)
    u_r, u_z = w["from_x.weight"].chunk(2)
    r = sigmoid(affine(y, w_r) + affine(x, u_r))
    z = sigmoid(affine(y, w_z) + affine(x, u_z) - w["bias"])
    h = torch.tanh(affine(y, w_g) + affine(r * x, w["from_reset.weight"]))
    return (1 - z) * x + z * h


def highway(w: Weights, x: Tensor, y: Tensor) -> Tensor:
    c = sigmoid(affine(x, w["from_x.weight"]) + w["bias"])
    return c * x + (1 - c) * y


def output(w: Weights, x: Tensor, y: Tensor) -> Tensor:
    return x + sigmoid(affine(x, w["from_x.weight"]) - w["bias"]) * y


def input_(w: Weights, x: Tensor, y: Tensor) -> Tensor:
    return sigmoid(affine(x, w["from_x.weight"])) * x + y


def sigmoid_tanh(w: Weights, x: Tensor, y: Tensor) -> Tensor:
    gate, value = w["from_y.weight"].chunk(2)
    return x + sigmoid(affine(y, gate) - w["bias"]) * torch.tanh(affine(y, value))


GTRXL: dict[str, Callable[[Weights, Tensor, Tensor], Tensor]] = {
    "gru_gate": gru,
    "highway_gate": highway,
    "output_gate": output,
    "input_gate": input_,
    "sigmoid_tanh_gate": sigmoid_tanh,
}


def lstm(w: Weights, x: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The stream and the cell state."""
    parts = zip(w["cell.weight"].chunk(4), w["cell.bias"].chunk(4), strict=True)
    i, f, g, o = (affine(y, m[:, : x.shape[-1]]) + affine(x, m[:, x.shape[-1] :]) + b for m, b in parts)
    c = sigmoid(f) * c + sigmoid(i) * torch.tanh(g)
    return sigmoid(o) * c, c


def alpha(branch: Branch, depths: dict[str, int], is_crossed: bool) -> float:
    """DeepNorm's, from figure 2 of the paper."""
    n, m = depths.get("encoder", 0), depths.get("decoder", 0)
    if n and m:
        return 0.81 * (n**4 * m) ** (1 / 16) if branch.stack == "encoder" else (3 * m) ** 0.25
    return ((3 if is_crossed else 2) * (n or m)) ** 0.25


def written_out(spec: str, branch: Branch, w: Weights, cells: dict[str, Tensor], depths: dict[str, int]) -> Gate:
    """The rule for one branch as a function of x and y; `cells` has the cell state of each stack."""
    name, _, options = spec.partition(":")
    crossed = branch.count == 3 * branch.depth
    if name in GTRXL:
        return lambda x, y: GTRXL[name](w, x, y if "relu=false" in options else relu(y))
    if name == "lstm_gate":

        def step(x: Tensor, y: Tensor) -> Tensor:
            h, cells[branch.stack] = lstm(w, x, y, x if branch.index == 0 else cells[branch.stack].reshape(x.shape))
            return h

        return step
    if name == "deepnorm":  # with ε scaled, for the norm that follows
        a = alpha(branch, depths, crossed)
        return lambda x, y: a * x + y
    if name == "completep":
        s = branch.depth**-1.0 if not options else (branch.depth / 8) ** -0.5
        return lambda x, y: x + s * y
    if name == "branch_scale":
        s = 1 / math.sqrt((3 if crossed else 2) * branch.depth) if not options else branch.depth**-0.7
        return lambda x, y: x + s * y
    return lambda x, y: x + w["gain"] * y


def pair(name: str, spec: str, *, is_training: bool = False, **changes: Any) -> tuple[Any, Any, list[str]]:
    """A model with a rule whose parameters are random, the same model written out, and the names of the rule's
    parameters in the first, in the order of the second's `plain`."""
    case = CASES[name]
    model, reference = case.make(**changes).train(is_training), case.make(**changes).train(is_training)
    torch.manual_seed(11)
    found = list(installed(read_architecture(patch_model(model, f"residual={spec}"))))
    own: dict[int, nn.ParameterDict] = {}
    generator = torch.Generator().manual_seed(12)
    names, keys = [], {id(parameter): key for key, parameter in model.named_parameters()}
    for _, rule in found:
        if id(rule) not in own:
            own[id(rule)] = nn.ParameterDict()
            for key, parameter in rule.named_parameters():
                with torch.no_grad():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
                own[id(rule)][key.replace(".", "/")] = nn.Parameter(parameter.detach().clone())
                names.append(keys[id(parameter)])
    rules = {(branch.stack, branch.index): own[id(rule)] for branch, rule in found}
    anatomy, cells = read_architecture(reference), dict[str, Tensor]()
    depths = {stack.name: len(stack.layers) for stack in anatomy.stacks}
    for layer in anatomy.layers:
        gates = []
        for branch in layer.branches:
            if (branch.stack, branch.index) in rules:
                weights = {key.replace("/", "."): value for key, value in rules[branch.stack, branch.index].items()}
                gates.append(written_out(spec, branch, weights, cells, depths))
        layer.module.forward = PLAIN[name](layer.module, *gates)
    reference.plain = nn.ModuleList(own.values())
    return model, reference, names
