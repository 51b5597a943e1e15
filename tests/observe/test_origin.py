"""The module that first made a NaN or an infinity is named, whatever kind it is and whichever pass it was in.

Faults are put in at a known place; that place is what has to be named.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

from hf_gradguard.observe.origin import MicroBatch, Origin, save, trace
from hf_gradguard.observe.random_state import RandomState
from tests.models import VOCABULARY, language_data, make
from tests.processes import leave_group
from tests.training import trainer

MARK = VOCABULARY - 1
"""A token that does not occur in the text."""
PLACES = {
    "bert": {
        "embedding": "bert.embeddings.word_embeddings",
        "attention": "bert.encoder.layer.1.attention.self",
        "attention_output": "bert.encoder.layer.1.attention.output.dense",
        "norm": "bert.encoder.layer.2.output.LayerNorm",
        "mlp": "bert.encoder.layer.0.intermediate.dense",
        "activation": "bert.encoder.layer.2.intermediate.intermediate_act_fn",
        "layer": "bert.encoder.layer.1",
        "head": "cls.predictions.decoder",
    },
    "gpt2": {
        "embedding": "transformer.wte",
        "attention": "transformer.h.1.attn",
        "attention_output": "transformer.h.0.attn.c_proj",
        "norm": "transformer.h.2.ln_2",
        "mlp": "transformer.h.1.mlp.c_fc",
        "activation": "transformer.h.0.mlp.act",
        "layer": "transformer.h.1",
        "head": "lm_head",
    },
    "llama": {
        "embedding": "model.embed_tokens",
        "attention": "model.layers.1.self_attn",
        "attention_output": "model.layers.2.self_attn.o_proj",
        "norm": "model.norm",
        "mlp": "model.layers.0.mlp.gate_proj",
        "activation": "model.layers.1.mlp.act_fn",
        "layer": "model.layers.1",
        "head": "lm_head",
    },
    "t5": {
        "embedding": "encoder.embed_tokens",
        "attention": "encoder.block.1.layer.0.SelfAttention",
        "attention_output": "decoder.block.1.layer.1.EncDecAttention.o",
        "norm": "encoder.final_layer_norm",
        "mlp": "decoder.block.2.layer.2.DenseReluDense.wi",
        "activation": "encoder.block.0.layer.1.DenseReluDense.act",
        "layer": "decoder.block.1",
        "head": "lm_head",
    },
}
CASES = [(name, kind) for name, places in PLACES.items() for kind in places]


# Faults, and how a micro-batch is run


def batch() -> dict[str, Tensor]:
    """Three rows of text; one token of the second is marked."""
    ids = torch.stack([row["input_ids"] for row in language_data(3)])
    ids[1, 5] = MARK
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def micro_batch(
    model: nn.Module, inputs: Mapping[str, Any], *, autocast: bool = False, loss: Callable[[Any], Tensor] | None = None
) -> MicroBatch:
    """Its forward and backward pass in one's own loop."""

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(**inputs)
            value: Tensor = output["loss"] if loss is None else loss(output)
        value.backward()
        return value.detach()

    return MicroBatch(run, inputs, RandomState.capture())


class FailingGradient(torch.autograd.Function):
    """Hands its input through; the gradient becomes `value` at some places."""

    @staticmethod
    def forward(context: Any, values: Tensor, where: Tensor, value: float) -> Tensor:
        context.where, context.value = where, value
        return values.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return torch.where(context.where, context.value, gradient), None, None


def _replaced(output: Any, old: Tensor, new: Tensor) -> Any:
    if output is old:
        return new
    if isinstance(output, dict):
        for key in [key for key, item in output.items() if item is old]:
            output[key] = new
        return output
    return type(output)(new if item is old else item for item in output)


def _first_float(output: Any) -> Tensor | None:
    items = output.values() if isinstance(output, dict) else [output] if isinstance(output, Tensor) else output
    return next((item for item in items if isinstance(item, Tensor) and item.is_floating_point()), None)


