"""How far back in time the gradient reaches, as reports show it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hf_gradguard import RunRecord
from hf_gradguard.observe.reach import TimeProfile
from hf_gradguard.report import write_comparison, write_report, write_time_profiles
from hf_gradguard.report.charts import POINTS
from tests.report import synthetic
from tests.report.pages import Page, table
from tests.report.test_picture import _size_and_colors

QUESTION = "How far back in time does the gradient reach?"


def falling(rate: float, lags: int = 30, seed: int = 0) -> TimeProfile:
    """Samples that lose about `rate` e-folds a token."""
    noise = np.random.default_rng(seed).normal(0, 0.3, (9, lags))
    return TimeProfile.of(5 * np.exp(noise - rate * np.arange(lags)))


def run_with(directory: Path, profiles: dict[int, TimeProfile]) -> Path:
    return synthetic.write(directory, synthetic.healthy(60), losses=synthetic.losses(60, 3.0), profiles=profiles)


def drawn(page: Page) -> list[dict[str, str]]:
    return table(page.specs[page.headings.index(QUESTION)], "lag", "share", "piece")


def test_the_first_the_latest_and_some_between_are_drawn_as_shares(tmp_path: Path) -> None:
    profiles = {step: falling(0.1 * step, seed=step) for step in range(1, 60, 7)}
    write_report(run_with(tmp_path, profiles), tmp_path / "report.html")
    page = Page.read(tmp_path / "report.html")
    assert page.open_elements == []
    rows = drawn(page)
    assert list(dict.fromkeys(row["series"] for row in rows)) == ["update 1", "update 22", "update 36", "update 57"]
    for step in (1, 22, 36, 57):
        own = [row for row in rows if row["series"] == f"update {step}"]
        profile = RunRecord.load(tmp_path).time_profiles[step]
        assert [int(row["lag"]) for row in own] == list(range(30))
        for name, expected in (
            ("share", profile.relative),
            ("norm", profile.mean),
            ("low", profile.quantiles[:, 0] / profile.mean[0]),
            ("high", profile.quantiles[:, 2] / profile.mean[0]),
        ):
            np.testing.assert_allclose([float(row[name]) for row in own], expected, rtol=1e-4)
    assert profiles[57].describe() in page.text
    assert "That is update 57" in page.text


def test_a_record_without_profiles_has_no_such_figure(tmp_path: Path) -> None:
    write_report(run_with(tmp_path, {}), tmp_path / "report.html")
    assert QUESTION not in Page.read(tmp_path / "report.html").text


def test_one_profile_is_drawn_alone(tmp_path: Path) -> None:
    write_report(run_with(tmp_path, {1: falling(0.1)}), tmp_path / "report.html")
    assert {row["series"] for row in drawn(Page.read(tmp_path / "report.html"))} == {"update 1"}


def test_a_line_breaks_where_the_gradient_is_zero(tmp_path: Path) -> None:
    norms = np.ones((3, 8))
    norms[:, 3:5], norms[:2, 7] = 0.0, np.inf
    write_report(run_with(tmp_path, {1: TimeProfile.of(norms)}), tmp_path / "report.html")
    rows = drawn(Page.read(tmp_path / "report.html"))
    assert [int(row["lag"]) for row in rows] == [0, 1, 2, 5, 6]
    assert [row["piece"] for row in rows[:3]] != [row["piece"] for row in rows[3:]]
    assert len({row["piece"] for row in rows}) == 2


def test_a_profile_of_nothing_is_not_drawn(tmp_path: Path) -> None:
    write_report(run_with(tmp_path, {1: TimeProfile.of(np.zeros((2, 5)))}), tmp_path / "report.html")
    assert QUESTION not in Page.read(tmp_path / "report.html").text


def test_a_long_profile_is_thinned_out_and_keeps_its_ends(tmp_path: Path) -> None:
    write_report(run_with(tmp_path, {1: falling(0.001, lags=5000)}), tmp_path / "report.html")
    lags = [int(row["lag"]) for row in drawn(Page.read(tmp_path / "report.html"))]
    assert len(lags) == POINTS
    assert (lags[0], lags[-1]) == (0, 4999)


def test_a_comparison_lays_the_latest_profiles_over_one_another(tmp_path: Path) -> None:
    runs = [
        run_with(tmp_path / "short", {1: falling(0.5), 50: falling(0.2)}),
        run_with(tmp_path / "long", {1: falling(0.01, lags=50)}),
        run_with(tmp_path / "none", {}),
    ]
    write_comparison(runs, tmp_path / "compare.html")
    rows = drawn(Page.read(tmp_path / "compare.html"))
    assert list(dict.fromkeys(row["series"] for row in rows)) == ["short", "long"]
    found = {name: [float(row["share"]) for row in rows if row["series"] == name] for name in ("short", "long")}
    np.testing.assert_allclose(found["short"], falling(0.2).relative, rtol=1e-4)
    np.testing.assert_allclose(found["long"], falling(0.01, lags=50).relative, rtol=1e-4)


def test_profiles_of_several_models_become_a_picture(tmp_path: Path) -> None:
    panels = {
        "before": {"rnn": falling(1.0), "gru": falling(0.1)},
        "after": {"rnn": falling(0.5), "gru": falling(0.05)},
    }
    write_time_profiles(panels, tmp_path / "new" / "profiles.png")
    width, height, colors = _size_and_colors(tmp_path / "new" / "profiles.png")
    assert 1400 < width < 2000
    assert 500 < height < 1000
    assert colors > 50


def test_a_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        write_time_profiles({"": {"dead": TimeProfile.of(np.zeros((2, 5)))}}, tmp_path / "profiles.png")
    assert not (tmp_path / "profiles.png").exists()
