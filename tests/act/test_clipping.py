"""Each clipping rule does what its paper says, along the gradients of a real training with spikes in it."""

from __future__ import annotations

import copy
import doctest
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import zclip
from pytorch_optimizer import AdaGC as ReferenceAdaGC
from torch import Tensor, nn

from hf_gradguard.act import clipping
from hf_gradguard.act.clipping import ClipPolicy, Gradient, HostClip, Outcome, policies, read_units
from hf_gradguard.observe.norms import NO_GRADIENT, Measurement
from hf_gradguard.observe.structure import read_layout
from tests.models import language_data, make

STEPS = 90
SPIKES = {35: 40.0, 36: 6.0, 62: 3.0, 80: 500.0}
"""The whole gradient of these updates is so many times larger."""
LONE_SPIKE = (70, "transformer.h.1.mlp.c_fc.weight", 100.0)
"""In this update one parameter's gradient is."""
MISSING = (range(15, 18), "transformer.h.2.mlp.c_proj.bias")
"""In these updates this parameter has no gradient."""


@dataclass
class Step:
    weights: list[Tensor]
    gradients: list[Tensor | None]


class Replay:
    """A model that is put back to what it was at each update of a recorded training."""

    def __init__(self, model: nn.Module, steps: Sequence[Step]) -> None:
        self.model = model
        self.steps = steps
        self.layout, self.parameters = read_layout(model)
        self.names = [info.name for info in self.layout.parameters]
        self.units = read_units(model, self.layout, self.parameters)

    def gradient(self) -> Gradient:
        """Of what lies in `.grad` now."""
        norms = Measurement(self.parameters).norms()
        return Gradient(self.parameters, self.names, self.layout.group_of, norms, self.units)

    def at(self, index: int) -> Gradient:
        """Of the update with this index."""
        step = self.steps[index]
        for parameter, weight, gradient in zip(self.parameters, step.weights, step.gradients, strict=True):
            parameter.data.copy_(weight)
            parameter.grad = None if gradient is None else gradient.clone()
        return self.gradient()

    def clipped(self, rule: ClipPolicy, index: int) -> list[Tensor | None]:
        """The gradients of an update after a rule had its way."""
        gradient = self.at(index)
        clip = rule.clip(gradient)
        if clip is not None:
            clip.apply(gradient)
        return [parameter.grad for parameter in self.parameters]


def record(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> list[Step]:
    """Trains the model and keeps weights and gradients of every update, with the spikes put into the latter."""
    layout, parameters = read_layout(model)
    names = [info.name for info in layout.parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    steps = []
    for index, batch in enumerate(batches):
        model(**batch).loss.backward()
        gradients = [parameter.grad * SPIKES.get(index, 1.0) for parameter in parameters]
        if index == LONE_SPIKE[0]:
            gradients[names.index(LONE_SPIKE[1])] *= LONE_SPIKE[2]
        missing = MISSING[1] if index in MISSING[0] else None
        steps.append(
            Step(
                [parameter.detach().clone() for parameter in parameters],
                [None if name == missing else gradient for name, gradient in zip(names, gradients, strict=True)],
            )
        )
        optimizer.step()
        optimizer.zero_grad()
    return steps


@pytest.fixture(scope="module")
def replay() -> Replay:
    data = language_data(8 * STEPS)
    batches = [
        {key: torch.stack([row[key] for row in data[start : start + 8]]) for key in ("input_ids", "labels")}
        for start in range(0, len(data), 8)
    ]
    model = make("gpt2")
    return Replay(model, record(model, batches))


def norm(gradients: Sequence[Tensor | None]) -> float:
    """In float64, from the definition."""
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients if gradient is not None))


def copies(replay: Replay, index: int) -> list[nn.Parameter]:
    """The recorded weights and gradients of an update in parameters of their own."""
    step = replay.steps[index]
    parameters = [nn.Parameter(weight.clone()) for weight in step.weights]
    for parameter, gradient in zip(parameters, step.gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    return parameters


def assert_same(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], rtol: float = 2e-6) -> None:
    """Gradients are equal but for rounding, also where they are small."""
    assert [gradient is None for gradient in found] == [gradient is None for gradient in expected]
    for one, other in zip(found, expected, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one.double(), other.double(), rtol=rtol, atol=1e-12)


