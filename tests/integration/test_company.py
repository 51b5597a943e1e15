"""Others who clip, scale, copy, freeze and step besides us get what they would get without us."""

from __future__ import annotations

import copy
import math
import pickle
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer

from hf_gradguard import GradGuard, GradGuardCallback, RunRecord
from tests.counters import Counters
from tests.integration.test_fp16 import OverflowsTwice, Scaled
from tests.models import language_data, make
from tests.training import Poison, arguments, assert_bit_equal, trainer, weights


class ClipsEachMicroBatch(Trainer):
    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, *args, **kwargs)
        self.accelerator.clip_grad_norm_(model.parameters(), 0.3)
        return loss


class ClipsLargest(Trainer):
    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self.accelerator.clip_grad_norm_(model.parameters(), 1e-3, norm_type=math.inf)


class ClipsHalves(Trainer):
    def _clip_grad_norm(self, model: nn.Module) -> Any:
        parameters = list(model.parameters())
        self.accelerator.clip_grad_norm_(parameters[:9], 0.1)
        return self.accelerator.clip_grad_norm_(parameters[9:], 0.1)


class ValueClipping(Accelerator):
    """Clips each element besides the norm."""

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: int = 2) -> Any:
        parameters = list(parameters)
        norm = super().clip_grad_norm_(parameters, max_norm, norm_type)
        torch.nn.utils.clip_grad_value_(parameters, 1e-3)
        return norm


class HasItsOwnAccelerator(Trainer):
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.__class__ = ValueClipping


@pytest.mark.parametrize("kind", [ClipsEachMicroBatch, ClipsLargest, ClipsHalves, HasItsOwnAccelerator])
def test_whoever_clips_in_another_way_gets_the_same_weights(kind: type[Trainer], tmp_path: Path) -> None:
    options = {"kind": kind, "gradient_accumulation_steps": 3, "max_steps": 3, "max_grad_norm": 100.0}
    alone = trainer(make("gpt2"), tmp_path / "alone", **options)
    alone.train()
    watched = trainer(make("gpt2"), tmp_path / "watched", GradGuardCallback(), **options)
    watched.train()
    assert_bit_equal(weights(alone.model), weights(watched.model))
    norms = [[entry["grad_norm"] for entry in run.state.log_history if "loss" in entry] for run in (alone, watched)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_an_accelerator_of_a_notebook_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "notebook", types.ModuleType("notebook"))  # which has no file
    monkeypatch.setattr(ValueClipping, "__module__", "notebook")
    trainer(make("gpt2"), tmp_path, GradGuardCallback(), kind=HasItsOwnAccelerator, max_steps=2).train()


def test_norms_are_those_before_clipping_whatever_is_clipped(tmp_path: Path) -> None:
    callback = GradGuardCallback()
    plain, other = GradGuardCallback(), callback
    trainer(make("gpt2"), tmp_path / "plain", plain, max_steps=1).train()
    trainer(make("gpt2"), tmp_path / "other", other, max_steps=1, kind=ClipsLargest).train()
    assert plain.guard is not None
    assert other.guard is not None
    assert plain.guard.reading is not None
    assert other.guard.reading is not None
    assert plain.guard.reading.norms() == pytest.approx(other.guard.reading.norms(), rel=1e-6)


class UnscalesFirst(Scaled):
    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self.accelerator.unscale_gradients()
        return torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)


class ClipsValues(Scaled):
    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self.accelerator.clip_grad_value_(model.parameters(), 0.1)
        return torch.tensor(1.0)


@pytest.mark.parametrize("kind", [UnscalesFirst, ClipsValues])
def test_whoever_unscales_before_us_may(kind: type[Trainer], tmp_path: Path) -> None:
    alone = trainer(make("gpt2"), tmp_path / "alone", kind=kind, fp16=True, max_steps=3)
    alone.train()
    watched = trainer(make("gpt2"), tmp_path / "watched", GradGuardCallback(), kind=kind, fp16=True, max_steps=3)
    watched.train()
    assert_bit_equal(weights(alone.model), weights(watched.model))


def test_windows_that_a_scaler_skips_do_not_count_as_clipped(tmp_path: Path) -> None:
    callback = GradGuardCallback()
    trainer(make("gpt2"), tmp_path, callback, kind=OverflowsTwice, fp16=True, max_grad_norm=1e6).train()
    assert callback.guard is not None
    assert (callback.guard.updates, callback.guard.clipped) == (4, 0)


def with_temperature(folder: Path, *callbacks: Any, **options: Any) -> tuple[Trainer, nn.Parameter]:
    """A training whose loss has a parameter of its own, which the optimizer steps too."""
    temperature = nn.Parameter(torch.tensor(1.0))

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten()) + 50 * temperature

    class ClipsAll(Trainer):
        def _clip_grad_norm(self, model: nn.Module) -> Any:
            return self.accelerator.clip_grad_norm_([*model.parameters(), temperature], 2.0)

    model = make("gpt2")
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=1e-2)
    run = trainer(
        model, folder, *callbacks, kind=ClipsAll, max_steps=3, optimizers=(optimizer, None), compute_loss_func=loss,
        **options,
    )  # fmt: skip
    return run, temperature


