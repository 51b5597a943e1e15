"""On several processes what is held gives the same update as one process that holds everything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from hf_gradguard.act.accumulation import Accumulator, Fixed
from hf_gradguard.observe.norms import Measurement
from tests.counters import Counters
from tests.models import language_data, make
from tests.processes import leave_group

RANKS = 2
# Examples of each process in each window: two updates of three windows.
WINDOWS = [2, 5, 1, 3, 3, 4]
TOKENS = 15

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def batches() -> list[list[dict[str, Tensor]]]:
    """For each window, the batch of each process."""
    data = iter(language_data(RANKS * sum(WINDOWS)))
    return [
        [
            {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}
            for rows in ([next(data) for _ in range(size)] for _ in range(RANKS))
        ]
        for size in WINDOWS
    ]


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def accumulator_of(model: nn.Module) -> Accumulator:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return Accumulator(Fixed(3), parameters, names)


def train(model: nn.Module, accumulator: Accumulator, windows: list[dict[str, Tensor]], processes: int) -> list[float]:
    """Trains with plain SGD, and returns the norms of the updates."""
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    norms = []
    for step, window in enumerate(windows):
        model(**window).loss.backward()
        places = [parameter.grad for parameter in parameters]
        tokens = TOKENS * len(window["labels"]) * processes
        taken = accumulator.take(Measurement(parameters).norms(), tokens, step=step)
        if taken.update:
            assert all(parameter.grad is place for parameter, place in zip(parameters, places, strict=True))
            norms.append(taken.norm)
            optimizer.step()
        optimizer.zero_grad()
    return norms


def alone() -> tuple[nn.Module, list[float]]:
    model = make("gpt2").eval()
    norms = train(model, accumulator_of(model), [joined(parts) for parts in batches()], processes=1)
    return model, norms


def worker(rank: int, store: str, work: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        work(rank)
        dist.barrier()  # none hangs up while the other still listens
    finally:
        leave_group()


def ddp_trains_like_one_process(rank: int) -> None:
    model = make("gpt2").eval()
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    norms = train(wrapped, accumulator_of(model), [parts[rank] for parts in batches()], processes=RANKS)
    assert len(norms) == 2
    wrapped(**batches()[0][rank]).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    storages = {gradient.untyped_storage().data_ptr() for gradient in gradients}
    assert len(storages) < len(gradients), "these gradients are no views of buckets, so the test shows nothing"
    expected, expected_norms = alone()
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-6)
        copies = [torch.empty_like(parameter) for _ in range(RANKS)]
        dist.all_gather(copies, parameter.detach())
        assert torch.equal(*copies)


def test_ddp_with_bucket_views_trains_like_one_process_on_the_joint_batch(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path / "store"), ddp_trains_like_one_process), nprocs=RANKS)


def shard(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.transformer.h:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp_trains_like_one_process(rank: int) -> None:
    model = shard(make("gpt2").eval())
    norms = train(model, accumulator_of(model), [parts[rank] for parts in batches()], processes=RANKS)
    expected, expected_norms = alone()
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.full_tensor(), other, rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]
    resumes_to_the_same_bits(model, rank)


def resumes_to_the_same_bits(model: nn.Module, rank: int) -> None:
    parameters = list(model.parameters())
    accumulator, resumed = accumulator_of(model), accumulator_of(model)
    found = []
    for step, parts in enumerate(batches()[:3]):
        model(**parts[rank]).loss.backward()
        norms = Measurement(parameters).norms()
        given = [parameter.grad for parameter in parameters]
        for one in (accumulator, resumed) if step == 2 else (accumulator,):
            for parameter, gradient in zip(parameters, given, strict=True):
                parameter.grad = gradient.clone()
            with Counters([]) as counters:
                taken = one.take(norms, 1.0, step=step)
            assert counters.counts["collectives"] == (0 if step == 0 else 1)  # for the norms of what is held
            if taken.update:
                found.append([parameter.grad.to_local().clone() for parameter in parameters])
        if step == 1:
            saved = {name: tensor.clone() for name, tensor in accumulator.tensors().items()}
            assert all(type(tensor) is Tensor for tensor in saved.values())
            resumed.load_state_dict(accumulator.state_dict())
            resumed.load_tensors(saved)
        model.zero_grad()
    assert len(found) == 2
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


def test_fsdp2_trains_like_one_process_on_the_joint_batch_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path / "store"), fsdp_trains_like_one_process), nprocs=RANKS)
