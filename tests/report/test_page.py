import re
from pathlib import Path

import numpy as np
import pytest

from hf_gradguard import RunRecord
from hf_gradguard.events import Event
from hf_gradguard.report import write_comparison, write_report
from hf_gradguard.report.charts import notable
from tests.report import synthetic
from tests.report.pages import Page, table

WINDOWS, LAYERS = 150, 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    norms = synthetic.vanishing(WINDOWS, LAYERS)
    norms[70, :] = np.nan
    norms[:, 4] = 0.0
    norms[:, 5] = -1.0
    events = [
        Event("vanishing", 60, layer="layer 7", message="the gradient fades."),
        Event("nonfinite", 71, parameter="layer.3.weight0", message="the gradient holds <script>alert(1)</script> NaN"),
    ]
    directory = tmp_path_factory.mktemp("runs") / "deep"
    return synthetic.write(directory, norms, losses=synthetic.losses(WINDOWS, 3.0), events=events)


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("pages") / "new" / "report.html"
    write_report(run, path)
    return Page.read(path)


def test_the_page_is_well_formed_and_loads_nothing(page: Page):
    assert page.open_elements == []
    assert not [entry for entry in page.attributes if entry[1] in ("src", "href", "srcset", "action", "background")]
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_the_page_brings_the_library_that_draws(page: Page):
    library, drawing = page.scripts
    assert "window.vegaEmbed" in library
    assert len(library) > 500_000
    places = [value for _, name, value in page.attributes if name == "data-spec"]
    assert places == [str(index) for index in range(len(page.specs))]
    assert "vegaEmbed(" in drawing


def test_the_page_opens_with_verdict_why_and_next(page: Page):
    words = [page.text.index(word) for word in ("Verdict", "Vanishing gradient since update 60", "Why", "Next")]
    assert words == sorted(words)
    assert words[-1] < page.text.index("Which layers starve, and since when?")
    assert "Layer 0 gets" in page.text


def test_the_page_tells_what_was_run(page: Page):
    for fact in ("BertLMHeadModel", "5.1 million", "finished", "149", "2026-01-02 03:04:05", "0:01:15", "5.23"):
        assert fact in page.text


def test_texts_from_the_record_are_not_markup(page: Page):
    assert "holds <script>alert(1)</script> NaN" in page.text
    assert len(page.scripts) == 2


def test_the_heat_map_holds_the_records_norms(page: Page, run: Path):
    heat = page.specs[0]
    layers = {row["column"]: row["layer"] for row in table(heat, "column", "layer")}
    updates = {row["row"]: row["updates"] for row in table(heat, "row", "updates")}
    cells = {(updates[row["row"]], layers[row["column"]]): row for row in table(heat, "row", "column", "norm")}
    record = RunRecord.load(run)
    assert len(cells) == WINDOWS * LAYERS
    for index in range(WINDOWS):
        for layer in range(LAYERS):
            cell = cells[str(index + 1), f"layer {layer}"]
            column = next(i for i, info in enumerate(record.parameters) if info == f"layer.{layer}.weight0")
            norm = record.norms[index, column]
            if layer == 5:
                assert cell["state"] == "no gradient"
            elif layer == 4:
                assert cell["state"] == "exactly zero"
            elif index == 70:
                assert cell["state"] == "NaN or infinite"
            else:
                assert float(cell["norm"]) == pytest.approx(norm, rel=1e-4)


def test_the_depth_profile_holds_each_moment_of_the_slider(page: Page, run: Path):
    profile = page.specs[1]
    rows = table(profile, "frame", "depth", "norm")
    record = RunRecord.load(run)
    assert {int(row["frame"]) for row in rows} == set(range(60))
    (slider,) = [parameter for parameter in profile["params"] if "bind" in parameter]
    assert (slider["bind"]["min"], slider["bind"]["max"], slider["value"]) == (0, 59, 59)
    assert {row["updates"] for row in rows if row["frame"] == "59"} == {"150"}
    for row in rows:
        if row["norm"]:
            norm = record.layer_norms[int(row["updates"]) - 1, int(float(row["depth"]))]
            assert float(row["norm"]) == pytest.approx(norm, rel=1e-4)


def test_loss_total_norm_and_ratio_are_the_records(page: Page, run: Path):
    record = RunRecord.load(run)
    ratio = record.layer_norms[:, 0] / record.layer_norms[:, LAYERS - 1]
    for spec, expected in zip(page.specs[2:5], (record.losses, record.total_norms, ratio), strict=True):
        rows = table(spec, "step", "value")
        steps = [round(float(row["step"])) for row in rows]
        np.testing.assert_allclose([float(row["value"]) for row in rows], expected[np.array(steps) - 1], rtol=1e-5)
        assert set(range(1, WINDOWS + 1)) - set(steps) == set((np.flatnonzero(~np.isfinite(expected)) + 1).tolist())


def test_events_are_marked_with_their_messages(page: Page):
    for spec in page.specs[2:4]:
        marked = table(spec, "event", "message")
        assert [(row["event"], row["step"]) for row in marked] == [("vanishing", "60"), ("nonfinite", "71")]
        assert marked[0]["message"] == "the gradient fades."


