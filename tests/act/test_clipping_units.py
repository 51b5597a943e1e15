"""AGC clips each unit relative to its weights, and a unit is what makes one output of a layer."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from pytorch_optimizer.optimizer import agc as reference_agc
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_gradguard.act.clipping import AGC, Units, read_units
from hf_gradguard.observe.structure import read_layout
from tests.act.test_clipping import Replay, assert_same, copies, is_changed, record
from tests.counters import Counters
from tests.models import VOCABULARY, language_data, make

STEPS = 60


class LinearModel(nn.Module):
    """Linear layers with a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 40)
        self.norm = nn.LayerNorm(40)
        self.middle = nn.Linear(40, 24)
        self.last = nn.Linear(24, 8)
        nn.init.zeros_(self.last.weight)  # their units begin at the smallest norm that is allowed for

    def forward(self, inputs: Tensor, labels: Tensor) -> Any:
        outputs = self.last(self.middle(self.norm(self.first(inputs)).relu()).relu())
        return SimpleNamespace(loss=(outputs - labels).square().mean())


@pytest.fixture(scope="module")
def linear() -> Replay:
    torch.manual_seed(0)
    model = LinearModel()
    true = torch.randn(16, 8)
    inputs = [torch.randn(4, 16) for _ in range(STEPS)]
    return Replay(model, record(model, [{"inputs": batch, "labels": batch @ true} for batch in inputs]))


@pytest.fixture(scope="module")
def gpt2() -> Replay:
    data = language_data(4 * STEPS)
    batches = [
        {key: torch.stack([row[key] for row in data[start : start + 4]]) for key in ("input_ids", "labels")}
        for start in range(0, len(data), 4)
    ]
    model = make("gpt2")
    return Replay(model, record(model, batches))


def timms_agc() -> ModuleType:
    """timm's file for itself: the package wants a torchvision that fits torch."""
    try:
        path = distribution("timm").locate_file("timm/utils/agc.py")
    except PackageNotFoundError:
        pytest.skip("timm is not installed")
    spec = importlib.util.spec_from_file_location("timm_agc", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("limit", [0.01, 0.3])
def test_agc_is_timms_for_linear_layers(linear: Replay, limit: float) -> None:
    timm = timms_agc()
    changed = 0
    for index in range(STEPS):
        expected = copies(linear, index)
        timm.adaptive_clip_grad(expected, clip_factor=limit)
        found = linear.clipped(AGC(limit, head=True), index)
        assert_same(found, [parameter.grad for parameter in expected])
        changed += is_changed(found, linear, index)
    assert changed > STEPS / 2


@pytest.mark.parametrize("limit", [0.05, 0.3])
def test_agc_is_another_implementations_for_linear_layers(linear: Replay, limit: float) -> None:
    partly = 0
    for index in range(STEPS):
        expected = [reference_agc(p, p.grad, agc_clip_val=limit).detach() for p in copies(linear, index)]
        found = linear.clipped(AGC(limit, head=True), index)
        assert_same(found, expected)
        units = [row for row in range(40) if torch.equal(found[0][row], linear.steps[index].gradients[0][row])]
        partly += 0 < len(units) < 40
    assert partly > 5


def test_the_units_of_a_conv1d_are_its_columns(gpt2: Replay) -> None:
    partly = 0
    for index in range(STEPS):
        found = gpt2.clipped(AGC(0.05), index)
        expected = []
        for position, parameter in enumerate(copies(gpt2, index)):
            is_conv = gpt2.names[position].endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
            gradient = parameter.grad
            if gradient is not None and gpt2.names[position] != "transformer.wte.weight":
                weight, gradient = (parameter.T, gradient.T) if is_conv else (parameter, gradient)
                gradient = reference_agc(weight, gradient, agc_clip_val=0.05).detach()
                gradient = gradient.T if is_conv else gradient
            expected.append(gradient)
            partly += is_conv and not torch.equal(found[position], gpt2.steps[index].gradients[position])
        assert_same(found, expected)
    assert partly > 10


def test_the_final_linear_layer_is_clipped_only_where_that_is_asked_for(linear: Replay) -> None:
    last = [linear.names.index(name) for name in ("last.weight", "last.bias")]
    for index in range(1, STEPS, 7):
        recorded = linear.steps[index].gradients
        default = linear.clipped(AGC(1e-4), index)
        assert [torch.equal(default[position], recorded[position]) for position in last] == [True, True]
        assert not torch.equal(default[0], recorded[0])
        both = linear.clipped(AGC(1e-4, head=True), index)
        assert [torch.equal(both[position], recorded[position]) for position in last] == [False, False]


def test_only_gradients_with_a_unit_over_its_limit_are_multiplied(linear: Replay) -> None:
    index = 40
    with Counters(linear.parameters) as counters:
        assert AGC(1e6).clip(linear.at(index)) is None
    assert counters.counts["gradient_writes"] == 0
    gradient = linear.at(index)
    rule = AGC(0.3)
    clip = rule.clip(gradient)
    assert clip is not None
    over = [position for position, factor in enumerate(clip.factors) if factor is not None]
    with Counters(linear.parameters) as counters:
        clip.apply(gradient)
    size = sum(linear.parameters[position].numel() * 4 for position in over)
    assert 0 < len(over) < 6
    assert counters.counts["gradient_writes"] == size
    assert counters.counts["waits"] == 0


def test_the_outcome_is_the_ratio_of_the_worst_unit(linear: Replay) -> None:
    clip = AGC(0.01, head=True).clip(linear.at(20))
    assert clip is not None
    found = clip.outcome()
    assert found is not None
    ratios = []
    for parameter in copies(linear, 20):
        weight, gradient = parameter.detach().double().numpy(), parameter.grad.double().numpy()
        axis = 1 if weight.ndim == 2 else None
        floor = np.maximum(np.linalg.norm(weight, axis=axis), 1e-3)
        ratios.append(float(np.max(np.linalg.norm(gradient, axis=axis) / floor)))
    assert found.parameter == int(np.argmax(ratios))
    assert found.value == pytest.approx(max(ratios), rel=1e-5)
    assert found.coefficient == pytest.approx(0.01 / max(ratios), rel=1e-5)
    assert found.threshold == 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [nn.Linear(20_000, 3, bias=False), Conv1D(3, 20_000)])