def test_parameters_of_the_loss_are_clipped_with_the_models(tmp_path: Path) -> None:
    alone, expected = with_temperature(tmp_path / "alone")
    alone.train()
    watched, found = with_temperature(tmp_path / "watched", GradGuardCallback())
    watched.train()
    assert_bit_equal(weights(alone.model), weights(watched.model))
    assert expected.item() == found.item()


def test_a_skip_leaves_out_whatever_else_the_optimizer_steps(tmp_path: Path) -> None:
    run, temperature = with_temperature(tmp_path, GradGuardCallback())
    parameter = run.model.get_parameter("transformer.h.0.ln_1.weight")
    Poison(parameter, 3, math.nan)

    def spoil(it: Tensor) -> None:
        if run.state.global_step == 2 and it.grad is not None:
            it.grad.fill_(math.nan)

    temperature.register_post_accumulate_grad_hook(spoil)
    run.train()
    assert torch.isfinite(temperature)


def test_windows_cannot_be_held_back_for_what_is_not_the_models(tmp_path: Path) -> None:
    run, _ = with_temperature(tmp_path, GradGuardCallback(accumulate="fixed"))
    with pytest.raises(ValueError, match="1 of its parameters are not among those of GPT2LMHeadModel"):
        run.train()


def test_copies_of_a_guarded_trainer_train_and_of_a_callback_start_afresh(tmp_path: Path) -> None:
    callback = GradGuardCallback(log_layers=True)
    run = trainer(make("gpt2"), tmp_path, callback, max_steps=2)
    twin = copy.deepcopy(run)
    for one in (twin, run):
        torch.manual_seed(0)
        one.train()
    assert_bit_equal(weights(run.model), weights(twin.model))
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert other.guard is None
        assert other.config == callback.config


def test_the_collators_own_random_state_is_left_alone(tmp_path: Path) -> None:
    class Drops:
        """A collator that draws from a generator of its own."""

        def __init__(self) -> None:
            self.generator = torch.Generator().manual_seed(3)

        def __call__(self, rows: Any) -> dict[str, Tensor]:
            batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            drawn = torch.rand(batch["input_ids"].shape, generator=self.generator)
            return {**batch, "input_ids": torch.where(drawn < 0.3, 0, batch["input_ids"])}

    runs = []
    for callbacks in ([], [GradGuardCallback()]):
        model = make("bert")
        options = arguments(tmp_path, max_steps=3, gradient_accumulation_steps=2)
        runs.append(
            Trainer(model, options, train_dataset=language_data(64), data_collator=Drops(), callbacks=callbacks)
        )
        runs[-1].train()
    assert_bit_equal(weights(runs[0].model), weights(runs[1].model))


def test_a_disk_that_fails_when_layers_are_unfrozen_ends_the_record_only(tmp_path: Path) -> None:
    model = make("gpt2")
    model.transformer.h[0].requires_grad_(False)

    class Unfreezes(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step == 2:
                shutil.rmtree(tmp_path / "gradguard")
                (tmp_path / "gradguard").write_text("")
            if self.state.global_step == 3:
                model.transformer.h[0].requires_grad_(True)
            return super().training_step(*args, **kwargs)

    callback = GradGuardCallback(flush_seconds=0.0)
    run = trainer(model, tmp_path, callback, kind=Unfreezes)
    run.train()
    assert run.state.global_step == 6
    assert callback.guard is not None
    assert "unrecorded" in callback.guard.events[-1].message


def test_layers_that_get_only_zeros_are_not_measured_twice(tmp_path: Path) -> None:
    model = make("gpt2")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    guard = GradGuard(model, torch.optim.SGD(model.parameters(), lr=0.1), output_dir=tmp_path)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with Counters(model.parameters()) as counters:
        guard.before_step()
    assert counters.counts["gradient_reads"] <= 2 * size
    guard.close()


def test_complex_parameters_are_measured(tmp_path: Path) -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(7, dtype=torch.complex64))

    model = Complex()
    model.weight.grad = torch.full((7,), 3 + 4j)
    guard = GradGuard(model, torch.optim.SGD(model.parameters(), lr=0.1), output_dir=tmp_path)
    guard.before_step()
    assert guard.reading is not None
    assert guard.reading.total_norm == pytest.approx(5 * 7**0.5)
    guard.close()


def test_nan_weights_under_observe_do_not_flood_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make("gpt2")
    Poison(model.get_parameter("transformer.h.0.ln_1.weight"), 1, math.nan)
    callback = GradGuardCallback(nonfinite="observe")
    trainer(model, tmp_path, callback, max_steps=6).train()
    assert callback.guard is not None
    assert len([event for event in callback.guard.events if event.kind == "nonfinite"]) == 6
    assert len([line for line in caplog.messages if "nonfinite" in line]) == 1


def test_stand_ins_of_several_callbacks_do_not_pile_up(tmp_path: Path) -> None:
    run = trainer(make("gpt2"), tmp_path, GradGuardCallback(record=False), GradGuardCallback(record=False), max_steps=1)
    for _ in range(3):
        run.train()
    assert "backward" not in vars(run.accelerator)
    assert "clip_grad_norm_" not in vars(run.accelerator)


