"""What a user is told of a run, and what must not alarm."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertLMHeadModel

from hf_gradguard import GradGuardCallback, RunRecord
from hf_gradguard.judge import Thresholds
from tests.models import make
from tests.training import trainer

QUICK = Thresholds(min_updates=5, every=1, window=10)


def watched(model: Any, tmp_path: Path, **options: Any) -> GradGuardCallback:
    callback = GradGuardCallback(thresholds=QUICK, weights_every=3)
    trainer(
        model, tmp_path, callback, **{"max_steps": 12, "learning_rate": 1e-3, "logging_steps": 4, **options}
    ).train()
    return callback


def kinds(callback: GradGuardCallback) -> list[str]:
    assert callback.guard is not None
    return [event.kind for event in callback.guard.events]


class Damped(torch.nn.Module):
    """A block that passes hardly any gradient on to what is below it, and none of its own output."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.block(hidden * 1e-2 + hidden.detach() * 0.99, *args, **kwargs)


def deep_bert(layers: int = 6) -> BertLMHeadModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        is_decoder=True,
    )
    return BertLMHeadModel(config)


def test_a_gradient_that_fades_is_called_vanishing_once_with_the_layer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    model = deep_bert()
    for index in range(6):
        model.bert.encoder.layer[index] = Damped(model.bert.encoder.layer[index])
    with caplog.at_level(logging.WARNING, logger="hf_gradguard"):
        callback = watched(model, tmp_path)
    assert callback.guard is not None
    assert callback.guard.verdict.kind == "vanishing"
    assert kinds(callback) == ["vanishing"]
    event = callback.guard.events[0]
    assert event.layer is not None
    assert event.layer.startswith("layer ")
    ours = [record for record in caplog.records if record.name.startswith("hf_gradguard")]
    assert ["vanishing" in record.message for record in ours] == [True]
    assert "Verdict: vanishing" in capsys.readouterr().out
    assert [stored.kind for stored in RunRecord.load(tmp_path).events] == ["vanishing"]


def test_a_sound_model_is_healthy_and_nothing_is_shouted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_gradguard"):
        callback = watched(deep_bert(), tmp_path)
    assert kinds(callback) == ["healthy"]
    assert not [record for record in caplog.records if record.name.startswith("hf_gradguard")]


def test_lora_whose_a_starts_without_gradient_is_no_alarm(tmp_path: Path) -> None:
    model = get_peft_model(make("gpt2"), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    callback = watched(model, tmp_path)
    assert kinds(callback) in ([], ["healthy"])
    first = RunRecord.load(tmp_path).norms[0]
    names = RunRecord.load(tmp_path).parameters
    assert {name for name, norm in zip(names, first, strict=True) if norm == 0} == {
        name for name in names if "lora_A" in name
    }


def test_frozen_and_unused_layers_are_no_alarm(tmp_path: Path) -> None:
    model = deep_bert()
    model.bert.encoder.layer[:2].requires_grad_(False)
    model.unused = torch.nn.Linear(3, 3)
    callback = watched(model, tmp_path)
    assert kinds(callback) == ["healthy"]
    assert callback.guard is not None
    assert callback.guard.reading is not None
    assert callback.guard.reading.norms()["unused.weight"] is None
    assert not any(name.startswith("bert.encoder.layer.0.") for name in callback.guard.reading.norms())


def test_branches_that_start_at_zero_are_no_alarm(tmp_path: Path) -> None:
    model = deep_bert()
    for layer in model.bert.encoder.layer:
        torch.nn.init.zeros_(layer.attention.output.dense.weight)
        torch.nn.init.zeros_(layer.output.dense.weight)
    assert kinds(watched(model, tmp_path)) == ["healthy"]


def test_a_layer_cut_off_from_the_loss_is_called_dead(tmp_path: Path) -> None:
    class Silent(torch.nn.Module):
        def __init__(self, block: torch.nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return hidden + 0.0 * self.block(hidden, *args, **kwargs)

    model = deep_bert()
    model.bert.encoder.layer[2] = Silent(model.bert.encoder.layer[2])
    callback = watched(model, tmp_path)
    assert kinds(callback)[-1] == "dead"
    assert callback.guard is not None
    assert callback.guard.verdict.layer == "layer 2"


def test_bf16_weights_that_updates_cannot_move_are_called_underflow(tmp_path: Path) -> None:
    callback = watched(deep_bert().to(torch.bfloat16), tmp_path, learning_rate=1e-7)
    assert kinds(callback)[-1] == "underflow"


def test_layer_norms_go_into_the_log_when_asked_for(tmp_path: Path) -> None:
    run = trainer(make("gpt2"), tmp_path, GradGuardCallback(log_layers=True))
    run.train()
    row = run.state.log_history[0]
    layers = [row[f"gradguard/layer_{index:03d}/grad_norm"] for index in range(3)]
    assert layers == pytest.approx(RunRecord.load(tmp_path).layer_norms[0].tolist())