def test_of_too_many_events_the_verdicts_stay_and_the_rest_is_thinned_evenly():
    events = [Event("clipped", step) for step in range(1, 1001)]
    events[300] = Event("vanishing", 301)
    events[600] = Event("skipped", 601)
    steps = [event.step for event in notable(events, 12)]

    assert {301, 601} < set(steps)
    clipped = sorted(set(steps) - {301, 601})
    assert (clipped[0], clipped[-1]) == (1, 1000)
    assert set(np.diff(clipped)) <= {110, 111, 112, 113}
    assert steps == sorted(steps)


def test_update_ratios_are_the_records(page: Page, run: Path):
    record = RunRecord.load(run)
    rows = table(page.specs[5], "step", "ratio", "layer")
    assert [row["layer"] for row in rows][::6] == ["layer 11", "layer 6", "layer 0"]
    for row in rows:
        group = next(i for i, group in enumerate(record.layout.groups) if group.name == row["layer"])
        place = record.weight_steps.tolist().index(int(row["step"]))
        assert float(row["ratio"]) == pytest.approx(record.update_ratios[place, group], rel=1e-5)


def test_the_stacks_of_an_encoder_and_decoder_stand_one_after_another(tmp_path: Path):
    stacks = {"encoder": 6, "decoder": 4}
    write_report(synthetic.write(tmp_path, synthetic.healthy(30, 10), stacks=stacks), tmp_path / "report.html")
    page = Page.read(tmp_path / "report.html")

    layers = [row["layer"] for row in table(page.specs[0], "column", "layer")]
    assert layers == [f"encoder layer {i}" for i in range(6)] + [f"decoder layer {i}" for i in range(4)]
    assert {row["series"] for row in table(page.specs[3], "series")} == {"encoder", "decoder"}
    pieces = {row["layer"]: row["piece"] for row in table(page.specs[1], "piece")}
    assert pieces["encoder layer 5"] != pieces["decoder layer 0"]


def test_a_run_without_windows_still_gets_a_report(tmp_path: Path):
    write_report(synthetic.write(tmp_path, synthetic.healthy(0), status=None, weights=False), tmp_path / "report.html")
    page = Page.read(tmp_path / "report.html")

    assert "still running, or killed, no update recorded yet" in page.text
    assert "Too early to say" in page.text
    assert page.specs == []


def test_a_run_of_one_window_still_gets_a_report(tmp_path: Path):
    write_report(synthetic.write(tmp_path, synthetic.healthy(1)), tmp_path / "report.html")
    page = Page.read(tmp_path / "report.html")

    assert "Too early to say" in page.text
    assert len(table(page.specs[0], "row", "column", "norm")) == 12
    assert not [parameter for parameter in page.specs[1].get("params", []) if "bind" in parameter]


def test_a_run_of_nothing_but_nan_still_gets_a_report(tmp_path: Path):
    write_report(synthetic.write(tmp_path, np.full((30, 4), np.nan), status="failed"), tmp_path / "report.html")
    page = Page.read(tmp_path / "report.html")

    assert "failed, 0 updates, 30 windows with NaN or infinity" in page.text
    assert {row["state"] for row in table(page.specs[0], "row", "state")} == {"NaN or infinite"}


def test_a_comparison_lays_curves_over_one_another_and_depths_side_by_side(tmp_path: Path, run: Path):
    other = synthetic.write(tmp_path / "flat", synthetic.healthy(80, 6), losses=synthetic.losses(80, 2.0))
    write_comparison([run, other], tmp_path / "compare.html")
    page = Page.read(tmp_path / "compare.html")
    loss, ratio, *depths = page.specs

    for spec in (loss, ratio):
        assert {row["series"] for row in table(spec, "series")} == {"deep", "flat"}
    record = RunRecord.load(other)
    values = [float(row["value"]) for row in table(loss, "series") if row["series"] == "flat"]
    np.testing.assert_allclose(values, record.losses, rtol=1e-5)
    assert len(depths) == 4
    assert [len({row["layer"] for row in table(spec, "depth")}) for spec in depths[:2]] == [LAYERS, 6]
    rows = re.search(r"Verdict(.*)Next", page.text, re.DOTALL)[1]
    assert rows.index("deep") < rows.index("vanishing") < rows.index("flat") < rows.index("healthy")


def test_a_comparison_of_one_run_is_refused(run: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="two runs or more"):
        write_comparison([run], tmp_path / "compare.html")


def test_a_report_on_1000_layers_and_10000_updates_is_under_10_mb(tmp_path: Path):
    events = [Event("clipped", step, message="clipped to 1.0") for step in range(1, 10_000, 3)]
    events.append(Event("vanishing", 9000, layer="layer 500", message="the gradient fades."))
    losses = synthetic.losses(10_000, 3.0)
    run = synthetic.write(tmp_path, synthetic.vanishing(10_000, 1000), losses=losses, events=events)
    write_report(run, tmp_path / "report.html")

    assert (tmp_path / "report.html").stat().st_size < 10_000_000
    page = Page.read(tmp_path / "report.html")
    assert len(table(page.specs[0], "row", "column", "norm")) == 295 * 250  # blocks of 34 updates and of 4 layers
    assert "Vanishing gradient since update 9,000" in page.text
    assert [row["event"] for row in table(page.specs[2], "event")].count("vanishing") == 1