@contextmanager
def fault(model: nn.Module, place: str, value: float, direction: str) -> Iterator[None]:
    """Makes one module fail at marked tokens: in its output, or in the gradient that it passes on."""
    marked: list[Tensor] = []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        marked[:] = [kwargs["input_ids"] == MARK]

    def fail(module: nn.Module, args: Any, output: Any) -> Any:
        first, where = _first_float(output), marked[0]
        assert first is not None
        if first.shape[:2] != where.shape:  # heads before tokens, the same for all rows, or a loss
            where = where.any(1) if first.shape[:1] == where.shape[:1] else where.any()
        where = where[(..., *[None] * (first.ndim - where.ndim))]
        failing = direction == "backward"
        new = FailingGradient.apply(first, where, value) if failing else torch.where(where, value, first)
        return _replaced(output, first, new)

    handles = [
        model.register_forward_pre_hook(look, with_kwargs=True),
        model.get_submodule(place).register_forward_hook(fail),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def found(origin: Origin) -> tuple[str | None, str | None]:
    return origin.direction, origin.module


# Every kind of module of Transformers' models


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_module_that_fails_at_a_marked_token_is_named(name: str, kind: str, direction: str, value: float) -> None:
    model, inputs, place = make(name), batch(), PLACES[name][kind]
    with fault(model, place, value, direction):
        origin = trace(model, micro_batch(model, inputs))
    assert found(origin) == (direction, place)
    what = "NaN" if math.isnan(value) else "infinity"
    assert origin.message.startswith(f"{place} produced {what} in the {direction} pass")
    assert dict(model.named_modules())[place] is model.get_submodule(place)


SETTINGS = {
    "plain": (None, False),
    "autocast": (None, True),
    "reentrant": (True, False),
    "non_reentrant": (False, False),
}


def called_modules(model: nn.Module, inputs: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Every module that gives a floating tensor, with whether a gradient goes through it."""
    seen: dict[str, bool] = {}

    def look(name: str, output: Any) -> None:
        first = _first_float(output)
        if first is not None:
            seen[name] = first.requires_grad

    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: look(name, output))
        for name, module in model.named_modules()
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return list(seen.items())


def is_harmed(model: nn.Module, once: MicroBatch) -> bool:
    """Whether training would have met anything non-finite."""
    loss = once.run()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    return not all(bool(tensor.isfinite().all()) for tensor in (loss, *gradients) if isinstance(tensor, Tensor))


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart", "modernbert"])
def test_every_single_module_is_named(name: str, setting: str) -> None:
    is_reentrant, autocast = SETTINGS[setting]
    model, inputs = make(name), batch()
    model.train()
    if is_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})  # type: ignore[operator]
        model.enable_input_require_grads()  # type: ignore[operator]
    wrong = []
    for place, has_gradient in called_modules(model, inputs):
        for direction in ("forward", "backward") if has_gradient else ("forward",):
            for value in (math.nan, -math.inf):
                once = micro_batch(model, inputs, autocast=autocast)
                with fault(model, place, value, direction):
                    origin = trace(model, once)
                    # minus infinity is nothing to an activation such as ReLU
                    expected = (direction, place) if is_harmed(model, once) else (None, None)
                if found(origin) != expected:
                    wrong.append((place, direction, value, origin))
    assert not wrong


# In a Trainer


class Traced(Trainer):
    """Traces the first micro-batch that went wrong, or the first of all."""

    only_bad = True

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        state = RandomState.capture()
        once = super().training_step
        loss = once(model, inputs, *args, **kwargs)
        if not hasattr(self, "origin") and not (self.only_bad and self._is_finite(loss)):
            replays: list[Tensor] = []
            run = lambda: replays.append(once(model, inputs, *args, **kwargs))  # noqa: E731
            gradients = [weight.grad for weight in self.model.parameters()]
            before = [None if gradient is None else gradient.clone() for gradient in gradients]
            self.origin = trace(model, MicroBatch(run, inputs, state))
            self.losses = loss, *replays
            self.is_unchanged = all(
                weight.grad is gradient and same(gradient, copy)
                for weight, gradient, copy in zip(self.model.parameters(), gradients, before, strict=True)
            )
        return loss

    def _is_finite(self, loss: Tensor) -> bool:
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        return all(bool(tensor.isfinite().all()) for tensor in (loss, *gradients))


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Bit-equal, also where both are NaN."""
    if one is None or other is None:
        return one is other
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


TRAINER_OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "non_reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "accumulation": {"gradient_accumulation_steps": 4},
}


COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
TRAINED = [("gpt2", "activation", "forward"), ("bert", "attention_output", "backward"), ("llama", "norm", "backward")]


@pytest.mark.parametrize(
    ("name", "kind", "direction", "options"),
    [(*where, options) for where in TRAINED for options in TRAINER_OPTIONS.values()] + [(*TRAINED[1], COMPILED)],
)
def test_a_training_step_of_a_trainer_is_traced(
    name: str, kind: str, direction: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, place = make(name), PLACES[name][kind]
    run = trainer(model, tmp_path, kind=Traced, max_steps=3, logging_steps=50, **options)
    (marked,) = language_data(1)
    marked["input_ids"][5] = MARK
    run.train_dataset = [marked] * 12  # type: ignore[assignment]
    with fault(model, place, math.nan, direction):
        run.train()
    assert isinstance(run, Traced)
    assert found(run.origin) == (direction, place)
    assert run.is_unchanged


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("options", ["fp32", "bf16", "reentrant", "non_reentrant"])
def test_with_dropout_the_replay_has_the_very_loss_of_the_original(name: str, options: str, tmp_path: Path) -> None:
    run = trainer(make(name), tmp_path, kind=Traced, max_steps=1, **TRAINER_OPTIONS[options])
    assert isinstance(run, Traced)
    run.only_bad = False
    run.train()
    original, replayed = run.losses
    assert torch.equal(original, replayed)
    assert found(run.origin) == (None, None)
    assert "transient" in run.origin.message
    assert run.is_unchanged


# Faults as they come by themselves


class Chain(nn.Module):
    """An embedding of tokens, some modules one after another with what stands between them, and a mean for a loss."""

    def __init__(self, *modules: nn.Module, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.steps = nn.ModuleList(modules)
        self.head = nn.Linear(width, 2)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        hidden = self.embedding(input_ids)
        for step in self.steps:
            hidden = step(hidden)
        scores = self.head(hidden)
        return {"loss": scores.square().mean(), "scores": scores}


class Function(nn.Module):
    """A module of one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, hidden: Tensor) -> Tensor:
        return self.function(hidden)


class Norm(nn.Module):
    """Divides by the standard deviation, with a guard against zero that may be too small."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.var(-1, keepdim=True) + self.eps)


IDS = {"input_ids": torch.tensor([[1, 2, 3], [4, MARK, 5]])}


def test_a_norm_of_a_constant_row_with_no_eps_is_named() -> None:
    model = Chain(nn.Linear(4, 4), Norm(0.0))
    with torch.no_grad():
        model.embedding.weight[MARK] = 0.0
        model.steps[0].bias.fill_(0.5)
    origin = trace(model, micro_batch(model, IDS))
    assert found(origin) == ("forward", "steps.1")
    model.steps[1].eps = 1e-6
    assert found(trace(model, micro_batch(model, IDS))) == (None, None)


def test_a_logarithm_of_something_negative_is_named_with_the_range_of_its_inputs() -> None:
    model = Chain(Function(torch.sigmoid), Function(lambda hidden: torch.log(hidden - 0.5)), nn.LayerNorm(4))
    origin = trace(model, micro_batch(model, IDS))
    assert found(origin) == ("forward", "steps.1")
    inputs = torch.sigmoid(model.embedding(IDS["input_ids"]))
    assert origin.message == (
        f"steps.1 produced NaN in the forward pass from inputs between {inputs.min():.3g} and {inputs.max():.3g} "
        "(float32 [2, 3, 4])"
    )


def test_the_root_of_zero_is_finite_forward_and_named_backward() -> None:
    model = Chain(nn.Linear(4, 4), Function(lambda hidden: hidden.square().sum(-1, keepdim=True).sqrt() + hidden))
    with torch.no_grad():
        model.embedding.weight[MARK] = 0.0
        model.steps[0].bias.zero_()
    origin = trace(model, micro_batch(model, IDS))
    # 1 / (2 · √0) is infinite; what is before it makes NaN of that
    assert found(origin) == ("backward", "steps.1")
    assert "infinity in the backward pass (in SqrtBackward0) from the gradient between" in origin.message
    inputs = model.steps[0](model.embedding(IDS["input_ids"]))
    expected = f"inputs between {inputs.min():.3g} and {inputs.max():.3g} (float32 [2, 3, 4])"
    assert origin.message.endswith(f"; in the forward pass it was given {expected}")


def test_an_overflow_of_float16_is_named() -> None:
    model = Chain(Function(lambda hidden: hidden * 4e4), Function(lambda hidden: hidden * 4), nn.LayerNorm(4)).half()
    with torch.no_grad():
        model.embedding.weight.fill_(1.0)
    origin = trace(model, micro_batch(model, IDS))
    assert found(origin) == ("forward", "steps.1")
    expected = "steps.1 produced infinity in the forward pass from inputs between 4e+04 and 4e+04 (float16 [2, 3, 4])"
    assert origin.message == expected


def test_gradients_that_overflow_where_they_are_added_up_are_named_by_whose_output_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, hidden: Tensor) -> Tensor:
            hidden = self.inner(hidden)
            return hidden * 4e4 + hidden.clone() * 4e4

    outer = Twice()
    inputs = {"hidden": torch.ones(2, 4).half()}
    origin = trace(outer, micro_batch(outer, inputs, loss=lambda output: output.sum()))
    assert found(origin) == ("backward", "inner.1")
    assert "where gradients are added up" in origin.message


class Masked(nn.Module):
    """Takes the logarithm of everything, and what is not zero of that."""

    def __init__(self) -> None:
        super().__init__()
        self.logarithm = Function(torch.log)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.where(hidden != 0, self.logarithm(hidden.square()), 0.0)


def test_the_logarithm_that_a_where_hides_is_named() -> None:
    model = Chain(Masked())
    with torch.no_grad():
        model.embedding.weight[MARK] = 0.0
    once = micro_batch(model, IDS)
    assert math.isfinite(float(once.run()))  # type: ignore[arg-type]
    assert trace(model, once).module == "steps.0.logarithm"


@pytest.mark.parametrize("place", ["transformer.h.2.mlp.act", "transformer.h.2.ln_2", "transformer.ln_f"])
def test_a_token_without_a_label_harms_the_gradients_only_and_the_module_is_named(place: str) -> None:
    # The last token of a causal model predicts nothing, and none attends to it.
    model, inputs = make("gpt2"), batch()
    inputs["input_ids"][1, 5] = 0
    inputs["input_ids"][1, -1] = MARK
    inputs["labels"][1, -1] = -100
    once = micro_batch(model, inputs)
    with fault(model, place, math.nan, "forward"):
        assert math.isfinite(float(once.run()))  # type: ignore[arg-type]
        assert found(trace(model, once)) == ("forward", place)
        only_forward = MicroBatch(lambda: model(**inputs).loss, inputs, RandomState.capture())
        assert found(trace(model, only_forward)) == ("forward", place)


def test_the_same_where_the_loss_is_ones_own() -> None:
    model, inputs = make("gpt2"), batch()
    inputs["input_ids"][1, 5] = 0
    inputs["input_ids"][1, -1] = MARK
    targets = inputs.pop("labels")
    targets[1, -1] = -100
    loss = lambda output: nn.functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten())  # noqa: E731
    with fault(model, "transformer.ln_f", math.nan, "forward"):
        assert found(trace(model, micro_batch(model, inputs, loss=loss))) == ("forward", "transformer.ln_f")


def test_a_token_that_no_output_depends_on_harms_the_gradients_only_and_the_module_is_named() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForSequenceClassification(config)  # which looks at the first token of the last layer
    inputs = {"input_ids": batch()["input_ids"], "labels": torch.tensor([0, 1, 1])}
    place = "bert.encoder.layer.1.intermediate.dense"
    once = micro_batch(model, inputs)
    with fault(model, place, math.nan, "forward"):
        assert math.isfinite(float(once.run()))  # type: ignore[arg-type]
        assert found(trace(model, once)) == ("forward", place)


def test_gradients_that_are_used_up_at_once_are_looked_at() -> None:
    model = make("gpt2")
    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    place = PLACES["gpt2"]["norm"]
    with fault(model, place, math.nan, "backward"):
        assert found(trace(model, micro_batch(model, batch()))) == ("backward", place)


@pytest.mark.parametrize("is_reentrant", [True, False, None])
def test_of_two_passes_in_one_micro_batch_the_second_is_traced_like_the_first(is_reentrant: bool | None) -> None:
    model = make("gpt2")
    if is_reentrant is not None:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})  # type: ignore[operator]
        model.enable_input_require_grads()  # type: ignore[operator]
    clean = batch()
    clean["input_ids"] = clean["input_ids"].clamp(max=MARK - 1)
    passes = [micro_batch(model, clean), micro_batch(model, batch())]
    both = MicroBatch(lambda: [each.run() for each in passes], batch(), RandomState.capture())
    for direction in ("forward", "backward"):
        with fault(model, PLACES["gpt2"]["activation"], math.nan, direction):
            assert found(trace(model, both)) == (direction, PLACES["gpt2"]["activation"])