def is_changed(found: Sequence[Tensor | None], replay: Replay, index: int) -> bool:
    pairs = zip(found, replay.steps[index].gradients, strict=True)
    return any(one is not None and other is not None and not torch.equal(one, other) for one, other in pairs)


# Each rule against an independent implementation


def test_global_is_torchs_own_clip(replay: Replay) -> None:
    limit = float(np.median([norm(step.gradients) for step in replay.steps]))
    rule = policies.parse(f"global:max_norm={limit}")
    changed = 0
    for index in range(STEPS):
        expected = copies(replay, index)
        torch.nn.utils.clip_grad_norm_(expected, limit)
        found = replay.clipped(rule, index)
        # torch's float32 norm is off by up to 9e-6 itself
        assert_same(found, [parameter.grad for parameter in expected], rtol=1e-5)
        changed += is_changed(found, replay, index)
    assert changed == STEPS // 2


def test_none_changes_nothing(replay: Replay) -> None:
    rule = policies.parse("none")
    assert not any(is_changed(replay.clipped(rule, index), replay, index) for index in range(STEPS))


def test_layer_clips_each_layer_as_if_it_were_alone(replay: Replay) -> None:
    limit = 0.5
    layers = [[i for i, info in enumerate(replay.layout.parameters) if info.group == g] for g in range(5)]
    reduced = np.zeros(len(layers))
    for index in range(STEPS):
        gradients = replay.steps[index].gradients
        expected = list(gradients)
        for layer, members in enumerate(layers):
            size = norm([gradients[member] for member in members])
            if size + 1e-6 <= limit:
                continue
            reduced[layer] += 1
            for member in members:
                gradient = gradients[member]
                expected[member] = None if gradient is None else gradient.double() * limit / (size + 1e-6)
        assert_same(replay.clipped(policies.parse(f"layer:max_norm={limit}"), index), expected)
    assert len(replay.layout.groups) == len(layers)
    assert 0 < reduced.min() < reduced.max() < STEPS


