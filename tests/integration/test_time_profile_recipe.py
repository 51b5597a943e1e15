"""The recipe that shows how far back gradients reach does what it says, on a small scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_gradguard.observe.time_profile import time_profile
from recipes import time_profile as recipe

SIZES = ["--width", "32", "--length", "24", "--max-lag", "10", "--steps", "2"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_model_is_shown_before_and_after_at_its_best_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = ["--rates", "1e-3", "1e-2"]
    names = ["tanh RNN, uniform", "GRU", "GPT-2"]
    recipe.main([*SIZES, *rates, "--models", *names, "--picture", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    table = [cells(line) for line in lines if line.startswith("| ")]
    shown = {name: [row for row in table if row[0] == name] for name in names}
    for name, (start, end, by_rate) in shown.items():
        assert start[1] == "at the start"
        losses = [float(cell.split(",")[0]) for cell in by_rate[1:]]
        best = rates[1 + losses.index(min(losses))]
        assert end[1] == f"after 2 updates, rate {float(best):g}"
        assert float(end[2]) == pytest.approx(min(losses), abs=0.006)
        assert sum(line.startswith(f"- {name}: The gradient") for line in lines) == 2


def test_the_models_begin_as_they_are_called() -> None:
    for name in ("LSTM, forget bias 0", "LSTM, forget bias 1"):
        cell = recipe.MODELS[name](32, 1).model.layers[0].cell
        forget = slice(32, 64)
        assert torch.equal((cell.bias_ih_l0 + cell.bias_hh_l0)[forget], torch.full((32,), float(name[-1])))
    uniform = recipe.MODELS["tanh RNN, uniform"](64, 1).model.layers[0].cell.weight_hh_l0
    assert 0.12 < uniform.abs().max() <= 1 / 8
    assert uniform.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
    orthogonal = recipe.MODELS["tanh RNN, orthogonal"](64, 1).model.layers[0].cell.weight_hh_l0
    assert torch.allclose(orthogonal @ orthogonal.T, torch.eye(64), atol=1e-5)


def test_a_profile_is_that_of_rows_that_were_not_trained_on(capsys: pytest.CaptureFixture[str]) -> None:
    rows = recipe.rows_of(list(range(250)) * 4, 24)
    assert [row["input_ids"].tolist() for row in rows[:2]] == [list(range(24)), list(range(24, 48))]
    model = recipe.MODELS["GRU"](16, 1)
    loss, profile = recipe.look(model, rows, 10)
    ids = torch.stack([row["input_ids"] for row in rows])
    assert loss == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    expected = time_profile(model, {"input_ids": ids, "labels": ids}, max_lag=10)
    assert profile.mean == pytest.approx(expected.mean, rel=1e-3)
    assert next(model.parameters()).dtype == torch.float32


def test_saved_models_are_read_with_their_own_tokenizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name in ("LSTM, forget bias 1", "GPT-2"):
        folder = tmp_path / name[:4]
        recipe.MODELS[name](32, 1).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    saved = [str(tmp_path / name) for name in ("LSTM", "GPT-")]
    recipe.main(["--saved", *saved, "--picture", str(tmp_path / "curves.png"), *SIZES])
    table = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[:2] for row in table[1:]] == [["LSTM", "as saved"], ["GPT-", "as saved"]]
    assert (tmp_path / "curves.png").exists()