# Code between modules, residual streams


class Residual(nn.Module):
    """Two branches and a residual stream; `at` chooses where the gradient, or the value, fails."""

    def __init__(self, at: str, direction: str) -> None:
        super().__init__()
        self.at, self.direction = at, direction
        self.norm = nn.LayerNorm(4)
        self.left = nn.Linear(4, 4)
        self.right = nn.Linear(4, 4)

    def fail(self, at: str, hidden: Tensor) -> Tensor:
        if at != self.at:
            return hidden
        where = torch.arange(hidden.numel()).view_as(hidden) == 5
        if self.direction == "forward":
            return torch.where(where, math.nan, hidden)
        return FailingGradient.apply(hidden, where, math.nan)  # type: ignore[no-any-return]

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(self.fail("norm", hidden))
        left = self.left(self.fail("left", normed))
        right = self.right(self.fail("right", normed))
        return self.fail("stream", hidden) + self.fail("sum", left + right)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("at", ["norm", "left", "right", "stream", "sum"])
def test_a_modules_own_code_is_named_with_the_submodules_around_it(at: str, direction: str) -> None:
    model = Chain(nn.Linear(4, 4), Residual(at, direction), nn.Linear(4, 4))
    origin = trace(model, micro_batch(model, IDS))
    assert found(origin) == (direction, "steps.1")
    if at in ("stream", "sum"):
        place = "after its submodule right"
    else:
        before = {"norm": None, "left": "norm", "right": "left"}[at]
        place = f"between its submodules {before} and {at}" if before else "before its submodule norm"
    assert f"steps.1 produced NaN in the {direction} pass in its own code {place} (" in origin.message


