"""Reads a page as a browser would: its text, what it loads, and the data that its plots draw."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

_VOID = {"meta", "br", "link", "img", "input", "wbr"}


@dataclass
class Page(HTMLParser):
    """What a page holds; `open_elements` is empty if every element was closed."""

    text: str = ""
    styles: str = ""
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    open_elements: list[str] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)
    """What each plot stands under."""

    @classmethod
    def read(cls, path: Path) -> Page:
        page = cls()
        HTMLParser.__init__(page)
        page.feed(path.read_text(encoding="utf-8"))
        page.close()
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open_elements.append(tag)
        if tag == "script":
            self.scripts.append("")
        if ("class", "chart") in attrs:
            self.headings.append(self._heading)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_elements.pop() == tag

    def handle_data(self, data: str) -> None:
        if "h2" in self.open_elements:
            self._heading = data
        if "script" in self.open_elements:
            self.scripts[-1] += data
        elif "style" in self.open_elements:
            self.styles += data
        else:
            self.text += data

    @property
    def specs(self) -> list[dict[str, Any]]:
        """The Vega-Lite specification of each plot."""
        found: list[dict[str, Any]] = json.loads(re.search(r" of (\[.*\])\.map\(", self.scripts[-1], re.DOTALL)[1])
        return found


def table(spec: dict[str, Any], *columns: str) -> list[dict[str, str]]:
    """The one table of a specification that has these columns."""
    (found,) = tables(spec, *columns)
    return found


def tables(spec: dict[str, Any], *columns: str) -> list[list[dict[str, str]]]:
    """The tables of a specification that have these columns."""
    found = [list(csv.DictReader(io.StringIO(text))) for text in spec["datasets"].values()]
    return [rows for rows in found if rows and set(columns) <= set(rows[0])]
