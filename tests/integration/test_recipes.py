"""The recipes that study and measure patches do what they say, on a small scale."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from recipes import bench_patches, study_depth


def study(folder: Path, *more: str) -> None:
    sizes = ["--layers", "3", "--shallow", "2", "--width", "16", "--steps", "3", "--rates", "1e-3", "3e-3"]
    study_depth.main(["--output", str(folder), *sizes, *more])


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_study_tries_each_rate_and_goes_on_with_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study(tmp_path, "--models", "bert", "gpt2", "--arms", "shallow", "rezero", "--seeds", "3")
    found = rows(tmp_path)
    assert len(found) == 4 * (2 + 2)
    for model in ("bert", "gpt2"):
        for arm, layers in (("shallow", 2), ("rezero", 3)):
            own = [row for row in found if (row["model"], row["arm"]) == (model, arm)]
            assert {row["layers"] for row in own} == {layers}
            first = [row for row in own if row["seed"] == 0]
            assert [row["rate"] for row in first] == [1e-3, 3e-3]
            best = min(first, key=lambda row: row["held_out"])["rate"]
            assert [(row["rate"], row["seed"]) for row in own if row["seed"]] == [(best, 1), (best, 2)]
    printed = capsys.readouterr().out
    assert "| rezero | 3 |" in printed
    assert "| vanilla | 2 |" in printed


def test_a_study_does_only_what_is_left(tmp_path: Path) -> None:
    options = ("--models", "bert", "--arms", "shallow", "--seeds", "2")
    study(tmp_path, *options)
    whole = rows(tmp_path)
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in whole[1:]) + "\n")
    for begun in (tmp_path / "begun").iterdir():  # as if the process that did it had died
        begun.write_text("0")
    study(tmp_path, *options)
    again = rows(tmp_path)
    assert again[:-1] == whole[1:]
    assert {**again[-1], "ms": 0} == {**whole[0], "ms": 0}  # the same seed, the same training
    before = path.read_bytes()
    study(tmp_path, *options)
    assert path.read_bytes() == before


def test_a_run_that_somebody_else_is_at_is_left_to_him(tmp_path: Path) -> None:
    results = study_depth.Results(tmp_path)
    run = study_depth.Run("bert", "rezero", 3, 16, 3, 0.02, 1e-3, 0)
    assert results.claim(run)
    assert (tmp_path / "begun" / run.key).read_text() == str(os.getpid())
    assert not results.claim(run)


def test_tokens_that_have_become_one_vector_have_similarity_one() -> None:
    run = study_depth.Run("bert", "vanilla", 2, 16, 3, 0.02, 1e-3, 0)
    model = study_depth.make_model(run)
    ids = torch.randint(256, (16, 8), generator=torch.Generator().manual_seed(0))
    blocks = [{"input_ids": row, "labels": row} for row in ids]
    loss, similarity = study_depth.evaluate(model, blocks)
    assert loss == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    assert similarity < 0.99
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("output.LayerNorm.weight"):
                parameter.zero_()
            if name.endswith("output.LayerNorm.bias"):
                parameter.fill_(1.0)
    assert study_depth.evaluate(model, blocks)[1] == pytest.approx(1.0)


@pytest.mark.slow
def test_the_bench_of_patches_prints_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--width", "64", "--layers", "2", "--length", "16", "--steps", "3"]
    bench_patches.main(["--models", "gpt2", "--patches", "residual=layerscale:init=0.5", "residual=gru_gate", *sizes])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `") or "itself" in line]
    assert [line.split("|")[1].strip() for line in lines] == [
        "(unpatched beside itself)",
        "`residual=layerscale:init=0.5`",
        "`residual=layerscale:init=0.5`, folded",
        "`residual=gru_gate`",
    ]
    operations = [float(line.split("|")[3]) for line in lines]
    assert operations[:3] == [1.0, 1.0, 1.0]
    assert operations[3] > 1.0
