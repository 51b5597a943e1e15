"""A window of several micro-batches is one joint batch, also for models whose own loss Trainer takes for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification
from transformers.trainer_pt_utils import LabelSmoother

from hf_gradguard.training.blocks import IGNORED
from hf_gradguard.training.loss import mean_over_targets
from tests.training import BeforeClipping, arguments

KINDS = {"masked": BertForMaskedLM, "classes": BertForSequenceClassification}


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        num_labels=3,
    )
    return KINDS[kind](config)


def rows(kind: str, count: int = 8) -> list[dict[str, Tensor]]:
    """Rows with different numbers of targets, as masks give them."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(count):
        ids = torch.randint(4, 40, (12,), generator=generator)
        labels = ids.clone()
        labels[torch.rand(12, generator=generator) > 0.1 + 0.8 * (index % 3) / 2] = IGNORED
        found.append({"input_ids": ids, "labels": labels if kind == "masked" else torch.tensor(index % 3)})
    return found


def gradient(kind: str, folder: Path, batch: int, windows: int, **options: Any) -> dict[str, Tensor]:
    """The gradient of the first update, in float64, under a real Trainer."""
    seen: dict[str, Tensor] = {}

    class Watching(BeforeClipping):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            if self.accelerator.sync_gradients:
                seen.update({name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})
            return loss

    run = Watching(
        model=make(kind).double(),
        args=arguments(
            folder,
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=windows,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
        ),
        train_dataset=rows(kind),
        **options,
    )
    run.train()
    return seen


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two gradients, as a share of the larger norm."""
    assert one.keys() == other.keys()
    norm = torch.cat([value.flatten() for value in one.values()]).norm()
    return float(torch.cat([(one[name] - other[name]).flatten() for name in one]).norm() / norm)


@pytest.mark.parametrize("kind", KINDS)
def test_four_micro_batches_are_one_joint_batch(kind: str, tmp_path: Path) -> None:
    joint = gradient(kind, tmp_path / "joint", 8, 1, compute_loss_func=mean_over_targets)
    # By hand: the mean over all targets of the batch.
    model, batch = make(kind).double(), rows(kind)
    ids, labels = (torch.stack([row[name] for row in batch]) for name in ("input_ids", "labels"))
    loss = nn.CrossEntropyLoss()(model(input_ids=ids).logits.flatten(0, -2), labels.flatten())
    loss.backward()
    by_hand = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert difference(by_hand, joint) < 1e-6
    for micro_batch in (4, 2, 1):
        windows = gradient(
            kind, tmp_path / str(micro_batch), micro_batch, 8 // micro_batch, compute_loss_func=mean_over_targets
        )
        assert difference(joint, windows) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_trainers_own_loss_is_four_times_too_large(kind: str, tmp_path: Path) -> None:
    """Why the recipes give another; when this fails, Transformers has been mended."""
    joint = gradient(kind, tmp_path / "joint", 8, 1)
    windows = gradient(kind, tmp_path / "windows", 2, 4)
    norms = [torch.cat([value.flatten() for value in found.values()]).norm() for found in (joint, windows)]
    assert 3 < float(norms[1] / norms[0]) < 6


@pytest.mark.parametrize("shape", [(7, 5), (3, 7, 5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_over_targets_in_float64(shape: tuple[int, ...], smoothing: float) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(shape, generator=generator)
    labels = torch.randint(5, shape[:-1], generator=generator)
    labels.view(-1)[::3] = IGNORED
    total, count = 0.0, 0
    for values, target in zip(logits.view(-1, 5).double(), labels.view(-1), strict=True):
        if target != IGNORED:
            log = values - torch.logsumexp(values, 0)
            total -= float((1 - smoothing) * log[target] + smoothing * log.mean())
            count += 1
    for given in ({"logits": logits}, (logits, "hidden")):
        assert mean_over_targets(given, labels, smoothing=smoothing).item() == pytest.approx(total / count, rel=1e-6)
        for items in (10, torch.tensor(10)):
            found = mean_over_targets(given, labels, items, smoothing=smoothing)
            assert found.item() == pytest.approx(total / 10, rel=1e-6)


def test_smoothing_is_that_of_trainer() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(4, 6, 9, generator=generator), torch.randint(9, (4, 6), generator=generator)
    labels[:, ::2] = IGNORED
    expected = LabelSmoother(0.2)({"logits": logits}, labels)
    torch.testing.assert_close(mean_over_targets({"logits": logits}, labels, smoothing=0.2), expected)


def test_without_a_target_the_loss_is_zero_and_so_is_its_gradient() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = mean_over_targets({"logits": logits}, torch.full((2, 3), IGNORED), torch.tensor(0))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    assert mean_over_targets({"logits": logits}, torch.full((2, 3), IGNORED)).item() == 0.0


def test_half_precision_logits_are_summed_in_single() -> None:
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(50) % 9
    found = mean_over_targets({"logits": logits}, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, nn.CrossEntropyLoss()(logits.double(), labels).float())


def test_trainer_calls_it_with_the_targets_of_the_whole_window(tmp_path: Path) -> None:
    asked: list[Any] = []

    def watching(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        asked.append(num_items_in_batch)
        return mean_over_targets(outputs, labels, num_items_in_batch)

    gradient("masked", tmp_path, 2, 4, compute_loss_func=watching)
    targets = sum(int((row["labels"] != IGNORED).sum()) for row in rows("masked"))
    assert [int(value) for value in asked] == [targets] * 4
