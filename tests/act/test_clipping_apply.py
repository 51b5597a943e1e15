"""A clip multiplies what it must, wherever and however the gradient is stored, and nothing else."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from hf_gradguard.act.clipping import AGC, AdaGC, ClipPolicy, GlobalNorm, Gradient, Layer, Units, policies
from hf_gradguard.observe.norms import Measurement
from tests.act.test_clipping import Replay
from tests.counters import Counters
from tests.models import language_data, make
from tests.processes import leave_group

RANKS = 2


def gradient_of(parameters: list[nn.Parameter], groups: list[int] | None = None) -> Gradient:
    """Of parameters that form one layer each."""
    names = [f"p{index}" for index in range(len(parameters))]
    units = Units(tuple((0,) if parameter.dim() > 1 else () for parameter in parameters), frozenset())
    norms = Measurement(parameters).norms()
    layers = torch.tensor(groups or range(len(parameters))).numpy()
    return Gradient(parameters, names, layers, norms, units)


def parameters_with_gradients(*dtypes: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    parameters = []
    for index, dtype in enumerate(dtypes):
        parameter = nn.Parameter(torch.randn(8, 5).to(dtype))
        parameter.grad = torch.randn(8, 5).to(dtype) * 10 ** (1 - index)
        parameters.append(parameter)
    return parameters


def settled(text: str) -> ClipPolicy:
    """A rule that has seen enough to know that norms around 1 are usual."""
    rule = policies.parse(text)
    parameters = parameters_with_gradients(*[torch.float32] * 3)
    for parameter in parameters:
        parameter.grad.fill_(0.05)
    for _ in range(4):
        rule.clip(gradient_of(parameters))
    return rule


LOW = ["global:max_norm=0.1", "layer:max_norm=0.1", "autoclip", "zclip:warmup_steps=3", "adagc:warmup_steps=3"]
HIGH = ["none", "global:max_norm=1e3", "layer:max_norm=1e3", "autoclip:percentile=100", "agc:clipping=1e3"]
HIGH += ["zclip:max_norm=none,warmup_steps=9", "adagc:warmup_steps=1,lambda_rel=1e4"]


@pytest.mark.parametrize("text", HIGH)
def test_nothing_is_multiplied_where_nothing_is_clipped(text: str) -> None:
    rule = settled(text)
    gradient = gradient_of(parameters_with_gradients(*[torch.float32] * 3))
    with Counters(gradient.parameters) as counters:
        assert rule.clip(gradient) is None
    assert counters.counts["gradient_writes"] == 0
    assert counters.counts["waits"] == 0
    if not text.startswith("agc"):
        assert counters.counts["gradient_reads"] == 0


@pytest.mark.parametrize("text", LOW)
def test_one_multiply_clips_without_reading_or_waiting(text: str) -> None:
    rule = settled(text)
    gradient = gradient_of(parameters_with_gradients(*[torch.float32] * 3))
    with Counters(gradient.parameters) as counters:
        clip = rule.clip(gradient)
        assert clip is not None
        assert sum(counters.counts.values()) == 0
        clip.apply(gradient)
    clipped = sum(factor < 1 for factor in clip.factors)
    assert clipped > 0
    assert counters.counts["gradient_writes"] == clipped * 8 * 5 * 4
    assert counters.counts["gradient_reads"] == clipped * 8 * 5 * 4
    assert counters.counts["waits"] == 0
    outcome = clip.outcome()
    assert outcome is not None
    assert outcome.coefficient == min(clip.factors)


def test_only_the_layers_that_are_too_large_are_multiplied() -> None:
    parameters = parameters_with_gradients(*[torch.float32] * 4)
    before = [parameter.grad.clone() for parameter in parameters]
    gradient = gradient_of(parameters, groups=[0, 1, 2, 0])
    clip = Layer(max_norm=20.0).clip(gradient)
    assert clip is not None
    with Counters(parameters) as counters:
        clip.apply(gradient)
    assert counters.counts["gradient_writes"] == 2 * 8 * 5 * 4
    equal = [torch.equal(parameter.grad, kept) for parameter, kept in zip(parameters, before, strict=True)]
    assert equal == [False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_product_is_rounded_once(dtype: torch.dtype) -> None:
    parameters = parameters_with_gradients(dtype, torch.float32, torch.bfloat16)
    before = [parameter.grad.clone().double() for parameter in parameters]
    gradient = gradient_of(parameters)
    clip = GlobalNorm(1.0).clip(gradient)
    assert clip is not None
    clip.apply(gradient)
    coefficient = 1.0 / (sum(float(exact.square().sum()) for exact in before) ** 0.5 + 1e-6)
    for parameter, exact in zip(parameters, before, strict=True):
        half = torch.finfo(parameter.grad.dtype).eps / 2
        # The norm is right to 1e-6; beyond that, half a unit in the last place, and one for the factor in float32.
        torch.testing.assert_close(parameter.grad.double(), exact * coefficient, rtol=half + 1e-6, atol=1e-7)


@pytest.mark.parametrize("is_coalesced", [True, False])
@pytest.mark.parametrize("text", ["global:max_norm=0.1", "layer:max_norm=0.1"])
def test_values_of_a_sparse_gradient_are_scaled(text: str, is_coalesced: bool) -> None:
    embedding, other = nn.Parameter(torch.randn(10, 2)), nn.Parameter(torch.randn(4))
    sparse = torch.sparse_coo_tensor([[7, 2, 7]], torch.tensor([[1.0, 2.0], [3.0, 0.0], [1.0, 0.0]]), (10, 2))
    dense = sparse.to_dense()
    embedding.grad, other.grad = (sparse.coalesce() if is_coalesced else sparse), torch.ones(4)
    gradient = gradient_of([embedding, other])
    clip = policies.parse(text).clip(gradient)
    assert clip is not None
    clip.apply(gradient)
    assert embedding.grad.layout == torch.sparse_coo
    size = (4 + 4 + 9 + (4 if text.startswith("global") else 0)) ** 0.5
    torch.testing.assert_close(embedding.grad.to_dense(), dense * 0.1 / (size + 1e-6))


def test_the_gradient_itself_is_multiplied_and_not_replaced() -> None:
    # DDP keeps gradients as views of its buckets.
    parameters = parameters_with_gradients(*[torch.float32] * 3)
    bucket = torch.cat([parameter.grad.flatten() for parameter in parameters])
    before = bucket.clone()
    for index, parameter in enumerate(parameters):
        parameter.grad = bucket[40 * index : 40 * (index + 1)].view(8, 5)
    gradient = gradient_of(parameters)
    for rule in (GlobalNorm(0.1), AGC(1e-4)):
        clip = rule.clip(gradient)
        assert clip is not None
        clip.apply(gradient)
    assert (bucket.abs() < before.abs()).all()


def adagc() -> AdaGC:
    rule = AdaGC()
    rule.load_state_dict({"updates": 100, "averages": {"p0": 0.5, "p1": 100.0, "p2": 0.5}})
    return rule


def worker(rank: int, store: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        placements = [[Shard(0)], [Shard(0)], [Replicate()]]
        for make_rule in (lambda: GlobalNorm(0.1), lambda: Layer(1.0), adagc):
            torch.manual_seed(0)
            alone, sharded = [], []
            for size, placement in zip((6, 1, 5), placements, strict=True):
                full = torch.randn(size, 4)
                alone.append(nn.Parameter(torch.zeros(size, 4)))
                alone[-1].grad = full.clone()
                sharded.append(nn.Parameter(distribute_tensor(torch.zeros(size, 4), mesh, placement)))
                sharded[-1].grad = distribute_tensor(full.clone(), mesh, placement)
            assert make_rule().refuse(sharded) is None
            for parameters in (alone, sharded):
                gradient = gradient_of(parameters)
                clip = make_rule().clip(gradient)
                assert clip is not None
                with Counters([]) as counters:
                    clip.apply(gradient)
                assert counters.counts["collectives"] == 0
            for parameter, shard in zip(alone, sharded, strict=True):
                torch.testing.assert_close(shard.grad.full_tensor(), parameter.grad)
        reason = AGC().refuse([*sharded, alone[0]])
        assert reason is not None
        assert "3 of 4 parameters are sharded" in reason
    finally:
        leave_group()


def test_sharded_gradients_are_clipped_as_one_process_would(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path / "store"),), nprocs=RANKS)


@pytest.mark.parametrize("rule", [AGC(), GlobalNorm()])
def test_plain_parameters_are_refused_by_no_rule(rule: ClipPolicy) -> None:
    assert rule.refuse(parameters_with_gradients(torch.float32)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("text", ["agc:clipping=0.02", "agc:clipping=1e6", "global:max_norm=0.1", "layer:max_norm=0.1"])
def test_a_gpu_is_not_waited_for_and_clips_as_the_cpu_does(text: str) -> None:
    batch = {key: torch.stack([row[key] for row in language_data(4)]) for key in ("input_ids", "labels")}
    model = make("gpt2").eval()
    model(**batch).loss.backward()
    on_gpu = make("gpt2").eval().cuda()
    for ours, theirs in zip(on_gpu.parameters(), model.parameters(), strict=True):
        ours.grad = theirs.grad.cuda()
    outcomes = []
    for replay in (Replay(model, []), Replay(on_gpu, [])):
        gradient = replay.gradient()
        rule = policies.parse(text)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                clip = rule.clip(gradient)
                if clip is not None:
                    clip.apply(gradient)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not [warning for warning in caught if "synchronizing" in str(warning.message)]
        outcomes.append(None if clip is None else clip.outcome())
    for ours, theirs in zip(on_gpu.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=1e-5, atol=1e-8)
    on_host, on_device = outcomes
    assert (on_host is None) == (on_device is None) == (text == "agc:clipping=1e6")
    if on_host is not None and on_device is not None:
        assert on_device.parameter == on_host.parameter
        assert on_device.coefficient == pytest.approx(on_host.coefficient, rel=1e-5)
