"""Windows that a policy holds back end in the update that one batch of all of them would have made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_gradguard import GradGuard, GradGuardCallback, GradGuardConfig, RunRecord
from tests.integration.test_fp16 import Scaled
from tests.models import language_data, make
from tests.training import Poison, Snapshots, arguments, assert_bit_equal, weights

BATCH = 4
OPTIMIZERS = ["sgd", "adamw_torch", "adamw_torch_fused", "adafactor"]


def padded_data(count: int) -> list[dict[str, Tensor]]:
    """Examples of one length whose padding, which is no target, grows from 0 to 12 of 16 tokens."""
    rows = language_data(count)
    for index, row in enumerate(rows):
        row["labels"] = row["labels"].clone()
        row["labels"][16 - (index // BATCH * 5) % 13 :] = -100
    return rows


def train(
    model: nn.Module, folder: Path, data: Sequence[Any], *callbacks: Any, kind: type[Trainer] = Trainer, **options: Any
) -> Trainer:
    resume = options.pop("resume_from_checkpoint", None)
    keywords = {name: options.pop(name) for name in list(options) if name in ("eval_dataset", "optimizers")}
    defaults = {
        "per_device_train_batch_size": BATCH,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
    }
    run = kind(
        model=model,
        args=arguments(folder, **{**defaults, **options}),
        train_dataset=data,
        callbacks=list(callbacks),
        **keywords,
    )
    run.train(resume_from_checkpoint=resume)
    return run


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference of two models ÷ norm of the model."""
    squares = sum(float((one[name].double() - other[name].double()).square().sum()) for name in one)
    return math.sqrt(squares / sum(float(tensor.double().square().sum()) for tensor in one.values()))


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_four_equal_windows_are_bit_equal_to_four_accumulation_steps(name: str, optim: str, tmp_path: Path) -> None:
    data = language_data(64)
    stock = train(make(name), tmp_path / "stock", data, gradient_accumulation_steps=4, max_steps=3, optim=optim)
    callback = GradGuardCallback(accumulate="fixed:windows=4")
    held = train(make(name), tmp_path / "held", data, callback, max_steps=12, optim=optim)
    assert_bit_equal(weights(stock.model), weights(held.model))
    assert callback.guard is not None
    assert (callback.guard.windows, callback.guard.updates, callback.guard.deferred) == (12, 3, 9)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch", "adafactor"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padded_windows_count_by_their_target_tokens(name: str, optim: str, tmp_path: Path) -> None:
    data = padded_data(64)
    options = {"optim": optim, "learning_rate": 1e-3}
    stock = train(make(name), tmp_path / "stock", data, gradient_accumulation_steps=4, max_steps=2, **options)
    held = train(
        make(name), tmp_path / "held", data, GradGuardCallback(accumulate="fixed:windows=4"), max_steps=8, **options
    )
    assert difference(trained(stock.model), trained(held.model)) < 1e-6
    unweighted = train(
        make(name), tmp_path / "wrong", data, GradGuardCallback(accumulate="fixed:windows=3"), max_steps=8, **options
    )
    assert difference(trained(stock.model), trained(unweighted.model)) > 1e-5  # the comparison can tell


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The weights that have a gradient. Attention does not change with the bias of its keys, whose gradient is nothing
    but rounding; of that Adafactor makes steps of full size, by which it scales those of queries and values too."""
    return {name: tensor for name, tensor in weights(model).items() if not name.endswith("c_attn.bias")}


@pytest.mark.parametrize("accepts", [True, False])
def test_bert_in_windows_equals_one_large_batch(accepts: bool, tmp_path: Path) -> None:
    def bert() -> nn.Module:
        model = without_dropout(make("bert"))
        model.accepts_loss_kwargs = accepts  # type: ignore[assignment]
        return model

    data = padded_data(32)
    options = {"optim": "sgd", "max_grad_norm": 0.0}
    large = train(bert(), tmp_path / "large", data, per_device_train_batch_size=16, max_steps=2, **options)
    callback = GradGuardCallback(accumulate="fixed:windows=4")
    held = train(bert(), tmp_path / "held", data, callback, max_steps=8, **options)
    assert difference(weights(large.model), weights(held.model)) < 1e-6


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def plain_loop(threshold: float, reduce: str, windows: int = 14, most: int = 5) -> tuple[nn.Module, list[int]]:
    """θ ← θ − η·(mean or sum of the held windows' gradients) when its norm is at the threshold: the definition."""
    model, data = without_dropout(make("gpt2")), language_data(64)
    parameters = list(model.parameters())
    held: list[list[Tensor]] = []
    updates = []
    for window in range(windows):
        rows = data[window * BATCH : (window + 1) * BATCH]
        batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}
        targets = BATCH * batch["labels"][0].numel()  # as the Trainer counts them for this model
        loss = model(**batch, num_items_in_batch=targets).loss
        gradients = torch.autograd.grad(loss, parameters)
        held.append([gradient.double() for gradient in gradients])
        divisor = len(held) if reduce == "mean" else 1
        total = [sum(one[place] for one in held) / divisor for place in range(len(parameters))]
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in total))
        if norm >= threshold or len(held) == most or window + 1 == windows:
            updates.append(window + 1)
            held = []
            with torch.no_grad():
                for parameter, gradient in zip(parameters, total, strict=True):
                    parameter -= 0.05 * gradient.to(parameter.dtype)
    return model, updates


