"""In a loop of one's own the guard does the same as under the Trainer."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from hf_gradguard import GradGuard, GradGuardConfig, RunRecord
from tests.integration.test_accumulation import difference, padded_data, without_dropout
from tests.models import language_data, make
from tests.training import Poison, assert_bit_equal, weights

BATCH = 4


def batches(data: Sequence[Any], size: int = BATCH) -> list[dict[str, Tensor]]:
    return [
        {key: torch.stack([row[key] for row in data[start : start + size]]) for key in ("input_ids", "labels")}
        for start in range(0, len(data), size)
    ]


class Loop:
    """A training loop with Accelerate, guarded or not, that can be left and entered again."""

    def __init__(self, folder: Path, *, steps: int = 1, guarded: bool = True, seed: int = 0, **options: Any) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps, project_dir=str(folder))
        self.model = without_dropout(make("gpt2", seed=seed))
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.schedule = LinearLR(optimizer, 1.0, 0.1, total_iters=20)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.guard = None
        if guarded:
            self.guard = GradGuard(
                self.wrapped, self.optimizer, GradGuardConfig(**options), accelerator=self.accelerator,
                lr_scheduler=self.schedule,
            )  # fmt: skip
            self.accelerator.register_for_checkpointing(self.guard, self.schedule)

    def run(self, data: Sequence[dict[str, Tensor]], *, tokens: bool = False) -> None:
        for batch in data:
            with self.accelerator.accumulate(self.wrapped):
                loss = self.wrapped(**batch).loss
                self.accelerator.backward(loss)
                if self.guard is not None:
                    self.guard.step(loss, num_tokens=(batch["labels"][:, 1:] != -100).sum() if tokens else None)
                else:
                    self.optimizer.step()
                    if self.accelerator.sync_gradients:
                        self.schedule.step()
                    self.optimizer.zero_grad()


def test_equal_windows_are_bit_equal_to_accelerates_own_accumulation(tmp_path: Path) -> None:
    stock = Loop(tmp_path / "stock", steps=4, guarded=False)
    stock.run(batches(language_data(32)))
    held = Loop(tmp_path / "held", accumulate="fixed:windows=4", lr_schedule="updates")
    held.run(batches(language_data(32)))
    assert_bit_equal(weights(stock.model), weights(held.model))


def test_windows_count_by_the_tokens_that_the_loop_tells(tmp_path: Path) -> None:
    data = padded_data(16)
    large = Loop(tmp_path / "large", guarded=False)
    large.run(batches(data, 16))
    held = Loop(tmp_path / "held", accumulate="fixed:windows=4", lr_schedule="updates")
    held.run(batches(data), tokens=True)
    assert difference(weights(large.model), weights(held.model)) < 1e-6
    untold = Loop(tmp_path / "untold", accumulate="fixed:windows=4", lr_schedule="updates")
    untold.run(batches(data))
    assert difference(weights(large.model), weights(untold.model)) > 1e-5


@pytest.mark.parametrize(
    "policy", [{"accumulate": "fixed:windows=4"}, {"clip": "zclip"}, {"accumulate": "noise_scale"}]
)
def test_a_loop_restored_while_windows_are_held_is_bit_equal(policy: dict[str, str], tmp_path: Path) -> None:
    data = batches(language_data(64))
    whole = Loop(tmp_path / "whole", **policy)
    whole.run(data)
    first = Loop(tmp_path / "first", **policy)
    first.run(data[:6])
    first.accelerator.save_state(str(tmp_path / "state"))
    assert first.guard is not None
    first.guard.close("interrupted")
    second = Loop(tmp_path / "first", seed=1, **policy)
    second.accelerator.load_state(str(tmp_path / "state"))
    second.run(data[6:])
    assert_bit_equal(weights(whole.model), weights(second.model))
    assert second.guard is not None
    assert whole.guard is not None
    assert second.guard.updates == whole.guard.updates
    second.guard.close()
    assert RunRecord.load(tmp_path / "first").steps.tolist() == list(range(1, 17))


def test_what_is_held_at_the_end_is_used_by_update_or_discarded_with_an_event(tmp_path: Path) -> None:
    data = batches(language_data(24))
    large = Loop(tmp_path / "large", guarded=False)
    large.run(batches(language_data(16), 16))
    large.run(batches(language_data(24)[16:], 8))
    held = Loop(tmp_path / "held", accumulate="fixed:windows=4", lr_schedule="updates")
    held.run(data, tokens=True)
    assert held.guard is not None
    assert held.guard.update()
    assert not held.guard.update()
    held.guard.close()
    assert held.guard.updates == 2
    assert difference(weights(large.model), weights(held.model)) < 1e-5
    dropped = Loop(tmp_path / "dropped", accumulate="fixed:windows=4")
    dropped.run(data)
    assert dropped.guard is not None
    dropped.guard.close()
    assert dropped.guard.events[-1].kind == "discarded"
    assert dropped.guard.events[-1].value == 2


@pytest.mark.parametrize("steps", [1, 3])
def test_a_fault_that_comes_with_the_data_is_traced_to_its_module(steps: int, tmp_path: Path) -> None:
    loop = Loop(tmp_path, steps=steps)
    data = batches(language_data(24))
    data[4]["input_ids"][0, 3] = 255

    def fails(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * torch.where((data[4]["input_ids"] == 255).any() & loop_is_at(loop, data[4]), math.nan, 1.0)

    loop.model.get_submodule("transformer.h.1.mlp.act").register_forward_hook(fails)
    loop.current = None  # type: ignore[attr-defined]
    loop.model.register_forward_pre_hook(lambda m, a, k: setattr(loop, "current", k["input_ids"]), with_kwargs=True)
    loop.run(data)
    assert loop.guard is not None
    events = [event for event in loop.guard.events if event.kind == "nonfinite"]
    assert [(event.step, event.micro_batch) for event in events] == [(4 // steps + 1, 4 % steps)]
    assert "transformer.h.1.mlp.act" in events[0].message
    assert all(torch.isfinite(tensor).all() for tensor in weights(loop.model).values())


def loop_is_at(loop: Any, batch: dict[str, Tensor]) -> Tensor:
    return torch.tensor(loop.current is not None and torch.equal(loop.current, batch["input_ids"]))


def test_a_fault_that_does_not_come_again_is_called_transient(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    name = "transformer.h.1.mlp.c_fc.weight"
    Poison(loop.model.get_parameter(name), 2, math.inf)
    loop.run(batches(language_data(16)))
    assert loop.guard is not None
    event = loop.guard.events[0]
    assert (event.kind, event.step, event.parameter, event.micro_batch, event.action) == (
        "nonfinite",
        2,
        name,
        0,
        "skip",
    )
    assert "transient" in event.message


@pytest.mark.parametrize(("schedule", "expected"), [("windows", 8), ("updates", 2)])
def test_the_schedule_follows_windows_or_updates(schedule: str, expected: int, tmp_path: Path) -> None:
    loop = Loop(tmp_path, accumulate="fixed:windows=4", lr_schedule=schedule)
    loop.run(batches(language_data(32)))
    assert loop.schedule.last_epoch == expected


def test_a_copy_of_the_model_is_nobodys_to_watch(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    data = batches(language_data(8))
    loop.run(data[:1])
    average = copy.deepcopy(loop.model).train()
    torch.save(loop.model, tmp_path / "model.pt")
    average(**data[1]).loss.backward()
    loop.run(data[1:])
    assert loop.guard is not None
    assert loop.guard.windows == 2
    loop.guard.close()
    assert not loop.model._forward_pre_hooks
