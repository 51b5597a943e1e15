"""What is held is the weighted sum of the gradients, whatever their dtype and layout, in one copy of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_gradguard.act.accumulation import HeldGradients
from hf_gradguard.observe.norms import NO_GRADIENT
from tests.processes import leave_group

SHAPES = [(3,), (20, 30), (1,), (7, 2, 5)]
WEIGHTS = [1.0, 0.3, 2.5]
RANKS = 2


def parameters(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]


def hold(chosen: list[nn.Parameter]) -> HeldGradients:
    return HeldGradients(chosen, [f"p{index}" for index in range(len(chosen))])


def windows(shapes: Any = SHAPES, count: int = len(WEIGHTS), seed: int = 0) -> list[list[Tensor | None]]:
    """Random gradients in float32, of which some windows have none for some parameters, and the last none anywhere."""
    generator = torch.Generator().manual_seed(seed)
    found: list[list[Tensor | None]] = [
        [torch.randn(shape, generator=generator) for shape in shapes] for _ in range(count)
    ]
    found[0][0] = found[1][1] = None
    for window in found:
        window[2] = None
    return found


def give(chosen: list[nn.Parameter], gradients: list[Tensor | None]) -> None:
    for parameter, gradient in zip(chosen, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.to(parameter.dtype, copy=True)


def weighted_sums(given: list[list[Tensor | None]], dtype: torch.dtype, scale: float) -> list[Tensor | None]:
    """In float64, of the gradients as they are in their own dtype."""
    sums = []
    for gradients in zip(*given, strict=True):
        parts = [
            weight * gradient.to(dtype).double().to_dense()
            for weight, gradient in zip(WEIGHTS, gradients, strict=True)
            if gradient is not None
        ]
        sums.append(scale * torch.stack(parts).sum(0) if parts else None)
    return sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_weighted_sums_of_gradients_that_come_and_go_are_right(dtype: torch.dtype) -> None:
    chosen, given = parameters(dtype), windows()
    held = hold(chosen)
    for gradients, weight in zip(given, WEIGHTS, strict=True):
        give(chosen, gradients)
        held.add(weight)
    expected = weighted_sums(given, dtype, 1.0)
    norms = [NO_GRADIENT if value is None else value.norm().item() for value in expected]
    np.testing.assert_allclose(held.norms(), norms, rtol=1e-6)
    held.release(0.25)
    rounding = torch.finfo(dtype).eps
    for parameter, value in zip(chosen, expected, strict=True):
        assert (parameter.grad is None) == (value is None)
        if value is not None:
            assert parameter.grad is not None
            assert parameter.grad.dtype == dtype
            torch.testing.assert_close(parameter.grad.double(), value / 4, rtol=rounding, atol=rounding)
    assert held.norms().tolist() == [NO_GRADIENT] * len(chosen)


def test_small_windows_are_not_lost_in_a_large_sum_of_16_bits() -> None:
    chosen = parameters(torch.bfloat16, [(4,)])
    held = hold(chosen)
    for _ in range(1024):
        give(chosen, [torch.ones(4)])
        held.add(1.0)
    held.release(1.0)
    assert chosen[0].grad is not None
    assert chosen[0].grad.tolist() == [1024.0] * 4  # added in bfloat16 they would stop at 256


def sparse(rows: list[int], seed: int) -> Tensor:
    values = torch.randn(len(rows), 2, generator=torch.Generator().manual_seed(seed))
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (6, 2), check_invariants=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_gradients_are_added_up_and_stay_sparse(dtype: torch.dtype) -> None:
    chosen = parameters(dtype, [(6, 2)])
    given: list[list[Tensor | None]] = [[sparse([0, 5, 5], 0)], [sparse([1], 1)], [sparse([5, 0], 2)]]
    held = hold(chosen)
    for gradients, weight in zip(given, WEIGHTS, strict=True):
        give(chosen, gradients)
        held.add(weight)
    (expected,) = weighted_sums(given, dtype, 0.5)
    assert expected is not None
    np.testing.assert_allclose(held.norms(), [2 * expected.norm().item()], rtol=1e-6)
    held.release(0.5)
    gradient = chosen[0].grad
    assert gradient is not None
    assert gradient.is_sparse
    assert gradient.dtype == dtype
    rounding = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.to_dense().double(), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("kinds", ["sparse dense sparse", "dense sparse sparse", "sparse sparse dense"])
def test_a_gradient_that_is_sparse_in_some_windows_only_is_right(kinds: str) -> None:
    chosen = parameters(shapes=[(6, 2)])
    held = hold(chosen)
    for _ in range(2):  # the second time the buffer of the first is there
        given: list[list[Tensor | None]] = [[sparse([0, 5], seed)] for seed in range(3)]
        given = [
            [one.to_dense()] if kind == "dense" else [one] for [one], kind in zip(given, kinds.split(), strict=True)
        ]
        for gradients, weight in zip(given, WEIGHTS, strict=True):
            give(chosen, gradients)
            held.add(weight)
        held.release(1.0)
        (expected,) = weighted_sums(given, torch.float32, 1.0)
        assert chosen[0].grad is not None
        torch.testing.assert_close(chosen[0].grad.to_dense().double(), expected, rtol=1e-6, atol=1e-6)


def test_a_transposed_gradient_is_right() -> None:
    torch.manual_seed(0)
    chosen = parameters(shapes=[(30, 20)])
    held = hold(chosen)
    given: list[list[Tensor | None]] = [[torch.randn(20, 30).t()], [torch.randn(30, 20)], [torch.randn(20, 30).t()]]
    for gradients, weight in zip(given, WEIGHTS, strict=True):
        give(chosen, gradients)
        held.add(weight)
    held.release(1.0)
    (expected,) = weighted_sums(given, torch.float32, 1.0)
    assert chosen[0].grad is not None
    torch.testing.assert_close(chosen[0].grad.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_gradient_is_copied_from_and_written_into_never_kept() -> None:
    chosen = parameters(shapes=[(5,)])
    held = hold(chosen)
    first, second = torch.ones(5), torch.ones(5)
    chosen[0].grad = first
    held.add(1.0)
    first.fill_(100.0)
    chosen[0].grad = second
    held.add(1.0)
    held.release(1.0)
    assert chosen[0].grad is second
    assert second.tolist() == [2.0] * 5
    held.add(1.0)
    assert second.tolist() == [2.0] * 5


def test_release_replaces_what_is_bad_and_removes_what_is_not_held() -> None:
    chosen = parameters(shapes=[(5,), (2,)])
    held = hold(chosen)
    give(chosen, [torch.ones(5), None])
    held.add(1.0)
    give(chosen, [torch.full((5,), torch.nan), torch.full((2,), torch.inf)])
    held.release(0.5)
    assert chosen[0].grad is not None
    assert chosen[0].grad.tolist() == [0.5] * 5
    assert chosen[1].grad is None


def test_the_memory_of_one_copy_is_used_for_every_update() -> None:
    chosen = parameters()
    held = hold(chosen)
    places = set()
    for seed in range(4):
        for gradients in windows(seed=seed):
            give(chosen, gradients)
            held.add(1.0)
        places.add(tuple((name, tensor.data_ptr()) for name, tensor in held.tensors().items()))
        if seed % 2:
            held.clear()
        else:
            held.release(1.0)
    assert len(places) == 1


class Operators(TorchDispatchMode):
    """Counts the operators that touch what a tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "detach" not in str(function) and "empty" not in str(function):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_operators_does_not_grow_with_the_number_of_parameters(dtype: torch.dtype) -> None:
    counts = []
    for size in (3, 100):
        chosen = parameters(dtype, [(4,)] * size)
        held = hold(chosen)
        give(chosen, [torch.ones(4)] * size)
        with Operators() as operators:
            held.add(1.0)
            held.add(0.5)
            held.release(0.5)
        counts.append(operators.names)
    assert counts[0] == counts[1]
    assert len(counts[0]) == 4  # copy; add; scale and copy


