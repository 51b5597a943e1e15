"""On two processes that hold a replica or a shard each, windows are held back as on one."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from hf_gradguard import GradGuardCallback
from tests.integration.test_accumulation import difference, padded_data, without_dropout
from tests.models import make
from tests.training import arguments, assert_bit_equal, weights

RANKS = 2
POLICY = {"accumulate": "fixed:windows=4"}
OPTIONS: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "max_grad_norm": 0.5,
    "save_strategy": "no",
    "logging_strategy": "no",
}

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def train(folder: Path, policy: dict[str, str], *, sharded: bool = False, **options: Any) -> Trainer:
    callback = GradGuardCallback(**policy)
    run = Trainer(
        sharded_model(folder.parent / "vanilla") if sharded else without_dropout(make("gpt2")),
        arguments(folder, **{**OPTIONS, **options}),
        train_dataset=padded_data(64),
        callbacks=[callback],
    )
    run.train()
    return run


def sharded_model(path: Path) -> nn.Module:
    """The same weights, of which each process holds a part."""
    from transformers import GPT2LMHeadModel
    from transformers.distributed import DistributedConfig

    return without_dropout(GPT2LMHeadModel.from_pretrained(path, distributed_config=DistributedConfig(fsdp_size=RANKS)))


SCENARIOS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "replica, stock": ({}, {"max_steps": 2, "gradient_accumulation_steps": 4}),
    "replica, fixed": (POLICY, {"max_steps": 8}),
    "replica, norm_threshold": (
        {"accumulate": "norm_threshold:threshold=1.1,max_windows=4", "clip": "zclip"},
        {"max_steps": 8},
    ),
    "shards, fixed": (POLICY, {"max_steps": 8, "sharded": True}),
    "shards, fixed, global": ({**POLICY, "clip": "global:max_norm=0.5"}, {"max_steps": 8, "sharded": True}),
    "shards, fixed, adagc": ({**POLICY, "clip": "adagc"}, {"max_steps": 8, "sharded": True}),
}


def worker(rank: int, port: int, folder: str) -> None:
    """Trains every scenario; all in one start, which takes longer than the trainings."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, (policy, options) in SCENARIOS.items():
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        run = train(place, policy, ddp_backend="gloo", per_device_train_batch_size=2, **options)
        state = {key: full(tensor) for key, tensor in run.model.state_dict().items()}
        torch.save(state, place / f"{rank}.pt")
    dist.destroy_process_group()


def full(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor


def test_on_two_processes_windows_are_held_back_as_on_one(tmp_path: Path) -> None:
    make("gpt2").save_pretrained(tmp_path / "vanilla")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=RANKS)
    found = {}
    for name in SCENARIOS:
        states = [torch.load(tmp_path / name / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
        assert_bit_equal(*states)
        found[name] = states[0]
    for name, (policy, options) in SCENARIOS.items():
        one = train(tmp_path / f"one, {name}", policy, per_device_train_batch_size=4, **{**options, "sharded": False})
        assert difference(weights(one.model), found[name]) < 1e-6, name
    assert difference(found["replica, stock"], found["replica, fixed"]) < 1e-6
