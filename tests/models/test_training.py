"""Under Trainer, with the callback: depth is the layer, and a run resumes to the bit."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import Trainer

from hf_gradguard import GradGuardCallback, RecurrentConfig, RecurrentForCausalLM, RunRecord
from hf_gradguard.cli.demo import blocks, real_text
from hf_gradguard.models.modeling import RecurrentModel
from hf_gradguard.observe.structure import read_layout
from tests.models.recurrent import CELLS, classifier, language_model, padded, tokens
from tests.processes import leave_group
from tests.training import BeforeClipping, arguments, assert_bit_equal, trainer, weights

DROPOUTS: dict[str, Any] = {
    "input_dropout": 0.1,
    "layer_dropout": 0.1,
    "recurrent_dropout": 0.2,
    "locked_dropout": True,
}
RANKS = 2


def bytes_model(cell: str = "lstm", **options: Any) -> RecurrentForCausalLM:
    torch.manual_seed(0)
    defaults = {"vocab_size": 256, "hidden_size": 32, "num_layers": 3}
    return RecurrentForCausalLM(RecurrentConfig(cell=cell, **{**defaults, **options}))  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
def test_depth_is_the_layer(tied: bool) -> None:
    model = language_model(tie_word_embeddings=tied, embedding_size=8, layer_norm=True, residual=True)
    layout, _ = read_layout(model)
    assert [group.name for group in layout.groups] == ["embeddings", "layer 0", "layer 1", "layer 2", "head"]
    where = {info.name: layout.groups[info.group].name for info in layout.parameters}
    for name, group in where.items():
        if name.startswith("model.layers."):
            assert group == f"layer {name.split('.')[2]}"
        else:
            assert group == ("embeddings" if "embed_tokens" in name else "head")
    assert ("projection.weight" in where) == tied


def test_depth_is_the_layer_in_a_classifier_and_in_the_body_alone() -> None:
    names = ["embeddings", "layer 0", "layer 1", "layer 2"]
    assert [group.name for group in read_layout(classifier())[0].groups] == [*names, "head"]
    assert [group.name for group in read_layout(RecurrentModel(classifier().config))[0].groups] == names


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_on_real_text_the_gradient_is_healthy_and_the_loss_falls(cell: str, tmp_path: Path) -> None:
    model = bytes_model(cell, layer_norm=True, residual=True)
    callback = GradGuardCallback()
    run = Trainer(
        model,
        arguments(tmp_path, max_steps=60, per_device_train_batch_size=8, learning_rate=5e-3),
        train_dataset=blocks(real_text()[0][:40_000]),
        callbacks=[callback],
    )
    run.train()
    record = RunRecord.load(tmp_path)
    assert record.layers == ["layer 0", "layer 1", "layer 2"]
    assert callback.guard is not None
    assert callback.guard.verdict.kind == "healthy"
    assert {event.kind for event in callback.guard.events} == {"healthy"}
    assert record.losses[0] == pytest.approx(torch.tensor(256.0).log().item(), abs=0.3)
    assert record.losses[-10:].mean() < 3.2


@pytest.mark.parametrize("cell", CELLS)
def test_norms_are_exact_and_watching_changes_nothing(cell: str, tmp_path: Path) -> None:
    unwatched = trainer(bytes_model(cell, **DROPOUTS), tmp_path / "unwatched")
    unwatched.train()
    callback = GradGuardCallback()
    watched = trainer(bytes_model(cell, **DROPOUTS), tmp_path / "watched", callback, kind=BeforeClipping)
    watched.train()
    assert_bit_equal(weights(unwatched.model), weights(watched.model))
    assert callback.guard is not None
    assert callback.guard.reading is not None
    assert callback.guard.reading.norms() == pytest.approx(watched.seen[-1], rel=1e-6)  # type: ignore[attr-defined]


@pytest.mark.parametrize("cell", CELLS)
def test_a_run_resumes_to_the_bit(cell: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer(bytes_model(cell, **DROPOUTS), tmp_path / "whole", GradGuardCallback(), **options)
    whole.train()
    resumed = trainer(bytes_model(cell, **DROPOUTS), tmp_path / "resumed", GradGuardCallback(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_bit_equal(weights(whole.model), weights(resumed.model))
    saved = RecurrentForCausalLM.from_pretrained(tmp_path / "resumed" / "checkpoint-6")
    assert_bit_equal(weights(saved), weights(whole.model))


def test_evaluation_in_between_changes_nothing_and_gives_a_loss(tmp_path: Path) -> None:
    data = blocks(real_text()[0][:4_000])
    found = []
    for strategy in ("no", "steps"):
        options: dict[str, Any] = {"eval_strategy": strategy, "eval_steps": 2, "prediction_loss_only": False}
        run = Trainer(
            bytes_model(),
            arguments(tmp_path / strategy, **options),
            train_dataset=data,
            eval_dataset=data[:8],
        )
        run.train()
        found.append(weights(run.model))
    assert_bit_equal(*found)
    assert run.evaluate()["eval_loss"] > 0
    assert run.predict(data[:8]).predictions.shape == (8, 64, 256)


class Carrying(Trainer):
    """Truncated backpropagation through time."""

    carried: Any = None

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **options: Any) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **options)
        inputs = {**inputs, "past_key_values": self.carried, "use_cache": True}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        self.carried = outputs.past_key_values.detach()
        return (loss, outputs) if return_outputs else loss


def test_a_trainer_can_carry_the_state_from_batch_to_batch(tmp_path: Path) -> None:
    text = torch.tensor(list(real_text()[0][: 2 * 41])).view(2, 41)
    pieces = list(zip(text[:, :-1].split(8, dim=1), text[:, 1:].split(8, dim=1), strict=True))
    rows = [
        {"input_ids": ids[row], "labels": targets[row], "shift_labels": targets[row]}
        for ids, targets in pieces
        for row in range(2)
    ]
    options: dict[str, Any] = {
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "optim": "sgd",
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    run = Carrying(
        bytes_model(),
        arguments(tmp_path, **options),
        train_dataset=rows,
        eval_dataset=rows[:2],
        callbacks=[GradGuardCallback()],
    )
    run.train()
    model = bytes_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    state = None
    for ids, targets in pieces:
        outputs = model.train()(ids, past_key_values=state, use_cache=True)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        state = outputs.past_key_values.detach()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(run.model.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    ids, mask = padded([tokens(1, 6)[0], tokens(1, 3, seed=2)[0]], "right")
    found = []
    for checkpointing in (False, True):
        model = language_model(layer_norm=True, residual=True, **DROPOUTS).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(1)
        state = model(ids, attention_mask=mask, use_cache=True).past_key_values
        model(ids, past_key_values=state, labels=ids).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"recurrent_dropout": 0.5, "locked_dropout": True, "layer_dropout": 0.2}])
def test_compiled_it_computes_the_same(options: dict[str, Any]) -> None:
    model = language_model(**options)
    compiled = torch.compile(model, backend="eager")
    ids, mask = padded([tokens(1, 6)[0], tokens(1, 3, seed=2)[0]], "left")
    with torch.no_grad():
        assert torch.equal(compiled(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    model.train()
    losses = []
    for one in (model, compiled):
        torch.manual_seed(1)
        model.zero_grad()
        loss = one(ids, labels=ids).loss
        loss.backward()
        losses.append((loss.item(), model.model.layers[0].cell.weight_hh_l0.grad.clone()))
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])


@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_weights_and_autocast_work(cell: str) -> None:
    ids, mask = padded([tokens(1, 6)[0], tokens(1, 3, seed=2)[0]], "left")
    exact = language_model(cell=cell)(ids, attention_mask=mask, labels=ids).loss.item()
    for weights_too in (True, False):
        model = language_model(cell=cell, layer_norm=False).to(torch.bfloat16 if weights_too else torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=not weights_too):
            first = model(ids, attention_mask=mask, labels=ids)  # packed
            second = model(ids, past_key_values=first.past_key_values, labels=ids)  # and not
            third = model(ids, attention_mask=mask, past_key_values=second.past_key_values, labels=ids)
        assert first.loss.item() == pytest.approx(exact, rel=0.02)
        third.loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def parallel_run(folder: Path, batch: int, **options: Any) -> Trainer:
    settings = {
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_strategy": "no",
        "per_device_train_batch_size": batch,
    }
    callback = GradGuardCallback()
    run = trainer(bytes_model("gru", layer_norm=True), folder, callback, **settings, **options)
    run.train()
    assert callback.guard is not None
    assert callback.guard.windows == 6
    return run


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run = parallel_run(Path(folder) / "two", 2, ddp_backend="gloo", save_strategy="steps", save_steps=6)
    torch.save(weights(run.accelerator.unwrap_model(run.model)), Path(folder) / f"{rank}.pt")
    del run
    leave_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_train_as_one_and_save_what_loads(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS))
    assert_bit_equal(first, second)
    for name, tensor in weights(parallel_run(tmp_path / "one", 4).model).items():
        torch.testing.assert_close(tensor, first[name], rtol=1e-5, atol=1e-6)
    assert_bit_equal(weights(RecurrentForCausalLM.from_pretrained(tmp_path / "two" / "checkpoint-6")), first)
