"""However a training is started, ended or mixed with others, the guard is there when it should be and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from hf_gradguard import GradGuard, GradGuardCallback, RunRecord
from tests.models import language_data, make
from tests.training import Poison, arguments, assert_bit_equal, trainer, weights

GUARDED = [(Accelerator, "clip_grad_norm_"), (Accelerator, "backward"), (Trainer, "log"), (Trainer, "train")]
SHIPPED = [vars(owner)[name] for owner, name in GUARDED]


class BrokenError(RuntimeError):
    pass


class BreaksAt(Trainer):
    """Fails in the middle of the third micro-batch."""

    steps = 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.steps += 1
        if self.steps == 3:
            raise BrokenError("out of luck")
        return super().training_step(*args, **kwargs)


def assert_nothing_left(run: Trainer) -> None:
    assert [vars(owner)[name] for owner, name in GUARDED] == SHIPPED
    assert "clip_grad_norm_" not in vars(run.accelerator)
    assert "backward" not in vars(run.accelerator)
    assert "log" not in vars(run)


def test_nothing_is_left_behind_after_training(tmp_path: Path) -> None:
    run = trainer(make("gpt2"), tmp_path, GradGuardCallback())
    run.train()
    assert_nothing_left(run)


@pytest.mark.parametrize("late", [False, True])
def test_an_exception_ends_the_record_and_passes_through(late: bool, tmp_path: Path) -> None:
    callback = GradGuardCallback()
    run = trainer(make("gpt2"), tmp_path, *([] if late else [callback]), kind=BreaksAt)
    if late:
        run.add_callback(callback)
    with pytest.raises(BrokenError):
        run.train()
    record = RunRecord.load(tmp_path)
    if not late:
        assert_nothing_left(run)
        assert record.status == "failed"
        assert record.steps.tolist() == [1, 2]
    run.steps = 10
    run.remove_callback(callback)
    run.train()  # without the callback, nothing of it wakes up again
    assert callback.guard is not None
    assert callback.guard.windows == 2
    assert_nothing_left(run)


def test_an_interrupt_by_the_keyboard_is_kept_as_one(tmp_path: Path) -> None:
    class Interrupted(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step == 2:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    run = trainer(make("gpt2"), tmp_path, GradGuardCallback(), kind=Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert RunRecord.load(tmp_path).status == "interrupted"
    assert_nothing_left(run)


def test_evaluation_and_the_best_model_do_not_disturb_the_reading(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
    }
    run = Trainer(
        make("gpt2"),
        arguments(tmp_path, **options),
        train_dataset=language_data(64),
        eval_dataset=language_data(8),
        callbacks=[GradGuardCallback],  # a class is as good as an object
    )
    run.train()
    assert RunRecord.load(tmp_path).steps.tolist() == [1, 2, 3, 4, 5, 6]


def test_a_stream_and_an_incomplete_last_window_are_watched(tmp_path: Path) -> None:
    from datasets import IterableDataset

    def rows() -> Any:
        yield from ({key: value.tolist() for key, value in row.items()} for row in language_data(10))

    callback = GradGuardCallback()
    run = Trainer(
        make("bert"),
        arguments(tmp_path, max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2),
        train_dataset=IterableDataset.from_generator(rows),
        callbacks=[callback],
    )
    run.train()
    assert callback.guard is not None
    assert callback.guard.windows == 6
    assert [event.kind for event in callback.guard.events] == ["warning"]  # that BERT's loss is not normalised


def test_a_callback_added_later_watches_too(tmp_path: Path) -> None:
    callback = GradGuardCallback()
    run = trainer(make("gpt2"), tmp_path)
    run.add_callback(callback)
    run.train()
    assert RunRecord.load(tmp_path).steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert_nothing_left(run)


def test_two_trainers_in_one_process_do_not_see_each_other(tmp_path: Path) -> None:
    callbacks = [GradGuardCallback(), GradGuardCallback()]
    first = trainer(make("gpt2"), tmp_path / "first", callbacks[0])
    second = trainer(make("bert"), tmp_path / "second", callbacks[1], max_steps=3)
    unwatched = trainer(make("bert"), tmp_path / "third", max_steps=3)
    torch.manual_seed(0)
    second.train()
    torch.manual_seed(0)
    unwatched.train()
    first.train()
    assert [callback.guard.windows for callback in callbacks if callback.guard] == [6, 3]
    assert_bit_equal(weights(second.model), weights(unwatched.model))


def test_a_second_train_is_a_new_run_of_the_guard(tmp_path: Path) -> None:
    callback = GradGuardCallback()
    run = trainer(make("gpt2"), tmp_path, callback)
    run.train()
    first = callback.guard
    run.train()
    assert callback.guard is not first
    assert callback.guard is not None
    assert callback.guard.windows == 6
    record = RunRecord.load(tmp_path)
    assert record.steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert len(record.segments) == 2


def test_a_resumed_run_goes_on_in_the_same_record(tmp_path: Path) -> None:
    whole = trainer(make("gpt2"), tmp_path / "whole", GradGuardCallback(), max_steps=8)
    whole.train()
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    broken = trainer(make("gpt2"), tmp_path / "parts", GradGuardCallback(), kind=StopsAtFive, **options)
    with pytest.raises(BrokenError):
        broken.train()
    callback = GradGuardCallback()
    resumed = trainer(make("gpt2"), tmp_path / "parts", callback, **options)
    resumed.train(resume_from_checkpoint=True)
    expected, found = RunRecord.load(tmp_path / "whole"), RunRecord.load(tmp_path / "parts")
    assert found.steps.tolist() == list(range(1, 9))
    assert found.norms.tolist() == expected.norms.tolist()
    assert found.losses.tolist() == expected.losses.tolist()
    assert callback.guard is not None
    assert callback.guard.windows == 8


class StopsAtFive(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 5:
            raise BrokenError
        return super().training_step(*args, **kwargs)


def test_a_run_that_began_without_a_guard_is_resumed_with_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    trainer(make("bert"), tmp_path, max_steps=2, lr_scheduler_type="constant", **options).train()
    callback = GradGuardCallback()
    resumed = trainer(make("bert"), tmp_path, callback, lr_scheduler_type="constant", **options)
    resumed.train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-6").is_dir()
    assert RunRecord.load(tmp_path).steps.tolist() == [3, 4, 5, 6]
    alone = trainer(make("bert"), tmp_path / "alone", lr_scheduler_type="constant")
    alone.train()
    assert_bit_equal(weights(resumed.model), weights(alone.model))


def test_the_count_of_skips_in_a_row_survives_a_resume(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    model = make("bert")
    with torch.no_grad():
        next(model.parameters())[5] = torch.nan
    first = trainer(
        model,
        tmp_path,
        GradGuardCallback(nonfinite="skip:max_consecutive=3"),
        max_steps=2,
        **{key: value for key, value in options.items() if key != "max_steps"},
    )
    first.train()
    callback = GradGuardCallback(nonfinite="skip:max_consecutive=3")
    resumed = trainer(make("bert"), tmp_path, callback, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_auto_find_batch_size_starts_the_record_again(tmp_path: Path) -> None:
    class RunsOutOfMemory(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            if len(inputs["input_ids"]) > 2 and self.state.global_step == 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    callback = GradGuardCallback()
    run = trainer(make("gpt2"), tmp_path, callback, kind=RunsOutOfMemory, auto_find_batch_size=True)
    run.train()
    record = RunRecord.load(tmp_path)
    assert record.steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert len(record.segments) == 3  # with batches of 4, of 3 and of 2
    assert callback.guard is not None
    assert callback.guard.windows == 6
    assert_nothing_left(run)


def test_hyperparameter_search_keeps_one_record_for_each_trial(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs optuna")
    run = Trainer(
        model_init=lambda trial: make("gpt2"),
        args=arguments(tmp_path, max_steps=3),
        train_dataset=language_data(64),
        eval_dataset=language_data(8),
        callbacks=[GradGuardCallback()],
    )
    run.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        n_trials=2,
        backend="optuna",
    )
    for trial in range(2):
        assert RunRecord.load(tmp_path / f"trial-{trial}").steps.tolist() == [1, 2, 3]


def test_seq2seq_trainer_is_watched(tmp_path: Path) -> None:
    options = arguments(tmp_path).to_dict()
    args = Seq2SeqTrainingArguments(
        **{
            key: options[key]
            for key in (
                "output_dir",
                "max_steps",
                "learning_rate",
                "logging_steps",
                "save_strategy",
                "report_to",
                "use_cpu",
            )
        }
    )
    callback = GradGuardCallback()
    run = Seq2SeqTrainer(model=make("t5"), args=args, train_dataset=language_data(64), callbacks=[callback])
    run.train()
    assert callback.guard is not None
    assert callback.guard.windows == 6


def test_a_loss_function_of_the_users_is_recorded(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return 0.5 * torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())

    run = trainer(make("gpt2"), tmp_path, GradGuardCallback(), compute_loss_func=loss)
    run.train()
    logged = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert RunRecord.load(tmp_path).losses.tolist() == pytest.approx(logged, abs=1e-4)


def test_a_wrapper_of_somebody_else_around_clipping_is_still_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    shipped = Accelerator.clip_grad_norm_

    def theirs(self: Accelerator, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        calls.append(max_norm)
        return shipped(self, parameters, max_norm, norm_type)

    exec(compile("def wrap(theirs):\n    return lambda *args, **kwargs: theirs(*args, **kwargs)", "elsewhere", "exec"))
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", locals()["wrap"](theirs))
    run = trainer(make("gpt2"), tmp_path / "watched", GradGuardCallback(), max_grad_norm=1e6)
    run.train()
    assert calls == [1e6] * 6
    unwatched = trainer(make("gpt2"), tmp_path / "unwatched", max_grad_norm=1e6)
    unwatched.train()
    assert_bit_equal(weights(run.model), weights(unwatched.model))


def test_unfreezing_in_the_middle_starts_a_new_segment_with_more_parameters(tmp_path: Path) -> None:
    model = make("gpt2")
    first_layer = model.transformer.h[0]
    first_layer.requires_grad_(False)

    class Unfreezes(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step == 3:
                first_layer.requires_grad_(True)
            return super().training_step(*args, **kwargs)

    run = trainer(model, tmp_path, GradGuardCallback(), kind=Unfreezes)
    run.train()
    record = RunRecord.load(tmp_path)
    assert record.steps.tolist() == [1, 2, 3, 4, 5, 6]
    index = record.parameters.index("transformer.h.0.attn.c_attn.weight")
    assert torch.tensor(record.norms[:, index]).isnan().tolist() == [True] * 3 + [False] * 3


def test_other_parameters_clipped_by_the_same_accelerator_are_left_to_it(tmp_path: Path) -> None:
    other = torch.nn.Parameter(torch.zeros(3))

    class ClipsAnother(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            other.grad = torch.full((3,), 100.0)
            self.accelerator.clip_grad_norm_([other], 1.0)
            assert other.grad.norm().item() == pytest.approx(1.0, rel=1e-4)
            return loss

    callback = GradGuardCallback()
    trainer(make("gpt2"), tmp_path, callback, kind=ClipsAnother).train()
    assert callback.guard is not None
    assert callback.guard.windows == 6


def raw_loop(guarded: bool, tmp_path: Path, poisoned: int = 0) -> tuple[torch.nn.Module, GradGuard | None]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make("gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    guard = GradGuard(model, optimizer, accelerator=accelerator, lr_scheduler=schedule, output_dir=tmp_path)
    if poisoned:
        Poison(next(model.parameters()), poisoned, torch.nan, micro_batches=2)
    data = language_data(40)
    for start in range(0, 40, 4):
        batch = {key: torch.stack([row[key] for row in data[start : start + 4]]) for key in ("input_ids", "labels")}
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if guarded:
                guard.step(loss)
            else:
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    guard.close()
    return model, guard


def test_a_raw_loop_is_guarded_without_changing_it(tmp_path: Path) -> None:
    guarded, guard = raw_loop(True, tmp_path)
    unguarded, _ = raw_loop(False, tmp_path / "unguarded")
    assert_bit_equal(weights(guarded), weights(unguarded))
    assert guard is not None
    assert guard.windows == guard.updates == 5
    record = RunRecord.load(tmp_path)
    assert record.steps.tolist() == [1, 2, 3, 4, 5]
    assert record.run["model"]["class"] == "GPT2LMHeadModel"


def test_a_nan_in_a_raw_loop_costs_one_update(tmp_path: Path) -> None:
    model, guard = raw_loop(True, tmp_path, poisoned=2)
    assert guard is not None
    assert (guard.windows, guard.updates, guard.skipped) == (5, 4, 1)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