def test_what_a_loop_trained_is_let_go_when_the_guard_is_closed(tmp_path: Path) -> None:
    import weakref

    model = make("gpt2")
    guard = GradGuard(model, torch.optim.SGD(model.parameters(), lr=0.1), output_dir=tmp_path)
    model(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).loss.backward()
    guard.step()
    guard.close()
    reference = weakref.ref(model)
    del model
    assert reference() is None
    assert guard.reading is not None  # what was seen stays


def test_a_loop_without_close_leaves_all_its_windows(tmp_path: Path) -> None:
    model = make("gpt2")
    guard = GradGuard(model, torch.optim.SGD(model.parameters(), lr=0.1), output_dir=tmp_path)
    for _ in range(3):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).loss.backward()
        guard.step()
    del guard
    assert RunRecord.load(tmp_path).steps.tolist() == [1, 2, 3]


class CountsSteps(torch.optim.SGD):
    """Counts the steps of each group, as schedule-free optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize(("policy", "expected"), [({"accumulate": "fixed:windows=3"}, 2), ({}, 5)])
def test_a_window_without_an_update_leaves_no_trace_in_the_optimizer(
    policy: dict[str, str], expected: int, tmp_path: Path
) -> None:
    model = make("gpt2")
    optimizer = CountsSteps(model.parameters(), lr=1e-2)
    if not policy:
        Poison(model.get_parameter("transformer.h.0.ln_1.weight"), 2, math.nan)
    trainer(model, tmp_path, GradGuardCallback(**policy), optimizers=(optimizer, None)).train()
    assert optimizer.param_groups[0]["k"] == expected
    assert len(optimizer.param_groups) == 1


class CallsBackwardItself(Trainer):
    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss.backward()
        return loss.detach()


def test_windows_are_held_for_a_trainer_that_calls_backward_itself(tmp_path: Path) -> None:
    callback = GradGuardCallback(accumulate="fixed:windows=3")
    run = trainer(make("gpt2"), tmp_path, callback, kind=CallsBackwardItself)
    before = weights(run.model)
    run.train()
    assert callback.guard is not None
    assert callback.guard.updates == 2
    assert not torch.equal(before["transformer.wte.weight"], run.model.state_dict()["transformer.wte.weight"])


class PopsItsInputs(Trainer):
    """Takes out of its inputs what the model does not know, and logs while it is at it."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.log({"seen": float(inputs.pop("index").sum())})
        return super().training_step(model, inputs, *args, **kwargs)


def test_a_step_that_takes_its_inputs_apart_can_be_repeated(tmp_path: Path) -> None:
    model = make("gpt2")
    Poison(model.get_parameter("transformer.h.0.ln_1.weight"), 2, math.nan)
    callback = GradGuardCallback(save_batch=True)
    data = [{**row, "index": torch.tensor(index)} for index, row in enumerate(language_data(64))]
    run = PopsItsInputs(
        model, arguments(tmp_path, max_steps=3, remove_unused_columns=False), train_dataset=data, callbacks=[callback]
    )
    run.train()
    assert callback.guard is not None
    assert "transient" in callback.guard.events[0].message
    assert len([entry for entry in run.state.log_history if "seen" in entry]) == 3
    saved = load_file(next((tmp_path / "gradguard" / "batches").iterdir()))
    assert set(saved) == {"input_ids", "labels", "index"}


def test_a_batch_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_gradguard.observe import origin

    def fails(*args: Any) -> None:
        raise NotImplementedError("no such tensor")

    monkeypatch.setattr(origin, "save", fails)
    model = make("gpt2")
    Poison(model.get_parameter("transformer.h.0.ln_1.weight"), 2, math.nan)
    callback = GradGuardCallback(save_batch=True)
    trainer(model, tmp_path, callback, max_steps=3).train()
    assert callback.guard is not None
    assert "NotImplementedError: no such tensor" in callback.guard.events[1].message


@pytest.mark.parametrize("policy", ["stop", "observe", "skip"])
def test_a_scalers_search_ends_no_training(policy: str, tmp_path: Path) -> None:
    callback = GradGuardCallback(nonfinite=policy)
    run = trainer(make("gpt2"), tmp_path, callback, kind=OverflowsTwice, fp16=True)
    run.train()
    assert run.state.global_step == 6
    assert callback.guard is not None
    assert callback.guard.events == []


def test_two_guards_that_act_are_refused(tmp_path: Path) -> None:
    run = trainer(make("gpt2"), tmp_path, GradGuardCallback(), GradGuardCallback(accumulate="fixed"))
    with pytest.raises(ValueError, match="2 guards on one trainer"):
        run.train()


def test_a_short_run_is_judged_as_soon_as_it_can_be(tmp_path: Path) -> None:
    callback = GradGuardCallback()
    trainer(make("gpt2"), tmp_path, callback, max_steps=12).train()
    assert callback.guard is not None
    assert callback.guard.verdict.kind != "unknown"