class Checkpointed(Residual):
    """Keeps no activations: it runs again in the backward pass, with hooks outside of what runs again."""

    is_reentrant = True

    def forward(self, hidden: Tensor) -> Tensor:
        return checkpoint(super().forward, hidden, use_reentrant=self.is_reentrant)  # type: ignore[no-any-return]


class Checkpoints(nn.Module):
    """Keeps no activations of its submodule, which runs again with its hooks."""

    def __init__(self, inner: nn.Module, is_reentrant: bool) -> None:
        super().__init__()
        self.inner = inner
        self.is_reentrant = is_reentrant

    def forward(self, hidden: Tensor) -> Tensor:
        return checkpoint(self.inner, hidden, use_reentrant=self.is_reentrant)  # type: ignore[no-any-return]


@pytest.mark.parametrize("is_reentrant", [True, False])
@pytest.mark.parametrize("hooks_are_outside", [True, False])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("at", ["norm", "left", "right", "stream", "sum"])
def test_a_checkpointed_modules_own_code_is_named(
    at: str, direction: str, hooks_are_outside: bool, is_reentrant: bool
) -> None:
    if hooks_are_outside:
        layer: nn.Module = Checkpointed(at, direction)
        layer.is_reentrant = is_reentrant  # type: ignore[assignment]
    else:
        layer = Checkpoints(Residual(at, direction), is_reentrant)
    model = Chain(nn.Linear(4, 4), layer, nn.Linear(4, 4))
    origin = trace(model, micro_batch(model, IDS))
    assert found(origin) == (direction, "steps.1" if hooks_are_outside else "steps.1.inner")


@pytest.mark.parametrize("branch", ["norm", "left", "right"])
def test_of_a_residual_stream_the_branch_is_named_from_which_the_bad_gradient_came(branch: str) -> None:
    model = Chain(Residual("", ""), Residual("", ""), Residual("", ""))
    with fault(model, f"steps.1.{branch}", math.inf, "backward"):
        origin = trace(model, micro_batch(model, IDS))
    assert found(origin) == ("backward", f"steps.1.{branch}")