def test_what_is_saved_and_loaded_goes_on_to_the_same_bits() -> None:
    chosen = [*parameters(torch.bfloat16), *parameters(shapes=[(6, 2)])]
    held, restored = hold(chosen), hold(chosen)
    released = []
    for seed in (0, 1):
        give(chosen, [*windows(seed=seed)[1], sparse([0, 5], seed)])
        held.add(0.7)
        if seed == 0:
            restored.load({name: tensor.clone() for name, tensor in held.tensors().items()})
        else:
            restored.add(0.7)
    for one in (held, restored):
        one.release(0.3)
        released.append([None if p.grad is None else p.grad.to_dense() for p in chosen])
        give(chosen, [None] * len(chosen))
    for left, right in zip(*released, strict=True):
        assert (left is None and right is None) or torch.equal(left, right)


def test_nothing_held_is_nothing_to_save() -> None:
    chosen = parameters()
    held = hold(chosen)
    give(chosen, windows()[0])
    held.add(1.0)
    held.clear()
    assert held.tensors() == {}
    held.load({})
    held.release(1.0)
    assert all(parameter.grad is None for parameter in chosen)


def test_a_saved_gradient_that_fits_no_parameter_is_refused_by_name() -> None:
    held = hold(parameters())
    with pytest.raises(ValueError, match=r"'p9', which is no trainable parameter here; resume with"):
        held.load({"p9": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"'p0' has shape \(4,\) in the checkpoint and \(3,\) here; resume with"):
        held.load({"p0": torch.zeros(4)})


def mixed_worker(rank: int, store: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        torch.manual_seed(0)  # the same on every rank
        full = [[torch.randn(7, 3), torch.randn(1, 4), torch.randn(5, 2), torch.randn(6)] for _ in range(2)]
        placements: list[Any] = [[Shard(0)], [Shard(0)], [Replicate()], None]
        parameters = []
        for value, placement in zip(full[0], placements, strict=True):
            empty = torch.zeros_like(value)
            parameters.append(nn.Parameter(empty if placement is None else distribute_tensor(empty, mesh, placement)))
        held = HeldGradients(parameters, ["uneven", "empty on one rank", "partial", "plain"])
        for values, weight in zip(full, (1.0, 3.0), strict=True):
            for parameter, value, placement in zip(parameters, values, placements, strict=True):
                parameter.grad = value.clone() if placement is None else distribute_tensor(value, mesh, placement)
            # A gradient that is still to be added up over the ranks, of a parameter that each of them has whole.
            parameters[2].grad = DTensor.from_local(values[2] * (0.25 if rank else 0.75), mesh, [Partial()])
            held.add(weight)
        expected = [(one + 3 * other).double() for one, other in zip(*full, strict=True)]
        norms = torch.tensor(held.norms())
        torch.testing.assert_close(norms, torch.stack([value.norm() for value in expected]), rtol=1e-6, atol=0)
        held.release(0.25)
        for parameter, value in zip(parameters, expected, strict=True):
            assert parameter.grad is not None
            found = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            torch.testing.assert_close(found.double(), value / 4, rtol=1e-6, atol=1e-6)
    finally:
        leave_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_sharded_partial_and_plain_gradients_are_held_side_by_side(tmp_path: Path) -> None:
    mp.spawn(mixed_worker, args=(str(tmp_path / "store"),), nprocs=RANKS)
