"""A patched model that several processes train has the gradients of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from hf_gradguard.patch import Branch, Multiplier, attach, read_architecture
from tests.patch.gates import make_gate
from tests.patch.models import CASES, gradients

RANKS = 2


def one_gain(branch: Branch) -> Multiplier:
    return Multiplier(0.4)


def fsdp2(model: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in read_architecture(model).layers:
        fully_shard(layer.module)
    fully_shard(model)
    return model  # type: ignore[no-any-return]


def ddp(model: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def worker(rank: int, store: str, wrap: Callable[[Any], nn.Module]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        for name in ("gpt2", "bart", "gpt_neox-parallel"):
            for make_rule in (make_gate, one_gain):
                for checkpointing in (False, True):
                    model = CASES[name].make().train(checkpointing)
                    attach(model, make_rule)
                    expected = gradients(model, CASES[name].inputs())
                    if checkpointing:
                        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                    found = gradients(wrap(model), CASES[name].inputs())  # the same batch on every rank
                    found = {key.removeprefix("module."): value for key, value in found.items()}
                    assert set(found) == set(expected)
                    for key, gradient in expected.items():
                        whole = found[key].full_tensor() if hasattr(found[key], "full_tensor") else found[key]
                        torch.testing.assert_close(whole, gradient, atol=1e-7, rtol=1e-4, msg=f"{name} {key}")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [fsdp2, ddp])
def test_gradients_are_those_of_one_process(wrap: Callable[[Any], nn.Module], tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path / "store"), wrap), nprocs=RANKS)