def test_units_of_16_bits_are_measured_in_float32(layer: nn.Module, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.Linear(3, 2)).to(dtype)
    weight = model[0].weight
    others = 1 if isinstance(layer, nn.Linear) else 0
    gradient = (torch.rand(weight.shape) + 0.5).to(dtype)
    weight.grad = gradient.clone()
    replay = Replay(model, [])
    clip = AGC(0.01).clip(replay.gradient())
    assert clip is not None
    clip.apply(replay.gradient())
    exact_weight, exact = weight.detach().double(), gradient.double()
    limit = 0.01 * exact_weight.norm(dim=others, keepdim=True).clamp(min=1e-3)
    expected = exact * limit / exact.norm(dim=others, keepdim=True)
    # Beyond the norm's own rounding, half a unit in the last place; float16 has fewer digits where it is very small.
    torch.testing.assert_close(weight.grad.double(), expected, rtol=torch.finfo(dtype).eps / 2 + 1e-5, atol=1e-7)


def test_a_gradient_whose_squares_leave_float32_is_clipped_and_not_lost() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2))
    nn.init.ones_(model[0].weight)
    model[0].weight.grad = torch.full((3, 4), 1e30)
    replay = Replay(model, [])
    gradient = replay.gradient()
    clip = AGC(0.01).clip(gradient)
    assert clip is not None
    clip.apply(gradient)
    torch.testing.assert_close(model[0].weight.grad, torch.full((3, 4), 0.01))


@pytest.mark.parametrize("is_coalesced", [True, False])
def test_rows_of_a_sparse_gradient_are_units(is_coalesced: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 4), nn.Linear(4, 2))
    sparse = torch.sparse_coo_tensor([[7, 2, 7]], torch.randn(3, 4) * torch.tensor([[1.0], [1e-4], [1.0]]), (10, 4))
    dense = sparse.to_dense()
    weight = model[0].weight
    weight.grad = sparse.coalesce() if is_coalesced else sparse
    gradient = Replay(model, []).gradient()
    clip = AGC(0.01).clip(gradient)
    assert clip is not None
    clip.apply(gradient)
    assert weight.grad.layout == torch.sparse_coo
    torch.testing.assert_close(weight.grad.to_dense(), reference_agc(weight, dense).detach())
    assert torch.equal(weight.grad.to_dense()[2], dense[2])


