"""Norms are right to 1e-6 whatever the size, the dtype and the values, on plain and on sharded tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_gradguard.backends import squared_norms
from hf_gradguard.observe.norms import NO_GRADIENT, Measurement
from tests.counters import Counters

SIZES = (1, 100, 512, 513, 16384, 16385, 300_001)


def with_gradient(gradient: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros_like(gradient, layout=torch.strided))
    parameter.grad = gradient
    return parameter


def reference(gradient: Tensor) -> float:
    """In float64 by numpy, which shares no code with the pass under test."""
    values = gradient.to_dense() if gradient.layout != torch.strided else gradient
    exact = values.double().numpy().ravel()
    largest = np.abs(exact).max(initial=0)
    return float(largest * np.sqrt(np.sum(np.square(exact / largest)))) if 0 < largest < np.inf else float(largest)


def values(kind: str, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    normal = torch.randn(size, generator=generator)
    if kind == "normal":
        return normal * 1e-3
    if kind == "heavy_tailed":
        return normal * torch.exp(3 * torch.randn(size, generator=generator))
    if kind == "all_equal":
        return torch.full((size,), 0.1234e-3)
    if kind == "mostly_zero":
        return normal * (torch.rand(size, generator=generator) < 0.02)
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["normal", "heavy_tailed", "all_equal", "mostly_zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_norm_is_within_1e_6_of_float64(kind: str, dtype: torch.dtype) -> None:
    gradients = [values(kind, size).to(dtype) for size in SIZES]
    found = Measurement([with_gradient(gradient) for gradient in gradients]).norms()
    np.testing.assert_allclose(found, [reference(gradient) for gradient in gradients], rtol=1e-6)


@pytest.mark.parametrize("kind", ["normal", "all_equal"])
def test_forty_million_elements_are_measured_to_1e_6(kind: str) -> None:
    gradient = values(kind, 40_000_000)
    found = Measurement([with_gradient(gradient)]).norms()
    np.testing.assert_allclose(found, [reference(gradient)], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-17, 1e20, 1e37])
@pytest.mark.parametrize("size", [100, 5000, 100_000])
def test_norms_whose_squares_leave_float32_are_exact(scale: float, size: int) -> None:
    gradient = values("normal", size) * 1e3 * scale / 10
    found = Measurement([with_gradient(gradient)]).norms()
    np.testing.assert_allclose(found, [reference(gradient)], rtol=1e-6)
    assert np.isfinite(found[0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_element_makes_the_norm_nonfinite_and_no_other(size: int, bad: float) -> None:
    gradients = [values("normal", size) for _ in range(3)]
    gradients[1][size // 2] = bad
    found = Measurement([with_gradient(gradient) for gradient in gradients]).norms()
    assert np.isfinite(found).tolist() == [True, False, True]
    assert np.isnan(found[1]) == np.isnan(bad)


def test_a_zero_gradient_is_zero_and_a_missing_one_is_told_apart() -> None:
    missing = nn.Parameter(torch.zeros(3))
    found = Measurement([with_gradient(torch.zeros(20_000)), missing, with_gradient(torch.ones(4))]).norms()
    assert found.tolist() == [0.0, NO_GRADIENT, 2.0]


def test_no_gradient_at_all_is_no_error() -> None:
    assert Measurement([nn.Parameter(torch.zeros(3))]).norms().tolist() == [NO_GRADIENT]


def test_transposed_and_sparse_gradients_are_measured_by_their_values() -> None:
    transposed = values("normal", 300 * 200).view(300, 200).t()
    indices = torch.tensor([[0, 5, 5]])
    sparse = torch.sparse_coo_tensor(indices, torch.tensor([[1.0, 2.0], [3.0, 0.0], [1.0, 0.0]]), (10, 2))
    found = Measurement([with_gradient(transposed), with_gradient(sparse)]).norms()
    np.testing.assert_allclose(found, [reference(transposed), (1 + 4 + 16) ** 0.5], rtol=1e-6)


def test_one_pass_reads_each_gradient_once_and_waits_for_nothing() -> None:
    parameters = [with_gradient(values("normal", size)) for size in SIZES]
    size = sum(parameter.numel() * 4 for parameter in parameters)
    with Counters(parameters) as counters:
        Measurement(parameters).norms()
    assert counters.counts["gradient_reads"] == size
    assert counters.counts["gradient_writes"] == 0
    assert counters.counts["waits"] == 0


def test_the_counters_see_a_wait_and_a_second_pass() -> None:
    parameters = [with_gradient(values("normal", 1000))]
    with Counters(parameters) as counters:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    assert counters.counts["waits"] == 1
    assert counters.counts["gradient_reads"] == 2 * 4000
    assert counters.counts["gradient_writes"] == 4000


def test_squares_of_nothing_are_nothing() -> None:
    squares, stock_total = squared_norms([])
    assert squares.numel() == 0
    assert stock_total is None