def updating_windows(snapshots: Snapshots) -> list[int]:
    """The windows that changed a weight."""
    pairs = zip(snapshots.weights, snapshots.weights[1:], strict=False)
    return [
        window for window, (before, after) in enumerate(pairs, start=1)
        if any(not torch.equal(before[name], after[name]) for name in before)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("reduce", "threshold"), [("mean", 0.5), ("mean", 1.0), ("sum", 1.5), ("sum", 4.0), ("sum", 9.0)]
)
def test_the_norm_threshold_updates_exactly_when_the_definition_says(
    reduce: str, threshold: float, tmp_path: Path
) -> None:
    model, updates = plain_loop(threshold, reduce)
    callback = GradGuardCallback(accumulate=f"norm_threshold:threshold={threshold},max_windows=5,reduce={reduce}")
    snapshots = Snapshots()
    run = train(
        without_dropout(make("gpt2")), tmp_path, language_data(64), callback, snapshots,
        optim="sgd", learning_rate=0.05, max_grad_norm=0.0, max_steps=14,
    )  # fmt: skip
    assert updating_windows(snapshots) == updates
    assert difference(weights(model), weights(run.model)) < 1e-6


POLICIES: list[dict[str, Any]] = [
    {"accumulate": "fixed:windows=4"},
    {"accumulate": "fixed:windows=4", "clip": "zclip", "lr_schedule": "updates"},
    {"accumulate": "norm_threshold:threshold=1000,max_windows=4", "clip": "adagc"},
    {"accumulate": "noise_scale:max_windows=4", "clip": "autoclip"},
    {"accumulate": "norm_test:max_windows=4"},
    {"accumulate": "ramp:start=1,end=4,over=6", "clip": "global:max_norm=0.1"},
]