def test_of_two_faults_the_first_in_time_is_named() -> None:
    model = make("gpt2")
    with (
        fault(model, "transformer.h.0.mlp", math.nan, "forward"),
        fault(model, "transformer.h.1.ln_1", math.nan, "forward"),
    ):
        assert trace(model, micro_batch(model, batch())).module == "transformer.h.0.mlp"
    with (
        fault(model, "transformer.h.0.mlp", math.nan, "backward"),
        fault(model, "transformer.h.1.ln_1", math.nan, "backward"),
    ):
        assert trace(model, micro_batch(model, batch())).module == "transformer.h.1.ln_1"


def test_of_two_faults_the_first_in_time_is_named_though_it_is_minus_infinity() -> None:
    model = make("t5")
    with (
        fault(model, "encoder.final_layer_norm", -math.inf, "forward"),
        fault(model, "decoder.embed_tokens", math.nan, "forward"),
    ):
        inputs = {**batch(), "decoder_input_ids": batch()["input_ids"]}
        assert trace(model, micro_batch(model, inputs)).module == "encoder.final_layer_norm"


def test_a_module_that_is_called_twice_is_named() -> None:
    shared = nn.Linear(4, 4)
    model = Chain(shared, nn.Tanh(), shared)
    with fault(model, "steps.0", math.nan, "backward"):
        assert found(trace(model, micro_batch(model, IDS))) == ("backward", "steps.0")


# What is not the module's fault


def test_a_weight_that_is_nan_is_named() -> None:
    model = make("gpt2")
    with torch.no_grad():
        model.get_parameter("transformer.h.1.ln_2.weight")[3] = math.nan
    origin = trace(model, micro_batch(model, batch()))
    assert found(origin) == ("forward", "transformer.h.1.ln_2")
    assert "as its parameter weight is between 1 and 1 with 1 of 16 elements NaN (float32 [16])" in origin.message


def test_a_row_of_an_embedding_counts_only_where_its_token_comes() -> None:
    model = Chain(nn.Linear(4, 4))
    with torch.no_grad():
        model.embedding.weight[7] = math.inf
    assert found(trace(model, micro_batch(model, IDS))) == (None, None)
    with torch.no_grad():
        model.embedding.weight[MARK] = math.inf
    origin = trace(model, micro_batch(model, IDS))
    assert found(origin) == ("forward", "embedding")
    assert "parameter weight" in origin.message


def test_a_weight_that_a_module_uses_in_place_of_its_submodule_is_named() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.inner(hidden, hidden, hidden, need_weights=False)[0]  # type: ignore[no-any-return]

    model = Chain(Attention())
    with torch.no_grad():
        model.steps[0].inner.out_proj.bias[0] = math.nan
    origin = trace(model, micro_batch(model, IDS))
    assert found(origin) == ("forward", "steps.0.inner")
    assert "parameter out_proj.bias" in origin.message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_inputs_that_hold_it_are_named(value: float) -> None:
    model = make("gpt2")
    embedded = torch.ones(3, 16, 16)
    embedded[0, 3, 2] = value
    inputs = {"inputs_embeds": embedded, "labels": batch()["labels"]}
    origin = trace(model, micro_batch(model, inputs))
    assert found(origin) == ("forward", "")
    what, kind = ("NaN", "NaN") if math.isnan(value) else ("infinity", "infinite")
    expected = f"the model was given {what}: inputs_embeds between 1 and 1 with 1 of 768 elements {kind}"
    assert origin.message.startswith(expected)


def test_inputs_that_a_model_takes_as_any_keywords_are_named() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
            return {"loss": self.inner(inputs["pixels"]).mean()}

    model = Keywords()
    origin = trace(model, micro_batch(model, {"pixels": torch.full((2, 4), math.nan)}))
    assert origin.message.startswith("the model was given NaN: pixels 8 of 8 elements NaN (float32 [2, 4])")


def test_labels_of_which_none_counts_are_named() -> None:
    model, inputs = make("bert"), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    origin = trace(model, micro_batch(model, inputs))
    assert found(origin) == ("forward", "")
    assert origin.message.startswith("the loss of the model became NaN in the forward pass")
    assert "every label is -100" in origin.message


def test_a_loss_that_the_model_spoils_is_the_loss_of_the_model() -> None:
    class Spoiled(Chain):
        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            output = super().forward(input_ids)
            return {**output, "loss": output["loss"] / 0.0}

    model = Spoiled()
    origin = trace(model, micro_batch(model, IDS))
    assert found(origin) == ("forward", "")
    assert origin.message.startswith("the loss of the model became infinity in the forward pass")
    assert "every label" not in origin.message


def test_a_loss_of_ones_own_is_told_from_the_model() -> None:
    model = Chain()
    origin = trace(model, micro_batch(model, IDS, loss=lambda output: (output["scores"] - 1e9).log().mean()))
    assert found(origin) == ("forward", None)
    scores = model(**IDS)["scores"]
    assert origin.message.startswith("the loss became NaN in the forward pass, outside of the model")
    assert f"between {scores.min():.3g} and {scores.max():.3g}" in origin.message


def test_a_gradient_that_the_loss_spoils_is_told_from_the_model() -> None:
    model = Chain()
    origin = trace(model, micro_batch(model, IDS, loss=lambda output: (output["scores"] * 0).square().sum().sqrt()))
    assert found(origin) == ("backward", None)
    assert "the loss, outside of the model, produced it" in origin.message


