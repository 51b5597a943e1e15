"""Norms of sharded gradients are those of one process that holds everything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from tests.counters import Counters
from tests.processes import leave_group

RANKS = 2


def gradients() -> list[torch.Tensor]:
    """Sizes that split evenly, unevenly and into an empty shard."""
    torch.manual_seed(0)
    return [torch.randn(8, 5), torch.randn(7, 3) * 1e-20, torch.randn(1, 4), torch.randn(300, 300)]


def worker(rank: int, store: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from hf_gradguard.observe.norms import Measurement

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        full = gradients()
        placements = [[Shard(0)], [Shard(0)], [Shard(0)], [Shard(1)]]
        parameters = []
        for gradient, placement in zip([*full, full[0], full[0]], [*placements, [Replicate()], None], strict=True):
            sharded = gradient if placement is None else distribute_tensor(gradient, mesh, placement)
            parameter = nn.Parameter(torch.zeros_like(sharded))
            parameter.grad = sharded
            parameters.append(parameter)
        with Counters([]) as counters:
            found = Measurement(parameters).norms()
        expected = [gradient.double().norm().item() for gradient in [*full, full[0], full[0]]]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected).double(), rtol=1e-6, atol=0)
        # One for each way of being split, and one for the tensor whose float32 squares vanish.
        assert counters.counts["collectives"] == 3, counters.counts
    finally:
        leave_group()


def test_sharded_norms_equal_those_of_one_process(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path / "store"),), nprocs=RANKS)


def fsdp_worker(rank: int, store: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from hf_gradguard.observe.norms import Measurement
    from tests.models import language_data, make

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        batch = {key: torch.stack([row[key] for row in language_data(4)]) for key in ("input_ids", "labels")}
        alone = make("gpt2")
        alone.eval()
        alone(**batch).loss.backward()
        sharded = make("gpt2")
        sharded.eval()
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in sharded.transformer.h:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        sharded(**batch).loss.backward()  # the same batch on every rank, so that the mean over ranks is its gradient
        with Counters([]) as counters:
            found = Measurement(list(sharded.parameters())).norms()
        expected = [parameter.grad.double().norm().item() for parameter in alone.parameters()]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected).double(), rtol=1e-5, atol=0)
        assert counters.counts["collectives"] == 1, counters.counts
    finally:
        leave_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_fsdp2_needs_one_collective_whatever_the_number_of_parameters(tmp_path: Path) -> None:
    mp.spawn(fsdp_worker, args=(str(tmp_path / "store"),), nprocs=RANKS)
