"""A fault is laid to the parameter, layer and micro-batch in which it began."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from hf_gradguard.observe.fault import find_fault
from hf_gradguard.observe.norms import Measurement
from hf_gradguard.observe.origin import MicroBatch, Origin
from hf_gradguard.observe.random_state import RandomState
from hf_gradguard.observe.reading import Reading
from hf_gradguard.observe.replay import Replays
from hf_gradguard.observe.structure import read_layout
from tests.models import make


class Told(Replays):
    """Finds what it was told to find."""

    def __init__(self, origin: Origin | None) -> None:
        super().__init__(nn.Linear(1, 1), 1)
        self._origin = origin

    def trace(self, index: int) -> tuple[MicroBatch, Origin] | None:
        if self._origin is None:
            return None
        return MicroBatch(lambda: None, {}, RandomState.capture()), self._origin


def reading(model: nn.Module, bad: list[str]) -> tuple[Reading, list[nn.Parameter]]:
    layout, parameters = read_layout(model)
    norms = np.array([math.nan if info.name in bad else 1.0 for info in layout.parameters])
    return Reading(1, layout, norms, None, None, math.nan), list(parameters)


@pytest.mark.parametrize(
    ("module", "expected", "layer"),
    [
        (None, "transformer.h.2.ln_1.weight", "layer 2"),
        ("transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_fc.bias", "layer 1"),
        ("transformer.h.1.mlp.act", "transformer.h.1.mlp.c_fc.bias", "layer 1"),  # has none of its own
        ("transformer.h.0.attn", "transformer.h.2.ln_1.weight", "layer 2"),  # none in the layer, one further around
        ("transformer.h.1", "transformer.h.1.mlp.c_fc.bias", "layer 1"),
        ("", "transformer.h.2.ln_1.weight", "layer 2"),
    ],
)
def test_the_parameter_nearest_to_the_module_is_named(module: str | None, expected: str, layer: str) -> None:
    bad = ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.bias"]
    found, _ = reading(make("gpt2"), [*bad, "transformer.h.2.ln_1.weight"])
    origin = None if module is None else Origin("forward", module, "")
    fault = find_fault(found, [], 1, Told(origin))
    assert (fault.parameter, fault.layer, fault.micro_batch, fault.others) == (expected, layer, 0, 3)


def test_the_first_micro_batch_with_a_bad_gradient_is_named() -> None:
    model = make("gpt2")
    found, parameters = reading(model, ["transformer.wte.weight", "transformer.h.1.ln_1.weight"])
    partial = []
    for bad in ([], [], ["transformer.h.1.ln_1.weight"]):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.full_like(parameter, math.inf if name in bad else 0.5)
        partial.append(Measurement(parameters))
        partial[-1].norms()
    fault = find_fault(found, partial, 4, Told(None))
    assert (fault.parameter, fault.micro_batch, fault.others) == ("transformer.h.1.ln_1.weight", 2, 0)
    assert find_fault(found, partial[:2], 3, Told(None)).micro_batch == 2
    assert find_fault(found, [], 4, Told(None)).micro_batch is None