def test_a_hook_that_spoils_a_parameters_gradient_is_told_from_the_backward_pass() -> None:
    model = make("gpt2")
    weight = model.get_parameter("transformer.h.1.mlp.c_fc.weight")
    weight.register_hook(lambda gradient: gradient * math.nan)
    origin = trace(model, micro_batch(model, batch()))
    assert found(origin) == ("backward", "transformer.h.1.mlp.c_fc")
    assert "in a hook of it" in origin.message


def test_a_hook_that_spoils_what_was_added_up_is_told_from_the_backward_pass() -> None:
    model = make("gpt2")
    weight = model.get_parameter("transformer.h.1.mlp.c_fc.weight")
    weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", weight.grad * math.nan))
    origin = trace(model, micro_batch(model, batch()))
    assert found(origin) == ("backward", "transformer.h.1.mlp.c_fc")
    assert "a hook of the parameter" in origin.message


def test_what_does_not_come_again_is_transient() -> None:
    model = make("gpt2")
    edited: list[None] = []

    def edit(weight: Tensor) -> None:
        if not edited:
            edited.append(None)
            assert weight.grad is not None
            weight.grad[0, 0] = math.nan

    model.get_parameter("transformer.h.1.mlp.c_fc.weight").register_post_accumulate_grad_hook(edit)
    once = micro_batch(model, batch())
    once.run()
    origin = trace(model, once)
    assert found(origin) == (None, None)
    assert origin.message == (
        "the same micro-batch, run again, gave finite gradients: the fault was transient (hardware, a race, or code "
        "that changed the gradient after the backward pass)"
    )


def test_without_a_backward_pass_the_forward_pass_is_traced_and_no_more_is_said() -> None:
    model, inputs = make("bert"), batch()
    once = MicroBatch(lambda: model(**inputs).loss, inputs, RandomState.capture())
    origin = trace(model, once)
    assert found(origin) == (None, None)
    assert "backward pass is not part" in origin.message
    assert "transient" not in origin.message
    place = PLACES["bert"]["norm"]
    with fault(model, place, math.inf, "forward"):
        assert found(trace(model, once)) == ("forward", place)


# What is non-finite and no fault


class Scores(nn.Module):
    """Attention with a softmax of its own, as it is often written: the mask is minus infinity."""

    def __init__(self, mask: nn.Module | None = None) -> None:
        super().__init__()
        self.mask = mask
        self.softmax = nn.Softmax(dim=-1)
        self.value = nn.Linear(4, 4)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = hidden @ hidden.transpose(-1, -2)
        if self.mask is not None:
            mask = self.mask(scores)
        if mask is None:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        else:
            scores = scores + mask
        return self.softmax(scores) @ self.value(hidden)  # type: ignore[no-any-return]


class Causal(nn.Module):
    def forward(self, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -math.inf, requires_grad=False).triu(1)


class Masking(nn.Module):
    """Makes a mask of minus infinity, in its own code or by a module, and hands it to each layer."""

    def __init__(self, *layers: nn.Module, mask: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.mask = mask

    def forward(self, hidden: Tensor) -> Tensor:
        mask = torch.full((hidden.shape[1],) * 2, -math.inf).triu(1)
        if self.mask is not None:
            mask = self.mask(mask)
        for layer in self.layers:
            hidden = layer(hidden, mask=mask)
        return hidden


MASKED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "scores": (lambda: nn.Sequential(Scores(), Scores()), ["0.value", "0", "1.value", "1"]),
    "mask_module": (lambda: nn.Sequential(Scores(Causal()), Scores(Causal())), ["0.value", "1.value"]),
    "mask_argument": (lambda: Masking(Scores(), Scores()), ["layers.0.value", "layers.1.value"]),
    "mask_module_argument": (
        lambda: Masking(Scores(), Scores(), mask=Causal()),
        ["layers.0.value", "layers.1.value"],
    ),
    "clamped": (
        lambda: nn.Sequential(Function(lambda hidden: hidden / 0), Function(torch.nan_to_num), nn.Tanh(), nn.Tanh()),
        ["2", "3"],
    ),
    "clamped_by_parent": (
        lambda: nn.Sequential(Clamping(Function(lambda hidden: hidden / 0)), nn.Tanh(), nn.Tanh()),
        ["1", "2"],
    ),
}


