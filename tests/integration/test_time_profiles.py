"""A guard that measures time profiles while it trains: the training is the same to the bit, and the record has them."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer
from transformers.modeling_outputs import CausalLMOutput

from hf_gradguard import GradGuard, GradGuardCallback, RecurrentConfig, RecurrentForCausalLM, RunRecord
from hf_gradguard.observe.time_profile import time_profile
from tests.integration.test_loop import Loop, batches
from tests.models import VOCABULARY, language_data, make
from tests.processes import leave_group
from tests.record.samples import assert_same_profile
from tests.training import assert_bit_equal, trainer, weights


class Recurrent(nn.Module):
    """Two levels with dropout, and noise of its own at the end; `fails` outside training where that is wanted."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.mixer = nn.LSTM(8, 8, 2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(8, VOCABULARY)
        self.calls = nn.Buffer(torch.zeros(()))
        self.fails = fails

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        self.calls += 1
        if self.fails and not self.training:
            raise RuntimeError("out of memory")
        hidden, _ = self.mixer(self.embedding(input_ids))
        logits = self.head(hidden + 0.01 * torch.rand_like(hidden))
        if labels is None:
            return CausalLMOutput(logits=logits)
        return CausalLMOutput(
            loss=F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits=logits
        )


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "lstm":
        return RecurrentForCausalLM(
            RecurrentConfig(
                vocab_size=VOCABULARY, hidden_size=8, layer_dropout=0.2, recurrent_dropout=0.2, embedding_dropout=0.2
            )
        )
    return Recurrent() if name == "recurrent" else make(name)


class Witness(Trainer):
    """Measures by itself, from the weights and inputs of each window's first micro-batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.profiles: dict[int, Any] = {}

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        step = self.state.global_step + 1
        if step not in self.profiles:
            self.profiles[step] = time_profile(model, inputs)
        return super().training_step(model, inputs, *args, **kwargs)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "lstm", "recurrent"])
def test_weights_are_bit_equal_and_the_profiles_those_of_the_windows(name: str, setting: str, tmp_path: Path) -> None:
    options = SETTINGS[setting]
    unwatched = trainer(model_of(name), tmp_path / "unwatched", **options)
    unwatched.train()
    callback = GradGuardCallback(time_profile_every=2)
    watched = trainer(model_of(name), tmp_path / "watched", callback, kind=Witness, **options)
    watched.train()
    assert_bit_equal(weights(unwatched.model), weights(watched.model))
    profiles = RunRecord.load(tmp_path / "watched").time_profiles
    assert list(profiles) == [1, 3, 5, 6]  # the last window, too
    for step, profile in profiles.items():
        if name != "recurrent":  # whose noise is another each time
            assert_same_profile(profile, watched.profiles[step])
        assert set(profile.samples) == {(2 if setting == "accumulation" else 4) * 5}  # five positions have all lags
    assert callback.guard is not None
    assert callback.guard.time_profile is not None
    assert_same_profile(profiles[6], callback.guard.time_profile)


def test_without_the_option_nothing_is_measured(tmp_path: Path) -> None:
    callback = GradGuardCallback()
    run = trainer(make("gpt2"), tmp_path, callback)
    run.train()
    assert callback.guard is not None
    assert callback.guard.time_profile is None
    assert RunRecord.load(tmp_path).time_profiles == {}


def notices(guard: GradGuard | None) -> list[str]:
    assert guard is not None
    return [event.message for event in guard.events if event.kind == "notice"]


def test_a_model_without_a_profile_is_told_so_once_and_trains(tmp_path: Path) -> None:
    unwatched = trainer(make("bert"), tmp_path / "unwatched")
    unwatched.train()
    callback = GradGuardCallback(time_profile_every=1)
    watched = trainer(make("bert"), tmp_path / "watched", callback)
    watched.train()
    assert_bit_equal(weights(unwatched.model), weights(watched.model))
    (notice,) = notices(callback.guard)
    assert notice.startswith("no time profile was measured: BertForMaskedLM reads in both directions")


def test_a_batch_without_a_profile_does_not_keep_the_next_from_one(tmp_path: Path) -> None:
    loop = Loop(tmp_path, time_profile_every=1)
    assert loop.guard is not None
    for step, batch in enumerate(batches(language_data(24)), start=1):
        if step < 3:
            loop.guard.begin_micro_batch(lambda: None, {**batch, "labels": torch.full_like(batch["labels"], -100)})
        loop.run([batch])
    loop.guard.close()
    assert list(RunRecord.load(tmp_path).time_profiles) == [3, 4, 5, 6]
    assert len(notices(loop.guard)) == 1


def test_a_measurement_that_fails_ends_measuring_and_not_training(tmp_path: Path) -> None:
    unwatched = trainer(model_of("recurrent"), tmp_path / "unwatched")
    unwatched.train()
    torch.manual_seed(0)
    callback = GradGuardCallback(time_profile_every=2)
    watched = trainer(Recurrent(fails=True), tmp_path / "watched", callback)
    watched.train()
    assert_bit_equal(weights(unwatched.model), weights(watched.model))
    assert notices(callback.guard) == ["no time profile was measured: RuntimeError: out of memory"]
    assert RunRecord.load(tmp_path / "watched").time_profiles == {}


def test_in_ones_own_loop_it_is_the_same(tmp_path: Path) -> None:
    data = batches(language_data(32))
    loops = [
        Loop(tmp_path / str(guarded), steps=2, guarded=guarded, **({"time_profile_every": 3} if guarded else {}))
        for guarded in (True, False)
    ]
    for loop in loops:
        loop.run(data)
    assert_bit_equal(weights(loops[0].model), weights(loops[1].model))
    assert loops[0].guard is not None
    loops[0].guard.close()
    profiles = RunRecord.load(tmp_path / "True").time_profiles
    assert list(profiles) == [1, 4]
    assert_same_profile(profiles[1], time_profile(Loop(tmp_path / "fresh", guarded=False).model, data[0]))


def test_where_weights_are_shared_out_there_is_none(tmp_path: Path) -> None:
    model = make("gpt2")
    optimizer = torch.optim.SGD(model.parameters())
    accelerator = SimpleNamespace(distributed_type="DEEPSPEED", num_processes=1, is_main_process=True)
    guard = GradGuard(model, optimizer, {"time_profile_every": 1}, accelerator=accelerator, output_dir=tmp_path)
    data = batches(language_data(8))
    for batch in data:
        guard.begin_micro_batch(lambda: None, batch)
        guard.begin_micro_batch(lambda: None, batch)
    guard.close()
    assert guard.time_profile is None
    assert notices(guard) == [
        "no time profile was measured: the weights are shared out over the processes, where it would take all of them "
        "to run the model"
    ]


RANKS = 2


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for every in (0, 2):
        place = Path(folder) / str(every)
        run = trainer(make("gpt2"), place, GradGuardCallback(time_profile_every=every), ddp_backend="gloo")
        run.train()
        torch.save(weights(run.model), place / f"{rank}.pt")
    leave_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_on_two_processes_the_first_measures_and_the_weights_stay_equal(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=RANKS)
    states: list[Mapping[str, Tensor]] = [
        torch.load(tmp_path / every / f"{rank}.pt", weights_only=True) for every in ("0", "2") for rank in range(RANKS)
    ]
    for state in states[1:]:
        assert_bit_equal(dict(states[0]), dict(state))
    profiles = RunRecord.load(tmp_path / "2").time_profiles
    assert list(profiles) == [1, 3, 5, 6]
    assert all(np.isfinite(profile.mean).all() for profile in profiles.values())