# What a unit is


class Experts(nn.Module):
    """A mixture of experts in one tensor, as Transformers has them."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(4, 6, 8))


class Bare(nn.Module):
    """Parameters that belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.scale = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.scalar = nn.Parameter(torch.randn(()))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(3, 5), {"weight": (0,), "bias": ()}),
        (nn.Embedding(7, 3), {"weight": (0,)}),
        (Conv1D(5, 3), {"weight": (1,), "bias": ()}),
        (nn.Conv2d(3, 5, 2), {"weight": (0,), "bias": ()}),
        (nn.ConvTranspose2d(3, 5, 2), {"weight": (1,), "bias": ()}),
        (nn.Bilinear(3, 4, 5), {"weight": (0,), "bias": ()}),
        (nn.LSTM(3, 5, bias=False), {"weight_ih_l0": (0,), "weight_hh_l0": (0,)}),
        (nn.LayerNorm(4), {"weight": (), "bias": ()}),
        (Experts(is_transposed=False), {"up": (0, 1)}),
        (Experts(is_transposed=True), {"up": (0, 2)}),
        (Bare(), {"positions": (0, 1), "scale": (), "scalar": ()}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_unit_is_what_makes_one_output(module: nn.Module, expected: dict[str, tuple[int, ...]]) -> None:
    layout, parameters = read_layout(module)
    units = read_units(module, layout, parameters)
    names = [info.name for info in layout.parameters]
    assert dict(zip(names, units.dimensions, strict=True)) == expected


@pytest.mark.parametrize("module", [nn.Conv2d(3, 5, 2), nn.ConvTranspose1d(3, 5, 2), Experts(False), Bare()])
def test_every_unit_is_measured_over_all_of_its_weights(module: nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    replay = Replay(module, [])
    before = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    gradient = replay.gradient()
    clip = AGC(0.01, head=True).clip(gradient)
    assert clip is not None
    clip.apply(gradient)
    for (name, parameter), kept in zip(module.named_parameters(), replay.units.dimensions, strict=True):
        others = tuple(d for d in range(parameter.dim()) if d not in kept) or None
        weight, exact = parameter.detach().double().numpy(), before[name].double().numpy()
        size = np.sqrt(np.square(exact).sum(axis=others, keepdims=True))
        limit = 0.01 * np.maximum(np.sqrt(np.square(weight).sum(axis=others, keepdims=True)), 1e-3)
        expected = exact * np.minimum(1.0, limit / size)
        np.testing.assert_allclose(parameter.grad.numpy(), expected, rtol=1e-5)


def final_layer(model: nn.Module) -> list[str]:
    layout, parameters = read_layout(model)
    units: Units = read_units(model, layout, parameters)
    return [layout.parameters[index].name for index in sorted(units.final)]


def classifier(prefix: str, head: str, **options: Any) -> nn.Module:
    config = getattr(tf, f"{prefix}Config")(vocab_size=VOCABULARY, num_labels=3, **options)
    model: nn.Module = getattr(tf, head)(config)
    return model


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (make("gpt2"), ["transformer.wte.weight"]),
        (make("llama"), ["lm_head.weight"]),
        (make("bert"), ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"]),
        (make("t5"), ["shared.weight"]),
        (classifier("Bert", "BertForSequenceClassification", **SMALL), ["classifier.weight", "classifier.bias"]),
        (
            classifier("Roberta", "RobertaForSequenceClassification", **SMALL),
            ["classifier.out_proj.weight", "classifier.out_proj.bias"],
        ),
        (classifier("GPT2", "GPT2ForSequenceClassification", n_embd=16, n_layer=2, n_head=2), ["score.weight"]),
        (classifier("Bert", "BertForQuestionAnswering", **SMALL), ["qa_outputs.weight", "qa_outputs.bias"]),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), ["2.weight", "2.bias"]),
        (nn.DataParallel(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))), ["2.weight", "2.bias"]),
        (nn.Linear(3, 4), []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_final_layer_is_what_makes_the_predictions(model: nn.Module, expected: list[str]) -> None:
    assert final_layer(model) == expected


def test_a_stack_of_layers_without_head_has_no_final_layer() -> None:
    config = tf.BertConfig(vocab_size=VOCABULARY, **SMALL)
    assert final_layer(tf.BertModel(config, add_pooling_layer=False)) == []