class Clamping(nn.Module):
    """Makes what overflowed in its submodule finite, as T5 does in float16."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden.detach()).clamp(-1.0, 1.0) + hidden  # type: ignore[no-any-return]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("name", "place"), [(name, place) for name, (_, places) in MASKED.items() for place in places])
def test_masks_and_what_is_clamped_are_not_blamed_for_a_fault_elsewhere(name: str, place: str, direction: str) -> None:
    model = Chain(MASKED[name][0]())
    with fault(model, f"steps.0.{place}", math.nan, direction):
        origin = trace(model, micro_batch(model, IDS))
    assert found(origin) == (direction, f"steps.0.{place}")


class CheckpointedClamping(Clamping):
    """Runs it again in the backward pass."""

    def __init__(self, inner: nn.Module, is_reentrant: bool) -> None:
        super().__init__(inner)
        self.is_reentrant = is_reentrant

    def forward(self, hidden: Tensor) -> Tensor:
        return checkpoint(super().forward, hidden, use_reentrant=self.is_reentrant)  # type: ignore[no-any-return]


@pytest.mark.parametrize("is_reentrant", [True, False])
def test_what_is_clamped_is_not_blamed_where_it_runs_again(is_reentrant: bool) -> None:
    clamping = CheckpointedClamping(Function(lambda hidden: hidden / 0), is_reentrant)
    model = Chain(nn.Linear(4, 4), clamping, nn.Linear(4, 4))
    with fault(model, "steps.0", math.nan, "backward"):
        assert found(trace(model, micro_batch(model, IDS))) == ("backward", "steps.0")


@pytest.mark.parametrize("place", ["0.softmax", "1.softmax"])
def test_a_softmax_of_masked_scores_is_named_where_its_gradient_fails(place: str) -> None:
    model = Chain(MASKED["scores"][0]())
    with fault(model, f"steps.0.{place}", math.nan, "backward"):
        assert found(trace(model, micro_batch(model, IDS))) == ("backward", f"steps.0.{place}")


@pytest.mark.parametrize("name", MASKED)
def test_masks_and_what_is_clamped_are_no_fault(name: str) -> None:
    model = Chain(MASKED[name][0]())
    if name == "clamped":
        model.steps[0][0].function = lambda hidden: hidden.detach() / 0
    assert found(trace(model, micro_batch(model, IDS))) == (None, None)


def test_a_mask_of_minus_infinity_among_the_data_is_no_fault() -> None:
    model = make("bert")
    inputs: dict[str, Tensor] = batch()
    mask = torch.zeros(3, 1, 16, 16).masked_fill(torch.ones(16, 16).triu(9).bool(), -math.inf)
    inputs["attention_mask"] = mask
    assert found(trace(model, micro_batch(model, inputs))) == (None, None)
    with fault(model, "bert.encoder.layer.0.attention.self", math.nan, "forward"):
        assert trace(model, micro_batch(model, inputs)).module == "bert.encoder.layer.0.attention.self"


# Whatever comes in and goes out


@dataclass
class Pair:
    """An output of one's own."""

    first: Tensor
    rest: list[dict[str, Tensor]]


class Nested(nn.Module):
    """Takes keywords and gives a dataclass with tensors deep inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, *, states: dict[str, tuple[Tensor, ...]]) -> Pair:
        (hidden,) = states["now"]
        return Pair(hidden * 1.0, [{"again": self.inner(hidden).log()}])


class Unpacks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nested = Nested()

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.nested(states={"now": (hidden,)})
        return output.rest[0]["again"] + output.first  # type: ignore[no-any-return]


def test_tensors_deep_inside_arguments_and_outputs_are_seen() -> None:
    model = Chain(Unpacks())
    origin = trace(model, micro_batch(model, IDS))
    assert found(origin) == ("forward", "steps.0.nested")
    assert "after its submodule inner (rest.0.again " in origin.message


def test_who_calls_it_may_have_gradients_switched_off() -> None:
    model = Chain(nn.Linear(4, 4))
    with fault(model, "steps.0", math.nan, "backward"), torch.no_grad():
        assert found(trace(model, micro_batch(model, IDS))) == ("backward", "steps.0")
        assert not torch.is_grad_enabled()


def test_code_that_works_in_place_runs_as_before() -> None:
    in_place = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), Function(lambda hidden: hidden.mul_(2).add_(1)))
    model = Chain(in_place, Function(lambda hidden: hidden.chunk(2, -1)[0].repeat(1, 1, 2)))
    once = micro_batch(model, IDS)
    assert found(trace(model, once)) == (None, None)
    with fault(model, "steps.0.1", math.nan, "backward"):
        assert found(trace(model, once)) == ("backward", "steps.0.1")


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("part", ["lora_A.default", "lora_B.default", "base_layer"])
def test_an_adapter_on_a_frozen_model_is_named(part: str, direction: str) -> None:
    config = peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    model = peft.get_peft_model(make("gpt2"), config)
    place = f"base_model.model.transformer.h.1.attn.c_attn.{part}"
    with fault(model, place, math.nan, direction):
        origin = trace(model, micro_batch(model, batch()))
    assert found(origin) == (direction, place)


def test_a_sparse_gradient_is_looked_at() -> None:
    model = Chain(nn.Linear(4, 4))
    model.embedding = nn.Embedding(VOCABULARY, 4, sparse=True)
    assert found(trace(model, micro_batch(model, IDS))) == (None, None)
    with fault(model, "embedding", math.nan, "backward"):
        assert found(trace(model, micro_batch(model, IDS))) == ("backward", "embedding")


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_traced_and_not_compiled_again(in_place: bool) -> None:
    compilations: list[None] = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        compilations.append(None)
        return graph.forward

    torch._dynamo.reset()
    model = Chain(nn.Linear(4, 4), Function(lambda hidden: torch.log(hidden - hidden.detach().max())))
    if in_place:
        model.compile(backend=backend)
    compiled: Any = model if in_place else torch.compile(model, backend=backend)
    once = micro_batch(compiled, IDS)
    once.run()
    count = len(compilations)
    assert count > 0
    assert found(trace(compiled, once)) == ("forward", "steps.1")
    once.run()
    assert len(compilations) == count


def test_under_ddp_with_gradients_in_its_buckets_they_are_left_as_they_were() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain = Chain(nn.Linear(4, 4))
        model = nn.parallel.DistributedDataParallel(plain, gradient_as_bucket_view=True)
        for _ in range(2):  # the buckets are made anew after the first backward pass
            plain.zero_grad()
            micro_batch(model, {"input_ids": torch.tensor([[7, 8, 9]])}).run()
        gradients = [weight.grad for weight in plain.parameters()]
        before = [gradient.clone() for gradient in gradients if gradient is not None]
        with fault(plain, "steps.0", math.nan, "backward"):
            assert found(trace(model, micro_batch(model, IDS))) == ("backward", "steps.0")
        assert all(weight.grad is gradient for weight, gradient in zip(plain.parameters(), gradients, strict=True))
        assert all(same(one, other) for one, other in zip(gradients, before, strict=True))
    finally:
        leave_group()


# Everything is left as it was


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a replay could change: tensors as copies, objects by their identity."""
    modules = dict(model.named_modules())
    weights = dict(model.named_parameters())
    generators = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]
    return {
        "weights": {name: weight.tolist() for name, weight in weights.items()},
        "gradients": {name: id(weight.grad) for name, weight in weights.items()},
        "values": {name: None if weight.grad is None else weight.grad.tolist() for name, weight in weights.items()},
        "requires_grad": {name: weight.requires_grad for name, weight in weights.items()},
        "buffers": {name: (id(buffer), buffer.tolist()) for name, buffer in model.named_buffers()},
        "training": {name: module.training for name, module in modules.items()},
        "hooks": {
            name: [len(hooks) for key, hooks in vars(module).items() if "hooks" in key and hooks is not None]
            for name, module in modules.items()
        },
        "generators": generators,
    }


