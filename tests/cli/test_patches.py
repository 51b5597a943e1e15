"""`gradguard patches` shows all that there is, readably."""

from __future__ import annotations

import os
import sys

import pytest

from hf_gradguard.cli import main
from hf_gradguard.patch.architectures import list_architectures
from hf_gradguard.patch.catalogue import list_patches


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["patches", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_everything_is_listed_in_a_hundred_columns(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys)
    assert max(map(len, lines)) <= 100
    together = " ".join(" ".join(lines).split())
    for info in list_patches():
        assert any(line.startswith(f"  {info.name} ") for line in lines)
        assert info.summary in together
        assert info.citation in together
    assert ", ".join(list_architectures()) in together
    assert "leaky_relu" in together


def test_one_part_can_be_shown_alone(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--part", "norm")
    assert [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "] == [
        info.name for info in list_patches() if info.part == "norm"
    ]


def test_marks_say_what_keeps_a_model_and_what_folds(capsys: pytest.CaptureFixture[str]) -> None:
    marks = {line[2:20].strip(): line[21:23] for line in printed(capsys, "--part", "residual") if line[2:3].strip()}
    assert marks["layerscale"] == "kF"
    assert marks["gru_gate"] == "  "
    assert marks["deepnorm"] == " F"
    assert "k with init=1" in " ".join(printed(capsys, "--part", "residual"))
    assert "k, f in post-norm models" in " ".join(printed(capsys, "--part", "norm"))


def test_an_unknown_part_is_told_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["patches", "--part", "residuals"])
    assert end.value.code == 2
    assert "'residual'" in capsys.readouterr().err


def test_a_reader_that_stops_reading_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["patches", "--part", "norm"]) == 0
        monkeypatch.undo()
    assert capfd.readouterr().err == ""