@pytest.mark.parametrize(("restores", "elsewhere"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["accumulate"].partition(":")[0])
def test_a_run_resumed_while_windows_are_held_is_bit_equal_to_one_that_was_not_interrupted(
    policy: dict[str, Any], restores: bool, elsewhere: bool, tmp_path: Path
) -> None:
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6, "lr_scheduler_type": "linear"}
    whole_callback = GradGuardCallback(**policy)
    whole = train(make("gpt2"), tmp_path / "whole", padded_data(64), whole_callback, **options)
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    if elsewhere:
        checkpoint = checkpoint.rename(tmp_path / "moved")
    callback = GradGuardCallback(**policy)
    resumed = train(
        make("gpt2", seed=1), tmp_path / ("resumed" if elsewhere else "whole"), padded_data(64), callback,
        resume_from_checkpoint=str(checkpoint), restore_callback_states_from_checkpoint=restores, **options,
    )  # fmt: skip
    assert_bit_equal(weights(whole.model), weights(resumed.model))
    guards = [
        next(c for c in run.callback_handler.callbacks if isinstance(c, GradGuardCallback)).guard
        for run in (whole, resumed)
    ]
    assert guards[0] is not None
    assert guards[1] is not None
    assert [guards[0].updates, guards[0].deferred] == [guards[1].updates, guards[1].deferred]
    late = [event for event in guards[0].events if event.step > 6]
    assert late == [event for event in guards[1].events if event.kind not in ("notice", "warning")]


def test_held_gradients_that_are_missing_cost_one_warning(tmp_path: Path) -> None:
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 6}
    train(make("gpt2"), tmp_path, language_data(64), GradGuardCallback(accumulate="fixed:windows=4"), **options)
    checkpoint = tmp_path / "checkpoint-6"
    (checkpoint / "gradguard" / "held.safetensors").unlink()
    callback = GradGuardCallback(accumulate="fixed:windows=4")
    train(make("gpt2"), tmp_path, language_data(64), callback, resume_from_checkpoint=str(checkpoint), **options)
    assert callback.guard is not None
    warnings = [event for event in callback.guard.events if event.kind == "warning"]
    assert len(warnings) == 1
    assert "held" in warnings[0].message
    assert callback.guard.updates == 2  # one before the checkpoint, one by the window that ends training


def test_held_gradients_of_another_run_are_not_taken(tmp_path: Path) -> None:
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 6}
    for folder in ("one", "other"):
        callback = GradGuardCallback(accumulate="fixed:windows=4")
        train(make("gpt2"), tmp_path / folder, language_data(64), callback, **options)
    name = Path("checkpoint-6") / "gradguard" / "held.safetensors"
    (tmp_path / "other" / name).replace(tmp_path / "one" / name)
    callback = GradGuardCallback(accumulate="fixed:windows=4")
    checkpoint = str(tmp_path / "one" / "checkpoint-6")
    train(make("gpt2"), tmp_path / "one", language_data(64), callback, resume_from_checkpoint=checkpoint, **options)
    assert callback.guard is not None
    assert [event.kind for event in callback.guard.events if event.kind == "warning"] == ["warning"]


def test_a_nan_costs_its_own_window_only(tmp_path: Path) -> None:
    """Windows 1, 3 and 4 make the update that they would make if the second had not been."""
    data = language_data(16)
    model = without_dropout(make("gpt2"))
    callback = GradGuardCallback(accumulate="fixed:windows=3")
    poison = Poison(model.get_parameter("transformer.h.1.mlp.c_fc.weight"), 2, math.nan)
    train(model, tmp_path / "bad", data, callback, poison, max_steps=4)
    clean = train(
        without_dropout(make("gpt2")), tmp_path / "clean", data[:4] + data[8:],
        GradGuardCallback(accumulate="fixed:windows=3"), max_steps=3,
    )  # fmt: skip
    assert_bit_equal(weights(model), weights(clean.model))
    assert callback.guard is not None
    assert (callback.guard.updates, callback.guard.skipped, callback.guard.deferred) == (1, 1, 2)


def test_a_nan_in_the_last_window_still_lets_the_held_ones_update(tmp_path: Path) -> None:
    data = language_data(16)
    model = without_dropout(make("gpt2"))
    callback = GradGuardCallback(accumulate="fixed:windows=9")
    poison = Poison(model.get_parameter("transformer.h.1.mlp.c_fc.weight"), 4, math.inf)
    train(model, tmp_path / "bad", data, callback, poison, max_steps=4)
    clean = train(
        without_dropout(make("gpt2")), tmp_path / "clean", data,
        GradGuardCallback(accumulate="fixed:windows=9"), max_steps=3,
    )  # fmt: skip
    assert_bit_equal(weights(model), weights(clean.model))
    assert callback.guard is not None
    assert callback.guard.updates == 1


