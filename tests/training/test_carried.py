"""Truncated backpropagation through time: streams that go on, and a state that is carried, saved and resumed."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoTokenizer

from hf_gradguard import RecurrentConfig, RecurrentForCausalLM
from hf_gradguard.training.blocks import IGNORED, Blocks, Layout
from hf_gradguard.training.carried import CarriedBlocks, Carrier
from recipes import train_clm


def blocks(count: int) -> Blocks:
    ids = np.arange(count, dtype=np.int32)
    cut = [0, count // 3, count // 2, count]
    rows = [{"input_ids": ids[a:b].tolist(), "words": b - a} for a, b in itertools.pairwise(cut)]
    features = Features({"input_ids": List(Value("int32")), "words": Value("int64")})
    return Blocks(Dataset.from_list(rows, features=features), Layout(4, overlap=1))


def dealt(rows: CarriedBlocks, batch: int, processes: int) -> list[list[list[dict[str, torch.Tensor]]]]:
    """The batches of each process, as a sampler in order and Accelerate's sharding deal them out."""
    batches = [[rows[i] for i in range(start, start + batch)] for start in range(0, len(rows), batch)]
    return [batches[process::processes] for process in range(processes)]


@pytest.mark.parametrize("keep_rest", [False, True])
@pytest.mark.parametrize(("count", "steps", "batch", "processes"), [(100, 5, 3, 1), (97, 4, 2, 2), (50, 7, 1, 3)])
def test_each_row_goes_on_where_it_ended_and_each_token_is_a_target_once(
    count: int, steps: int, batch: int, processes: int, keep_rest: bool
) -> None:
    rows = CarriedBlocks(blocks(count), steps, batch, processes, keep_rest=keep_rest)
    targets: list[int] = []
    for of_process in dealt(rows, batch, processes):
        assert len(of_process) == len(rows) // batch // processes
        for row in range(batch):
            stream = [(i, t) for items in of_process for i, t in _pairs(items[row])]
            assert [t for _, t in stream] == [i + 1 for i, _ in stream]
            assert [i for i, _ in stream] == list(range(stream[0][0], stream[0][0] + len(stream))) if stream else True
            targets += [t for _, t in stream]
    assert len(set(targets)) == len(targets)
    if keep_rest:
        assert sorted(targets) == list(range(1, count))
    else:
        assert len(targets) == (count - 1) // (batch * processes * steps) * batch * processes * steps


def _pairs(row: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    assert torch.equal(row["labels"], row["shift_labels"])
    return [(int(i), int(t)) for i, t in zip(row["input_ids"], row["labels"], strict=True) if t != IGNORED]


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match=r"9 tokens are too few for one batch of 4 rows × 5 tokens"):
        CarriedBlocks(blocks(9), 5, 4)


def test_a_state_that_is_not_finite_begins_again_at_zero() -> None:
    model = RecurrentForCausalLM(RecurrentConfig(vocab_size=9, hidden_size=4, num_layers=1))
    state = model(torch.zeros(2, 3, dtype=torch.int64), use_cache=True).past_key_values
    state.states[0][0].data[0] = torch.nan
    carrier = Carrier()
    carrier.keep("train", state)
    kept = carrier.of("train")
    assert kept is not None
    assert torch.equal(kept.states[0][0][0], torch.zeros(4))
    assert torch.equal(kept.states[0][0][1], state.states[0][0][1].detach())


OPTIONS = (
    "--model_type gradguard_recurrent --cell lstm --config_overrides hidden_size=16,num_layers=2 "
    "--tokenizer_name bytes --carry_state --block_size 8 --per_device_train_batch_size 4 "
    "--per_device_eval_batch_size 1 --optim sgd "
    "--learning_rate 2 --max_grad_norm 0.25 --epoch_decay 0.5 --epoch_decay_after 2 --num_train_epochs 4 --seed 3 "
    "--weight_decay 0 --load_best_model_at_end false"
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(topics.values())[:3000], encoding="utf-8")
    return path


def run(folder: Path, text: Path, *more: str) -> dict[str, float]:
    return train_clm.main(["--output_dir", str(folder), "--train_file", str(text), *OPTIONS.split(), *more])


def test_it_trains_as_a_plain_loop_does(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, make_model = [], train_clm.make_model

    def keep(*args: object, **kwargs: object) -> object:
        model = make_model(*args, **kwargs)  # type: ignore[arg-type]
        made.append(copy.deepcopy(model))
        return model

    monkeypatch.setattr(train_clm, "make_model", keep)
    found = run(tmp_path / "out", text, "--validation_file", str(text))
    (model,) = made
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    end = tokenizer.eos_token_id
    ids = [end]
    for line in text.read_text(encoding="utf-8").splitlines():
        if line.strip():
            ids += [*tokenizer(line, add_special_tokens=False)["input_ids"], end]
    tokens = torch.tensor(ids)
    batches = (len(tokens) - 1) // (4 * 8)
    length = batches * 8
    inputs = torch.stack([tokens[row * length : (row + 1) * length] for row in range(4)])
    targets = torch.stack([tokens[row * length + 1 : (row + 1) * length + 1] for row in range(4)])
    for epoch in range(4):
        state = None
        for batch in range(batches):
            part = slice(batch * 8, (batch + 1) * 8)
            outputs = model(inputs[:, part], past_key_values=state, use_cache=True)
            loss = F.cross_entropy(outputs.logits.flatten(0, 1), targets[:, part].flatten())
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            rate = 2 * 0.5 ** max(0, epoch + 1 - 2)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= rate * parameter.grad
            state = outputs.past_key_values.detach()
    trained = load_file(tmp_path / "out" / "model.safetensors")
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(trained[name], parameter, rtol=1e-4, atol=1e-5)

    # What is found in validation, of one row, is what one pass over the whole text gives.
    with torch.no_grad():
        logits = RecurrentForCausalLM.from_pretrained(str(tmp_path / "out"))(tokens[None, :-1]).logits[0]
    expected = F.cross_entropy(logits.double(), tokens[1:]).exp().item()
    assert found["eval_perplexity"] == pytest.approx(expected, rel=1e-5)


def test_an_interrupted_run_goes_on_with_the_state_that_it_had(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = ("--save_strategy", "steps", "--save_steps", "5", "--eval_strategy", "no", "--save_total_limit", "100")
    run(tmp_path / "whole", text, *saving)

    from hf_gradguard.training.carried import CarryingTrainer

    class StopError(Exception):
        pass

    original = CarryingTrainer.compute_loss
    calls = 0

    def stops(self: CarryingTrainer, *args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 38:
            raise StopError
        return original(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(CarryingTrainer, "compute_loss", stops)
    with pytest.raises(StopError):
        run(tmp_path / "stopped", text, *saving)
    monkeypatch.undo()
    assert (tmp_path / "stopped" / "checkpoint-35" / "carried-0.safetensors").exists()
    run(tmp_path / "stopped", text, *saving)
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_a_model_without_a_state_is_refused(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = OPTIONS.replace("gradguard_recurrent --cell lstm --config_overrides hidden_size=16,num_layers=2", "gpt2")
    with pytest.raises(SystemExit) as refused:
        train_clm.main(["--output_dir", str(tmp_path / "out"), "--train_file", str(text), *words.split()])
    assert refused.value.code == 2
    assert "--carry_state is for recurrent models, and GPT2LMHeadModel is none" in capsys.readouterr().err
