"""`gradguard fold` makes a checkpoint that Transformers alone can load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_gradguard.cli import main
from hf_gradguard.patch.model import patch_model
from tests.patch.models import CASES, logits


def save(folder: Path, spec: str | None = "pre_ln_scaled", name: str = "gpt2") -> Any:
    model = CASES[name].make()
    if spec is not None:
        patch_model(model, spec, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    return model


def outputs(model: Any, name: str = "gpt2") -> torch.Tensor:
    with torch.no_grad():
        return logits(model, CASES[name].inputs())


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which the command fails."""
    assert main(["fold", *map(str, arguments)]) == 2
    error = capsys.readouterr().err.splitlines()
    (line,) = [line for line in error if line.startswith("gradguard fold: ")]
    assert not any("Traceback" in line for line in error)
    return line


@pytest.mark.parametrize(("name", "spec"), [("gpt2", "pre_ln_scaled"), ("bart", "deepnorm;activation=relu")])
def test_the_folded_checkpoint_is_a_stock_one_with_the_same_outputs(
    name: str, spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tmp_path / "in", spec, name)
    assert main(["fold", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert f"{tmp_path / 'out'}, a {type(model).__name__} that loads without" in capsys.readouterr().out
    assert not {"gradguard", "quantization_config"} & json.loads((tmp_path / "out" / "config.json").read_text()).keys()
    folded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(outputs(folded, name), outputs(model, name), rtol=1e-5, atol=1e-5)


def test_the_dtype_of_the_checkpoint_stays(tmp_path: Path) -> None:
    model = CASES["gpt2"].make().to(torch.bfloat16)
    patch_model(model, "branch_scale").save_pretrained(tmp_path / "in")
    assert main(["fold", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_tokenizer_files_go_along_and_training_state_does_not(tmp_path: Path) -> None:
    save(tmp_path / "in")
    kept = [
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "spiece.model",
        "chat_template.jinja",
    ]
    for name in [*kept, "optimizer.pt", "trainer_state.json", "training_args.bin"]:
        (tmp_path / "in" / name).write_text(name)
    (tmp_path / "out").mkdir()
    assert main(["fold", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {*kept, "config.json", "generation_config.json", "model.safetensors"}
    assert (tmp_path / "out" / "vocab.json").read_text() == "vocab.json"


def test_an_output_that_is_not_empty_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    assert "exists and is not an empty folder" in failure(capsys, tmp_path / "in", tmp_path / "out")
    assert "exists and is not an empty folder" in failure(capsys, tmp_path / "in", tmp_path / "out" / "note")
    assert "exists and is not an empty folder" in failure(capsys, tmp_path / "in", tmp_path / "in")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["note"]


def test_an_input_that_is_no_patched_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "nowhere is no folder" in failure(capsys, tmp_path / "nowhere", out)
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in failure(capsys, tmp_path / "empty", out)
    (tmp_path / "empty" / "config.json").write_text("{")
    assert "config.json is no JSON" in failure(capsys, tmp_path / "empty", out)
    save(tmp_path / "stock", None)
    assert "has no field 'gradguard': the model is not patched" in failure(capsys, tmp_path / "stock", out)
    assert not out.exists()


def test_a_class_that_is_unknown_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    for names, words in (
        ([], "has to name one class in 'architectures'"),
        (["Own"], "Transformers has no class 'Own'"),
    ):
        (tmp_path / "in" / "config.json").write_text(json.dumps({**config, "architectures": names}))
        assert words in failure(capsys, tmp_path / "in", tmp_path / "out")


def test_a_patch_that_does_not_fold_is_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in", "gtrxl;norm=sandwich")
    line = failure(capsys, tmp_path / "in", tmp_path / "out")
    assert "residual='gru_gate:bias=none'" in line
    assert "norm='sandwich'" in line
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_weights_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    assert "model.safetensors" in failure(capsys, tmp_path / "in", tmp_path / "out")