def percentile(values: Sequence[float], share: float) -> float:
    """With linear interpolation between the two values nearest to it."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * share / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


@pytest.mark.parametrize("share", [0, 10, 63, 100])
@pytest.mark.parametrize("window", [1000, 20])
def test_autoclip_clips_to_the_percentile_of_all_norms_so_far(replay: Replay, share: float, window: int) -> None:
    rule = policies.parse(f"autoclip:percentile={share},window={window}")
    history: list[float] = []
    changed = 0
    for index in range(STEPS):
        gradients = replay.steps[index].gradients
        history.append(norm(gradients))
        threshold = percentile(history[-window:], share)
        factor = min(1.0, threshold / history[-1])
        found = replay.clipped(rule, index)
        assert_same(found, [None if gradient is None else gradient.double() * factor for gradient in gradients])
        changed += is_changed(found, replay, index)
    assert changed == 0 if share == 100 else changed > 10
    assert changed > STEPS / 2 or share > 10


@pytest.mark.parametrize("limit", [None, 1.0])
def test_zclip_is_the_authors_package(replay: Replay, limit: float | None) -> None:
    rule = clipping.ZClip(max_norm=limit)
    reference = zclip.ZClip(max_grad_norm=limit)
    changed = []
    for index in range(STEPS):
        model = nn.Module()
        for position, parameter in enumerate(copies(replay, index)):
            model.register_parameter(str(position), parameter)
        reference.step(model)
        found = replay.clipped(rule, index)
        assert_same(found, [parameter.grad for parameter in model.parameters()], rtol=1e-5)
        if is_changed(found, replay, index):
            changed.append(index)
        assert rule.mean == (None if reference.mean is None else pytest.approx(reference.mean, rel=1e-5))
        if rule.mean is not None:
            assert rule.variance == pytest.approx(reference.var, rel=1e-4)
    assert set(SPIKES) <= set(changed)
    assert len(changed) < STEPS / 2 if limit is None else changed[0] < 25


def test_adagc_is_what_another_implementation_makes_of_the_paper(replay: Replay) -> None:
    warmup = 20
    rule = policies.parse(f"adagc:warmup_steps={warmup},lambda_abs=0.8,lambda_rel=1.1,beta=0.9")
    weights = [nn.Parameter(weight.clone()) for weight in replay.steps[0].weights]
    # Its warm-up ends an update early. Without momentum it keeps the clipped gradient itself in `exp_avg`.
    options = {"warmup_steps": warmup + 1, "lambda_abs": 0.8, "lambda_rel": 1.1, "beta": 0.9}
    reference = ReferenceAdaGC(weights, betas=(0.0, 0.999), weight_decay=0.0, **options)
    changed = []
    for index in range(STEPS):
        for weight, gradient in zip(weights, replay.steps[index].gradients, strict=True):
            weight.grad = None if gradient is None else gradient.clone()
        reference.step()
        expected = [None if weight.grad is None else reference.state[weight]["exp_avg"] for weight in weights]
        found = replay.clipped(rule, index)
        assert_same(found, expected, rtol=1e-5)
        if is_changed(found, replay, index):
            changed.append(index)
    assert 0 < sum(index < warmup for index in changed) < warmup
    assert LONE_SPIKE[0] in changed


def test_adagc_follows_the_papers_equations_in_float64(replay: Replay) -> None:
    warmup, absolute, relative, beta = 30, 1.0, 1.04, 0.99
    rule = clipping.AdaGC(warmup_steps=warmup)
    gamma: dict[int, float] = {}
    for index in range(STEPS):
        gradients = replay.steps[index].gradients
        expected = []
        for position, gradient in enumerate(gradients):
            if gradient is None:
                expected.append(None)
                continue
            size = norm([gradient])
            if index < warmup:
                factor = min(absolute / norm(gradients), 1.0)
                gamma[position] = min(gamma.get(position, math.inf), factor * size)
            else:
                factor = min(relative * gamma[position] / size, 1.0)
                gamma[position] = beta * gamma[position] + (1 - beta) * factor * size
            expected.append(gradient.double() * factor)
        assert_same(replay.clipped(rule, index), expected)
    assert list(rule.averages.values()) == pytest.approx(list(gamma.values()), rel=1e-6)


# What a clip tells


def test_the_outcome_names_what_was_reduced_most(replay: Replay) -> None:
    index, name, _ = LONE_SPIKE
    position = replay.names.index(name)
    group = replay.layout.parameters[position].group
    gradients = replay.steps[index].gradients
    size = norm([gradients[position]])
    adagc = clipping.AdaGC(warmup_steps=30)
    for before in range(index):
        adagc.clip(replay.at(before))
    outcomes = {}
    for rule in (adagc, clipping.Layer(0.2), clipping.GlobalNorm(0.2)):
        clip = rule.clip(replay.at(index))
        assert clip is not None
        outcomes[type(rule).__name__] = clip.outcome()
    found: Outcome = outcomes["AdaGC"]
    assert (found.parameter, found.group) == (position, None)
    assert found.value == pytest.approx(size, rel=1e-6)
    assert found.coefficient * found.value == pytest.approx(found.threshold)
    assert found.coefficient < 0.1
    assert (outcomes["Layer"].parameter, outcomes["Layer"].group) == (None, group)
    members = [gradients[i] for i, info in enumerate(replay.layout.parameters) if info.group == group]
    assert outcomes["Layer"].value == pytest.approx(norm(members), rel=1e-6)
    whole = Outcome(0.2 / (norm(gradients) + 1e-6), norm(gradients), 0.2)
    assert outcomes["GlobalNorm"].coefficient == pytest.approx(whole.coefficient, rel=1e-6)
    assert (outcomes["GlobalNorm"].parameter, outcomes["GlobalNorm"].threshold) == (None, 0.2)


# State

RULES = [
    "none",
    "global:max_norm=0.5",
    "layer:max_norm=0.2",
    "agc:clipping=0.05",
    "autoclip:percentile=40,window=30",
    "zclip:warmup_steps=20,max_norm=none",
    "adagc:warmup_steps=20,lambda_rel=1.2",
]


def decisions(rule: ClipPolicy, replay: Replay, start: int, stop: int) -> list[Any]:
    """Factors of each update, exactly; None where nothing is clipped."""
    found = []
    for index in range(start, stop):
        clip = rule.clip(replay.at(index))
        factors = [] if clip is None else clip.factors
        found.append([factor.tolist() if isinstance(factor, Tensor) else factor for factor in factors])
    return found


@pytest.mark.parametrize("text", RULES)
@pytest.mark.parametrize("pause", [7, 45])
def test_a_rule_restored_from_json_decides_as_if_never_interrupted(replay: Replay, text: str, pause: int) -> None:
    rule = policies.parse(text)
    decisions(rule, replay, 0, pause)
    restored = policies.parse(text)
    restored.load_state_dict(json.loads(json.dumps(rule.state_dict(), allow_nan=False)))
    assert restored == rule
    expected = decisions(rule, replay, pause, STEPS)
    assert decisions(restored, replay, pause, STEPS) == expected
    assert any(expected) == (text != "none")


def test_a_longer_history_than_the_window_keeps_the_latest(replay: Replay) -> None:
    rule, restored = clipping.AutoClip(window=50), clipping.AutoClip(window=10)
    decisions(rule, replay, 0, 30)
    restored.load_state_dict(rule.state_dict())
    latest = [norm(replay.steps[index].gradients) for index in range(20, 30)]
    assert list(restored.norms) == pytest.approx(latest, rel=1e-6)


def gradient_of(norms: Sequence[float], names: Sequence[str] | None = None) -> Gradient:
    """A gradient of one-element parameters with these norms."""
    parameters = [nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in norms]
    for parameter, size in zip(parameters, norms, strict=True):
        parameter.grad = None if size == NO_GRADIENT else torch.full((1,), size, dtype=torch.float64)
    return Gradient(
        parameters,
        names or [f"p{index}" for index in range(len(norms))],
        np.zeros(len(norms), dtype=np.int64),
        np.array(norms, dtype=np.float64),
        clipping.Units(((),) * len(norms), frozenset()),
    )


@pytest.mark.parametrize("text", RULES)
@pytest.mark.parametrize(
    "norms", [(math.nan, 1.0), (math.inf, 1.0), (math.nan, math.inf), (0.0, 0.0), (NO_GRADIENT, NO_GRADIENT)]
)
@pytest.mark.parametrize("seen", [0, 3, 25])
def test_what_is_not_finite_or_nothing_at_all_is_neither_clipped_nor_remembered(
    text: str, norms: tuple[float, float], seen: int
) -> None:
    rule = policies.parse(text)
    for size in range(seen):
        rule.clip(gradient_of((1.0 + size, 2.0)))
    before = copy.deepcopy(rule.state_dict())
    assert rule.clip(gradient_of(norms)) is None
    assert rule.state_dict() == before


@pytest.mark.parametrize("text", RULES)
def test_parameters_without_gradient_change_no_decision_and_stay_without(text: str) -> None:
    with_hole, alone = policies.parse(text), policies.parse(text)
    for size in (3.0, 1.0, 2.0, 9.0, 4.0) * 5:
        hole = gradient_of((size, NO_GRADIENT, 2.0), ["a", "b", "c"])
        dense = gradient_of((size, 2.0), ["a", "c"])
        clips = with_hole.clip(hole), alone.clip(dense)
        for clip, gradient in zip(clips, (hole, dense), strict=True):
            if clip is not None:
                clip.apply(gradient)
        a, b, c = (parameter.grad for parameter in hole.parameters)
        assert b is None
        assert [a, c] == [parameter.grad for parameter in dense.parameters]
    assert with_hole.state_dict() == alone.state_dict()


def test_zclip_recovers_from_a_nan_that_freezes_the_package() -> None:
    rule, package = clipping.ZClip(warmup_steps=3, max_norm=None), zclip.ZClip(warmup_steps=3, max_grad_norm=None)
    model = nn.Linear(1, 1, bias=False)
    for size in (1.0, 1.2, 0.8, 1.1, math.nan, 1.0, 50.0):
        model.weight.grad = torch.full((1, 1), size)
        package.step(model)
        last = rule.clip(gradient_of((size,)))
    assert math.isnan(package.mean)
    assert last is not None
    assert last.factors[0] < 0.05


# AdaGC where the paper is silent


def test_adagc_does_not_freeze_a_parameter_whose_first_gradient_is_zero() -> None:
    rule = clipping.AdaGC(warmup_steps=3)
    rule.clip(gradient_of((0.5, 0.0)))
    for _ in range(5):
        clip = rule.clip(gradient_of((0.5, 0.5)))
        assert clip is None
    assert rule.averages == pytest.approx({"p0": 0.5, "p1": 0.5})


def test_adagc_clips_a_parameter_first_seen_after_the_warm_up_as_in_the_warm_up() -> None:
    rule = clipping.AdaGC(warmup_steps=2, lambda_abs=1.0)
    for _ in range(4):
        rule.clip(gradient_of((0.3, NO_GRADIENT)))
    clip = rule.clip(gradient_of((0.3, 4.0)))
    assert clip is not None
    factor = 1 / math.hypot(0.3, 4.0)
    assert clip.factors == pytest.approx([1.0, factor])
    assert rule.averages == pytest.approx({"p0": 0.3, "p1": 4.0 * factor})


def test_a_gradient_of_the_largest_norms_has_a_finite_total() -> None:
    assert gradient_of((3e200, NO_GRADIENT, 4e200)).total_norm == pytest.approx(5e200)


# Options


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("global:max_norm=0", "max_norm=0.0 must be above 0"),
        ("global:max_norm=-1", "max_norm=-1.0 must be above 0"),
        ("global:max_norm=nan", "max_norm=nan must be above 0"),
        ("global:max_norm=inf", "max_norm=inf must be above 0 and finite"),
        ("layer:max_norm=-1", "max_norm=-1.0 must be above 0"),
        ("agc:clipping=0", "clipping=0.0 must be above 0"),
        ("agc:eps=0", "eps=0.0 must be above 0"),
        ("agc:head=perhaps", "head='perhaps' must be true or false"),
        ("autoclip:percentile=101", "percentile=101.0 must be from 0 to 100"),
        ("autoclip:percentile=-1", "percentile=-1.0 must be from 0 to 100"),
        ("autoclip:window=0", "window=0 must be a whole number of at least 1"),
        ("zclip:alpha=1", "alpha=1.0 must be from 0 to below 1"),
        ("zclip:z_thresh=0", "z_thresh=0.0 must be above 0"),
        ("zclip:max_norm=0", "max_norm=0.0 must be above 0"),
        ("zclip:warmup_steps=0", "warmup_steps=0 must be a whole number of at least 1"),
        ("adagc:beta=1", "beta=1.0 must be from 0 to below 1"),
        ("adagc:lambda_rel=0.9", "lambda_rel=0.9 must be at least 1"),
        ("adagc:lambda_abs=0", "lambda_abs=0.0 must be above 0"),
        ("adagc:warmup_steps=0", "warmup_steps=0 must be a whole number of at least 1"),
        ("adagc:averages=1", "unknown option 'averages'"),
        ("zlip", "did you mean 'zclip'?"),
    ],
)
def test_an_impossible_option_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match="clip") as error:
        policies.parse(text)
    assert words in str(error.value)


@pytest.mark.parametrize("name", [name for name in policies.names() if name != policies.absent])
def test_the_text_of_a_rule_makes_an_equal_one(name: str) -> None:
    rule = policies.parse(name)
    assert policies.parse(policies.text(rule)) == rule


def test_a_rule_of_ones_own_is_one_small_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "_policies", dict(policies._policies))  # it is forgotten after the test
    (example,) = doctest.DocTestFinder(recurse=False).find(clipping)
    results = doctest.DocTestRunner().run(example, clear_globs=False)  # the rule needs its imports
    assert (results.attempted, results.failed) == (4, 0)
    rule = policies.parse("first_norm:factor=2")
    assert rule.clip(gradient_of((3.0,))) is None
    clip = rule.clip(gradient_of((12.0,)))
    assert isinstance(clip, HostClip)
    assert clip.factors == [0.5]
