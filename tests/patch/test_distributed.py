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
from hf_gradguard.patch.model import patch_model, unpatch_model
from tests.patch.gates import make_gate
from tests.patch.models import CASES, gradients, logits
from tests.patch.test_taps import close_gradients
from tests.processes import leave_group

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
        leave_group()


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [fsdp2, ddp])
def test_gradients_are_those_of_one_process(wrap: Callable[[Any], nn.Module], tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path / "store"), wrap), nprocs=RANKS)


PATCHES = [
    ("gpt2", "rezero:init=0.5"),
    ("gpt2", "norm=post;residual=deepnorm;embedding=norm"),
    ("bert", "gtrxl"),
    ("bart", "norm=sandwich;residual=layerscale:init=0.5"),
    ("t5", "norm=none:final=false;embedding=norm"),
    ("gpt_neox-parallel", "sandwich"),
    ("opt-post", "norm=pre;residual=gru_gate;embedding=unit_rms"),
]
"""Norms in every place, with patched embeddings, new norms, norms that are off, and rules."""


def check_patched(name: str, patch: str, wrap: Callable[[Any], nn.Module], checkpointing: bool) -> None:
    model = CASES[name].make().train(checkpointing)
    torch.manual_seed(3)
    patch_model(model, patch)
    inputs = CASES[name].inputs()
    expected = [gradients(model, inputs, seed=step) for step in range(2)]
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wrapped = wrap(model)
    for step, gradients_alone in enumerate(expected):  # twice, as DDP misses an absent gradient in the next pass
        found = gradients(wrapped, inputs, seed=step)
        found = {key.removeprefix("module."): value for key, value in found.items()}
        whole = {key: g.full_tensor() if hasattr(g, "full_tensor") else g for key, g in found.items()}
        close_gradients(whole, gradients_alone, tolerance=1e-6)


def patch_worker(rank: int, store: str, wrap: Callable[[Any], nn.Module]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        for name, patch in PATCHES:
            for checkpointing in (False, True):
                check_patched(name, patch, wrap, checkpointing)
    finally:
        leave_group()


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [fsdp2, ddp])
def test_a_patch_has_the_gradients_of_one_process(wrap: Callable[[Any], nn.Module], tmp_path: Path) -> None:
    mp.spawn(patch_worker, args=(str(tmp_path / "store"), wrap), nprocs=RANKS)


def sharded_worker(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        for model in (fsdp2(CASES["gpt2"].make()), ddp(CASES["gpt2"].make())):
            keys = list(model.state_dict())
            remedy = "patch it before it is " + ("wrapped" if hasattr(model, "module") else "sharded")
            with pytest.raises(ValueError, match=remedy):
                patch_model(model, "rezero")
            assert list(model.state_dict()) == keys
        kept = fsdp2(patch_model(CASES["gpt2"].make(), "init=xavier", keep_original=True))
        with pytest.raises(ValueError, match="sharded, so that its old weights can't be written"):
            unpatch_model(kept)
        model = fsdp2(patch_model(CASES["gpt2"].make(), "gtrxl"))
        inputs, expected = CASES["gpt2"].inputs(), logits(CASES["gpt2"].make(), CASES["gpt2"].inputs())
        assert not torch.allclose(logits(model, inputs), expected, atol=1e-2)
        torch.testing.assert_close(logits(unpatch_model(model), inputs), expected)
    finally:
        leave_group()


@pytest.mark.slow
def test_a_model_on_several_processes_is_not_patched_but_can_be_unpatched(tmp_path: Path) -> None:
    mp.spawn(sharded_worker, args=(str(tmp_path / "store"),), nprocs=RANKS)