@pytest.mark.parametrize("ends", ["well", "with_a_fault", "before", "after"])
def test_everything_is_left_as_it_was(ends: str) -> None:
    model = Chain(nn.Linear(4, 4), nn.Flatten(0, 1), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model.register_buffer("wide", torch.ones(1).expand(5))
    model.steps[3].eval()
    model.head.bias.requires_grad_(False)
    micro_batch(model, IDS).run()
    model.head.weight.grad = None
    plain = micro_batch(model, IDS)

    def run() -> object:
        model.train()
        if ends == "before":
            raise MemoryError("no memory left")
        random.random(), np.random.rand()
        result = plain.run()
        if ends == "after":
            raise MemoryError("no memory left")
        return result

    random.random(), np.random.rand(), torch.rand(1)
    before = everything(model)
    with fault(model, "steps.2", math.nan if ends == "with_a_fault" else 0.0, "backward"):
        origin = trace(model, MicroBatch(run, IDS, plain.random_state))
    assert everything(model) == before
    assert found(origin) == (("backward", "steps.2") if ends == "with_a_fault" else (None, None))
    if ends in ("before", "after"):
        assert origin.message == "the replay of the micro-batch failed with MemoryError: no memory left"
        assert "transient" not in origin.message


def test_no_hook_is_left_on_a_graph_that_somebody_keeps() -> None:
    model = Chain(nn.Linear(4, 4))
    kept: list[Tensor] = []

    def run() -> object:
        kept.append(model(**IDS)["loss"])
        return kept[0]

    trace(model, MicroBatch(run, IDS, RandomState.capture()))
    todo: list[Any] = [kept[0].grad_fn]
    nodes: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [following for following, _ in node.next_functions]
    hooks = [register(lambda *_: None) for node in nodes for register in (node.register_hook, node.register_prehook)]
    assert len(nodes) > 8
    assert [len(handle.hooks_dict_ref()) for handle in hooks] == [1] * len(hooks)  # only the one that came now


def test_an_interrupt_of_the_user_gets_through_and_leaves_everything_as_it_was() -> None:
    model = Chain(nn.Linear(4, 4))
    before = everything(model)

    def run() -> object:
        model(**IDS)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace(model, MicroBatch(run, IDS, RandomState.capture()))
    assert everything(model) == before


def test_a_replay_that_does_not_run_the_model_says_so() -> None:
    origin = trace(Chain(), MicroBatch(lambda: None, {}, RandomState.capture()))
    assert found(origin) == (None, None)
    assert "no module of the model" in origin.message


# The batch on disk


def test_the_inputs_are_saved_with_what_is_no_tensor(tmp_path: Path) -> None:
    ids = torch.arange(12).view(3, 4)
    inputs = {
        "input_ids": ids,
        "labels": ids,
        "turned": torch.rand(3, 4).t(),
        "past": ({"key": torch.ones(2).half()}, {"key": torch.zeros(2, requires_grad=True)}),
        "use_cache": False,
        "scale": 0.5,
        "none": None,
        "array": np.arange(3),
        "odd": object,
    }
    path = tmp_path / "some" / "where" / "batch.safetensors"
    save(MicroBatch(lambda: None, inputs, RandomState.capture()), path)
    tensors = load_file(path)
    assert set(tensors) == {"input_ids", "labels", "turned", "past.0.key", "past.1.key"}
    assert torch.equal(tensors["labels"], ids)
    assert torch.equal(tensors["turned"], inputs["turned"])  # type: ignore[arg-type]
    assert tensors["past.0.key"].dtype == torch.float16
    with safe_open(path, "pt") as file:
        rest = json.loads(file.metadata()["inputs"])
    assert rest == {
        "use_cache": False,
        "scale": 0.5,
        "none": None,
        "array": [0, 1, 2],
        "odd": "<class 'object'>",
    }


def test_a_batch_that_cannot_be_written_is_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where the directory should be")
    with pytest.raises(OSError, match="file"):
        save(MicroBatch(lambda: None, batch(), RandomState.capture()), tmp_path / "file" / "batch.safetensors")
