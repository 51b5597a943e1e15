"""The judge of a run speaks when the verdict has changed for good, on recorded runs of real models too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_gradguard.judge import Judge, Stack, Thresholds, Verdict, stacks_of
from hf_gradguard.observe.layout import Group, Layout

FADING = 0.1 ** np.arange(8.0, 0.0, -1.0)
EVEN = np.ones(8)


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    """Norms of evenly chosen layers in the first updates of real runs: models 64 wide that read bytes of English text
    (AdamW, 8 × 64 bytes an update, clipped to a norm of 1, 20 updates of warm-up)."""
    loaded: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "runs.json").read_text())
    return loaded


def replay(run: dict[str, Any]) -> tuple[list[tuple[int, str]], Judge]:
    stacks, start = [], 0
    for stack in run["stacks"]:
        names = tuple(f"{stack['name']} layer {index}".strip() for index in stack["layers"])
        stacks.append(Stack(stack["name"], tuple(range(start, start + len(names))), names))
        start += len(names)
    judge = Judge(stacks)
    changes = []
    for step, (norms, total) in enumerate(zip(run["layer_norms"], run["total_norms"], strict=True), start=1):
        if (verdict := judge.update(norms, total)) is not None:
            changes.append((step, verdict.kind))
    return changes, judge


@pytest.mark.parametrize(
    "name",
    [
        "bert_24_layers_lr_1e-3",
        "bert_100_layers_lr_3e-4",
        "gpt2_100_layers_lr_1e-3",
        "rezero_24_layers_lr_1e-3",
        "t5_12_layers_lr_1e-3",
    ],
)
def test_real_runs_that_train_are_healthy_from_the_first_judgement_on(runs: dict[str, Any], name: str) -> None:
    changes, judge = replay(runs[name])
    assert changes == [(15, "healthy")]
    assert judge.verdict.others == ()


@pytest.mark.parametrize(
    ("name", "step", "layer"), [("bert_100_layers_lr_1e-3", 40, 20), ("bert_100_layers_lr_3e-3", 25, 50)]
)
def test_real_deep_bert_is_called_vanishing_early(runs: dict[str, Any], name: str, step: int, layer: int) -> None:
    changes, judge = replay(runs[name])
    assert [kind for _, kind in changes][-1] == "vanishing"
    assert changes[-1][0] <= step
    assert judge.verdict.layer is not None
    assert int(judge.verdict.layer.removeprefix("layer ")) >= layer


def test_real_run_without_normalisation_and_with_large_weights_is_exploding_towards_the_input(
    runs: dict[str, Any],
) -> None:
    changes, judge = replay(runs["bert_24_layers_no_norm_large_init"])
    assert changes == [(15, "exploding")]
    assert judge.verdict.layer == "layer 0"


def test_real_run_at_an_absurd_learning_rate_is_exploding_over_time(runs: dict[str, Any]) -> None:
    changes, judge = replay(runs["gpt2_12_layers_lr_1"])
    assert changes == [(15, "healthy"), (40, "exploding")]
    assert judge.verdict.layer is None
    assert judge.verdict.threshold == Thresholds().growth


def feed(judge: Judge, norms: np.ndarray, updates: int) -> list[tuple[int, Verdict]]:
    found = []
    for _ in range(updates):
        verdict = judge.update(norms, float(np.linalg.norm(norms)))
        if verdict is not None:
            found.append((judge.history.count, verdict))
    return found


def test_a_verdict_is_told_once_and_then_only_when_it_changes() -> None:
    judge = Judge([Stack.of_depth(8)])
    assert judge.verdict.kind == "unknown"
    assert [(step, verdict.kind) for step, verdict in feed(judge, EVEN, 100)] == [(15, "healthy")]
    assert [verdict.kind for _, verdict in feed(judge, FADING, 100)] == ["vanishing"]
    assert [verdict.kind for _, verdict in feed(judge, EVEN, 100)] == ["healthy"]


def test_a_finding_counts_only_after_as_many_judgements_as_patience_says() -> None:
    steps = {}
    for patience in (1, 2, 4):
        judge = Judge([Stack.of_depth(8)], Thresholds(patience=patience, every=10))
        steps[patience] = [step for step, _ in feed(judge, FADING, 100)]
    assert steps == {1: [10], 2: [20], 4: [40]}


def test_findings_that_take_turns_are_no_verdict() -> None:
    judge = Judge([Stack.of_depth(8)], Thresholds(window=1, min_updates=1, every=1, patience=3))
    feed(judge, EVEN, 10)
    for _ in range(20):
        assert feed(judge, FADING, 2) == []
        assert feed(judge, EVEN, 1) == []
    assert judge.verdict.kind == "healthy"


def test_the_numbers_of_the_verdict_are_those_of_the_latest_judgement() -> None:
    judge = Judge([Stack.of_depth(8)])
    feed(judge, FADING, 40)
    before = judge.verdict.value
    assert feed(judge, FADING**2, 40) == []
    assert before is not None
    assert judge.verdict.value is not None
    assert judge.verdict.value < before / 1e3


def test_updates_that_are_not_finite_neither_count_nor_disturb() -> None:
    plain, disturbed = Judge([Stack.of_depth(8)]), Judge([Stack.of_depth(8)])
    for _ in range(37):
        plain.update(FADING, 0.1)
        disturbed.update(np.full(8, np.inf), np.inf)
        disturbed.update(FADING, 0.1)
        disturbed.update(FADING, np.nan)
    assert plain.state_dict() == disturbed.state_dict()


@pytest.mark.parametrize("stop", [3, 12, 33, 41])
def test_a_judge_restored_from_json_gives_the_same_verdicts_at_the_same_updates(stop: int) -> None:
    rows = [*[EVEN] * 25, *[FADING] * 40, *[EVEN] * 40]
    whole, first, second = (Judge([Stack.of_depth(8)]) for _ in range(3))
    expected = [verdict for row in rows if (verdict := whole.update(row, 1.0))]
    found = [verdict for row in rows[:stop] if (verdict := first.update(row, 1.0))]
    first.probe([0.9] * 8)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    found += [verdict for row in rows[stop:] if (verdict := second.update(row, 1.0))]
    assert found == expected
    assert [verdict.kind for verdict in found] == ["healthy", "vanishing", "healthy"]
    assert len(second.history.probes) == 1


def test_stacks_of_a_layout_are_its_layers_by_stack_in_depth_order() -> None:
    groups = (
        Group("encoder embeddings", "embeddings", "encoder"),
        Group("encoder layer 0", "layer", "encoder", 0),
        Group("encoder layer 1", "layer", "encoder", 1),
        Group("encoder final norm", "final_norm", "encoder"),
        Group("decoder layer 0", "layer", "decoder", 0),
        Group("head", "head"),
    )
    assert stacks_of(Layout(groups, ())) == (
        Stack("encoder", (0, 1), ("encoder layer 0", "encoder layer 1")),
        Stack("decoder", (2,), ("decoder layer 0",)),
    )