def test_evaluation_leaves_held_gradients_alone(tmp_path: Path) -> None:
    data = language_data(64)
    policy = {"accumulate": "fixed:windows=4"}
    # Making the iterator of the evaluation draws from the random state that dropout draws from.
    plain = train(without_dropout(make("gpt2")), tmp_path / "plain", data, GradGuardCallback(**policy), max_steps=8)
    evaluated = train(
        without_dropout(make("gpt2")), tmp_path / "evaluated", data, GradGuardCallback(**policy), max_steps=8,
        eval_strategy="steps", eval_steps=1, eval_dataset=data[:8],
    )  # fmt: skip
    assert_bit_equal(weights(plain.model), weights(evaluated.model))


def test_early_stopping_discards_what_is_held_and_says_so(tmp_path: Path) -> None:
    callback, snapshots = GradGuardCallback(accumulate="fixed:windows=4"), Snapshots()
    train(
        make("gpt2"), tmp_path, language_data(64), callback, snapshots, EarlyStoppingCallback(1),
        max_steps=12, eval_strategy="steps", eval_steps=3, eval_dataset=language_data(8), save_strategy="steps",
        save_steps=3, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    assert callback.guard is not None
    assert callback.guard.windows == 6
    assert [(event.value, event.action) for event in callback.guard.events if event.kind == "discarded"] == [
        (2.0, "discard")
    ]
    assert updating_windows(snapshots) == [4]


@pytest.mark.parametrize(("schedule", "expected"), [("windows", 8), ("updates", 2)])
def test_the_learning_rate_follows_windows_or_updates(schedule: str, expected: int, tmp_path: Path) -> None:
    callback = GradGuardCallback(accumulate="fixed:windows=4", lr_schedule=schedule)
    options = {"lr_scheduler_type": "linear", "max_steps": 8, "save_strategy": "steps", "save_steps": 7}
    run = train(make("gpt2"), tmp_path, language_data(64), callback, **options)
    assert run.lr_scheduler.last_epoch == expected
    saved = torch.load(tmp_path / "checkpoint-7" / "scheduler.pt", weights_only=True)
    assert set(saved) == set(run.lr_scheduler.state_dict())
    assert "step" not in saved


def test_the_log_tells_updates_deferrals_noise_scale_and_batch_size(tmp_path: Path) -> None:
    run = train(
        make("gpt2"), tmp_path, language_data(64), GradGuardCallback(accumulate="fixed:windows=4"), max_steps=12
    )
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["gradguard/updates"] for entry in logs] == [index // 4 for index in range(1, 13)]
    assert logs[-1]["gradguard/deferred"] == 9
    assert logs[-1]["gradguard/batch_size"] == 4 * BATCH * 16
    assert logs[-1]["gradguard/noise_scale"] > 0
    record = RunRecord.load(tmp_path)
    assert record.accumulation_steps.tolist() == list(range(1, 13))
    assert record.held_windows.tolist() == [1, 2, 3, 4] * 3
    assert record.updated.tolist() == [window % 4 == 0 for window in range(1, 13)]
    assert [event.kind for event in record.events if event.kind == "deferred"] == ["deferred"] * 9


class WellScaled(Scaled):
    """At a scale at which no gradient is so small that fp16 holds it with fewer digits."""

    scale = 2.0**16


class Overflows(WellScaled):
    """Whose second window overflows, as those of a scaler that starts too high do."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step == 1:
            next(self.model.parameters()).grad[0, 0] = math.inf
        return loss


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_under_a_scaler_unscaled_gradients_are_held_and_an_overflow_costs_its_own_window(
    optim: str, tmp_path: Path
) -> None:
    data = language_data(32)
    # Without its epsilon Adam makes full steps of what is nothing but rounding.
    options = {"fp16": True, "optim": optim, "adam_epsilon": 1e-3}
    held = train(
        without_dropout(make("gpt2")), tmp_path / "held", data, GradGuardCallback(accumulate="fixed:windows=2"),
        kind=Overflows, max_steps=5, **options,
    )  # fmt: skip
    clean = train(
        without_dropout(make("gpt2")), tmp_path / "clean", data[:4] + data[8:],
        kind=WellScaled, max_steps=2, gradient_accumulation_steps=2, **options,
    )  # fmt: skip
    assert difference(weights(held.model), weights(clean.model)) < 1e-6


class OverflowsLast(WellScaled):
    """Whose last window overflows."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step == 3:
            next(self.model.parameters()).grad[0, 0] = math.inf
        return loss


def test_an_overflow_in_the_last_window_still_lets_the_held_ones_update(tmp_path: Path) -> None:
    options = {"fp16": True, "optim": "sgd"}
    callback = GradGuardCallback(accumulate="fixed:windows=9")
    held = train(
        without_dropout(make("gpt2")), tmp_path / "held", language_data(32), callback,
        kind=OverflowsLast, max_steps=4, **options,
    )  # fmt: skip
    clean = train(
        without_dropout(make("gpt2")), tmp_path / "clean", language_data(32),
        kind=WellScaled, max_steps=1, gradient_accumulation_steps=3, **options,
    )  # fmt: skip
    assert difference(weights(held.model), weights(clean.model)) < 1e-6
    assert callback.guard is not None
    assert (callback.guard.updates, callback.guard.deferred) == (1, 3)


def test_what_float16_weights_cannot_hold_together_is_dropped_with_an_event(tmp_path: Path) -> None:
    model = nn.Linear(2, 1, bias=False).half()
    guard = GradGuard(
        model, torch.optim.SGD(model.parameters(), lr=1e-6),
        GradGuardConfig(accumulate="norm_threshold:threshold=1e9,max_windows=3,reduce=sum"), output_dir=tmp_path,
    )  # fmt: skip
    before = model.weight.detach().clone()
    for _ in range(3):
        model.weight.grad = torch.full_like(model.weight, 30000.0)
        guard.step()
    assert torch.equal(model.weight, before)
    assert guard.events[-1].kind == "discarded"
    guard.close()


class Replaced(TrainerCallback):
    """Somebody else who reads the gradients that the optimizer is given."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        gradients = [parameter.grad for parameter in kwargs["model"].parameters() if parameter.grad is not None]
        self.norms.append(math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients)))


def test_the_reading_tells_the_windows_norm_and_the_norm_of_what_is_held(tmp_path: Path) -> None:
    other, callback = Replaced(), GradGuardCallback(accumulate="fixed:windows=3")
    seen: list[tuple[float, float]] = []

    class Readings(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            assert callback.guard is not None
            assert callback.guard.reading is not None
            seen.append((callback.guard.reading.total_norm, callback.guard.reading.accumulated_norm))

    train(make("gpt2"), tmp_path, language_data(64), callback, other, Readings(), max_steps=6, max_grad_norm=0.0)
    assert other.norms[:2] == [0.0, 0.0]
    assert other.norms[2] == pytest.approx(seen[2][1], rel=1e-6)
    assert seen[0][0] == seen[0][1]
    assert seen[1][0] != seen[1][1]


def test_a_dry_run_says_what_would_be_done_and_changes_nothing(tmp_path: Path) -> None:
    policies = {"accumulate": "fixed:windows=4", "clip": "global:max_norm=0.001", "nonfinite": "skip"}
    plain = train(make("gpt2"), tmp_path / "plain", language_data(64), max_steps=8)
    callback = GradGuardCallback(**policies, dry_run=True)
    dry = train(make("gpt2"), tmp_path / "dry", language_data(64), callback, max_steps=8)
    assert_bit_equal(weights(plain.model), weights(dry.model))
    guard = callback.guard
    assert guard is not None
    assert (guard.updates, guard.deferred, guard.skipped) == (8, 0, 0)
    actions = [(event.step, event.action) for event in guard.events if event.action]
    expected = [(window, "would hold") for window in range(1, 9) if window % 4] + [(4, "would clip"), (8, "would clip")]
    assert guard.clipped == 6  # by the Trainer itself, as ever
    assert sorted(actions) == sorted(expected)


def test_a_dry_run_leaves_a_nan_to_the_trainer(tmp_path: Path) -> None:
    model = make("bert")
    callback = GradGuardCallback(accumulate="fixed:windows=2", dry_run=True, check_loss_scaling=False)
    poison = Poison(model.get_parameter("bert.embeddings.LayerNorm.weight"), 2, math.nan)
    train(model, tmp_path, language_data(64), callback, poison, max_steps=3)
    assert not torch.isfinite(model.get_parameter("bert.embeddings.LayerNorm.weight")).all()
    assert callback.guard is not None
    assert next(event.action for event in callback.guard.events if event.kind == "nonfinite") == "would skip"


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: GradGuardCallback(accumulate="fixed:windows=0"), "windows=0"),
    (lambda: GradGuardCallback(accumulate="norm_threshold:threshold=0"), "threshold=0"),
    (lambda: GradGuardCallback(accumulate="norm_threshold"), "threshold must be given"),
    (lambda: GradGuardCallback(accumulate="norm_threshold:threshold=1,max_windows=0"), "max_windows=0"),
    (lambda: GradGuardCallback(accumulate="norm_threshold:threshold=1,reduce=men"), "did you mean 'mean'"),
    (lambda: GradGuardCallback(accumulate="fixd:windows=4"), "did you mean 'fixed'"),
    (lambda: GradGuardCallback(clip="zlip"), "did you mean 'zclip'"),
    (lambda: GradGuardCallback(clip="global:max_norm=-1"), "max_norm=-1"),
    (lambda: GradGuardCallback(accumulate="fixed", nonfinite="observe"), "contradicts nonfinite='observe'"),
    (lambda: GradGuardCallback(clip="trainer:max_norm=1"), "'trainer' takes no options"),
    (lambda: GradGuardCallback(lr_schedule="updates"), "lr_schedule='updates' needs a policy"),
    (lambda: GradGuardCallback(lr_schedule="tokens"), "lr_schedule='tokens'"),
    (lambda: GradGuardCallback(save_batch=True, replay=False), "save_batch=True needs replay=True"),
]


@pytest.mark.parametrize(("make_callback", "message"), BAD, ids=[message for _, message in BAD])
def test_impossible_policies_are_refused(make_callback: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_callback()


def test_a_policy_that_the_optimizer_cannot_honour_is_refused_before_training(tmp_path: Path) -> None:
    class Lomo(Trainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("training has begun")

    run = Lomo(
        make("gpt2"), arguments(tmp_path), train_dataset=language_data(8),
        callbacks=[GradGuardCallback(accumulate="fixed")],
    )  # fmt: skip
    run.args.optim = "lomo"
    with pytest.raises(ValueError, match=r"accumulate='fixed' can't work here: optim='lomo'"):
        run.train()


def test_layers_may_be_frozen_while_windows_are_held(tmp_path: Path) -> None:
    model = without_dropout(make("gpt2"))

    class Freezes(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model.transformer.h[0].requires_grad_(state.global_step != 2)

    callback = GradGuardCallback(accumulate="fixed:windows=3")
    train(model, tmp_path, language_data(64), callback, Freezes(), max_steps=6)
    assert callback.guard is not None
    assert (callback.guard.updates, callback.guard.deferred) == (2, 4)
