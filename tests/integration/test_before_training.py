"""What is wrong with a run is said before it starts, once, with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer

from hf_gradguard import GradGuardCallback, RunRecord
from hf_gradguard.integrations import preflight
from tests.models import VOCABULARY, language_data, make
from tests.training import arguments, assert_bit_equal, trainer, weights


def warnings_of(run: Trainer, callback: GradGuardCallback) -> list[str]:
    run.train()
    assert callback.guard is not None
    return [event.message for event in callback.guard.events if event.kind == "warning"]


ACCUMULATION: dict[str, Any] = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "max_steps": 3}


def gradient_norm(name: str, tmp_path: Path, **options: Any) -> float:
    """The norm of the first update's gradient, measured without a guard."""
    model = make(name)
    model.eval()  # only so that dropout does not blur the comparison
    run = trainer(model, tmp_path, max_steps=1, **options)
    run.model.train = lambda mode=True: run.model  # type: ignore[method-assign]
    run.train()
    return float(run.state.log_history[0]["grad_norm"])


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "opt", "llama", "qwen3", "t5", "bart", "modernbert"])
def test_a_warning_comes_exactly_where_accumulation_makes_gradients_too_large(name: str, tmp_path: Path) -> None:
    callback = GradGuardCallback()
    found = warnings_of(trainer(make(name), tmp_path / "watched", callback, **ACCUMULATION), callback)
    whole = gradient_norm(name, tmp_path / "whole", per_device_train_batch_size=8)
    parts = gradient_norm(name, tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    is_wrong = parts > 2 * whole
    assert bool(found) == is_wrong, (name, whole, parts, found)
    if is_wrong:
        assert "accepts_loss_kwargs = False" in found[0]
        assert "4 times too large" in found[0]


def test_the_remedy_that_the_warning_names_heals(tmp_path: Path) -> None:
    model = make("bert")
    model.accepts_loss_kwargs = False  # type: ignore[assignment]
    callback = GradGuardCallback()
    assert warnings_of(trainer(model, tmp_path, callback, **ACCUMULATION), callback) == []


def test_classification_is_looked_at_as_well(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    data = [{**row, "labels": torch.tensor(index % 2)} for index, row in enumerate(language_data(16))]
    callback = GradGuardCallback()
    run = Trainer(
        BertForSequenceClassification(config),
        arguments(tmp_path, **ACCUMULATION),
        train_dataset=data,
        callbacks=[callback],
    )
    assert len(warnings_of(run, callback)) == 1


def test_looking_changes_no_random_state_and_no_weight(tmp_path: Path) -> None:
    watched = trainer(make("bert"), tmp_path / "watched", GradGuardCallback(), **ACCUMULATION)
    watched.train()
    unwatched = trainer(make("bert"), tmp_path / "unwatched", **ACCUMULATION)
    unwatched.train()
    assert_bit_equal(weights(watched.model), weights(unwatched.model))


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_an_optimizer_that_leaves_no_gradient_is_named_before_training(optim: str, tmp_path: Path) -> None:
    run = trainer(make("gpt2"), tmp_path, optim=optim)
    (message,) = preflight.warnings_before_training(run)
    assert optim in message


def test_a_run_without_gradients_to_see_is_told_so_once_and_goes_on(tmp_path: Path) -> None:
    model = make("gpt2")
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda tensor: setattr(tensor, "grad", None))
    callback = GradGuardCallback()
    (message,) = warnings_of(trainer(model, tmp_path, callback), callback)
    assert "no parameter has a gradient" in message
    assert RunRecord.load(tmp_path).losses.shape == (6,)


def test_several_gpus_in_one_process_are_told_how_to_start_instead(tmp_path: Path) -> None:
    run = trainer(make("gpt2"), tmp_path)
    run.args._n_gpu = 2
    (message,) = preflight.warnings_before_training(run)
    assert "accelerate launch" in message


def test_a_model_with_nothing_to_train_is_refused(tmp_path: Path) -> None:
    model = make("gpt2")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no trainable parameter.*Unfreeze"):
        trainer(model, tmp_path, GradGuardCallback()).train()


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    run = Trainer(make("gpt2"), arguments(tmp_path), train_dataset=[], callbacks=[GradGuardCallback()])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="train_dataset is empty"):
        run.train()


def test_a_record_that_cannot_be_written_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "gradguard").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="gradguard"):
        trainer(make("gpt2"), tmp_path, GradGuardCallback()).train()


def test_without_a_record_nothing_is_written(tmp_path: Path) -> None:
    trainer(make("gpt2"), tmp_path, GradGuardCallback(record=False)).train()
    assert not (tmp_path / "gradguard").exists()
