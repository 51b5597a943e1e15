import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_gradguard import RunRecord
from hf_gradguard.events import Event
from hf_gradguard.report import write_comparison, write_report
from hf_gradguard.report.charts import notable
from tests.report import synthetic
from tests.report.pages import Page, table, tables

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


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> synthetic.Acted:
    return synthetic.acting(tmp_path_factory.mktemp("runs") / "acted", 300)


@pytest.fixture(scope="module")
def acted(done: synthetic.Acted, tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("pages") / "report.html"
    write_report(done.directory, path)
    return Page.read(path)


def figure(page: Page, title: str) -> dict[str, Any]:
    """The plot under this heading."""
    places = {heading: page.specs[place] for place, heading in enumerate(page.headings)}
    return places[title]


def test_what_the_policies_did_is_summed_up_before_the_plots(done: synthetic.Acted, acted: Page):
    assert acted.open_elements == []
    block = acted.text[acted.text.index("What did the guard do?") : acted.text.index("Which layers starve")]
    sizes = f"of {min(done.sizes)} to {max(done.sizes)} windows each."
    assert f"Of 300 windows, {len(done.sizes)} updates were made, {sizes}" in block
    for part in (f"deferred{done.deferred}accumulate=norm_threshold:threshold=0.75,max_windows=8,reduce=mean; ",
                 "skipped2nonfinite=skip:max_consecutive=20; 0.67% of windows", f"clipped{done.clipped}clip=zclip; ",
                 f"smallest factor {min(done.factors):.2g}"):  # fmt: skip
        assert part in block


def test_routine_events_are_summed_up_and_the_others_listed(acted: Page):
    listed = acted.text[acted.text.index("What happened?") :]
    assert "Events, in the order of time." in listed
    assert "more, of lesser weight" not in listed
    assert listed.count("layer.3.weight0The gradient of layer.3.weight0 and of 4 more parameters holds NaN") == 2
    assert "encoder.layer.3.mlp made it in the forward pass, from inputs between -3.1 and 88.7" in listed
    for word in ("deferred", "clipped"):
        assert word not in listed
    marked = table(figure(acted, "Does the loss fall?"), "event", "message")
    assert {row["event"] for row in marked} == {"nonfinite"}


def test_notices_are_listed_but_mark_nothing(tmp_path: Path):
    events = [Event("notice", 1, message="the batch was written"), Event("warning", 9, message="no room")]
    write_report(synthetic.write(tmp_path, synthetic.healthy(30), events=events), tmp_path / "report.html")
    page = Page.read(tmp_path / "report.html")

    marked = table(figure(page, "How large is the gradient as a whole?"), "event", "message")
    assert [row["event"] for row in marked] == ["warning"]
    assert "The batch was written" in page.text[page.text.index("What happened?") :]


def test_steps_are_called_windows_where_updates_are_made_of_several(acted: Page, page: Page):
    for spec in acted.specs:
        titles = re.findall(r'"title": "(window|update)"', json.dumps(spec))
        assert set(titles) <= {"window"}
    assert "Loss of each window" in acted.text
    assert "Loss of each update" in page.text
    assert '"title": "window"' not in json.dumps(page.specs)


def test_batches_are_drawn_beside_the_noise_scale(done: synthetic.Acted, acted: Page):
    rows = table(figure(acted, "How large is the batch of an update?"), "step", "series", "value")
    batches = [row for row in rows if row["series"] == "batch of each update"]
    assert [int(float(row["step"])) for row in batches] == done.steps
    np.testing.assert_allclose([float(row["value"]) for row in batches], done.batches, rtol=1e-5)
    noise = [row for row in rows if row["series"] == "noise scale"]
    record = RunRecord.load(done.directory)
    known = np.isfinite(record.noise_scales)
    assert [int(float(row["step"])) for row in noise] == record.accumulation_steps[known].tolist()
    np.testing.assert_allclose([float(row["value"]) for row in noise], record.noise_scales[known], rtol=1e-5)


def test_the_accumulated_norm_is_drawn_beside_that_of_windows_and_the_threshold(done: synthetic.Acted, acted: Page):
    spec = figure(acted, "How large is the gradient as a whole?")
    rows = table(spec, "step", "series", "value")
    record = RunRecord.load(done.directory)
    norms = {int(float(row["step"])): float(row["value"]) for row in rows if row["series"] == "accumulated"}
    used = record.accumulation_updated
    assert list(norms) == record.accumulation_steps[used].tolist()
    np.testing.assert_allclose(list(norms.values()), record.accumulated_norms[used], rtol=1e-5)
    windows = [float(row["value"]) for row in rows if row["series"] == "window"]
    np.testing.assert_allclose(windows, record.total_norms[np.isfinite(record.total_norms)], rtol=1e-5)
    assert ["0.75"] in [[row["at"] for row in each] for each in tables(spec, "at")]
    assert "an update is made when the accumulated one reaches the dashed line, 0.75" in acted.text


def test_factors_are_drawn_where_a_rule_clipped(done: synthetic.Acted, acted: Page):
    rows = table(figure(acted, "How much does clipping take away?"), "step", "value")
    assert [int(float(row["step"])) for row in rows] == done.steps
    below = [float(row["value"]) for row in rows if float(row["value"]) < 1]
    np.testing.assert_allclose(below, done.factors, rtol=1e-5)
    assert "What clip=zclip multiplied the gradient with" in acted.text


def test_a_dry_run_speaks_of_what_would_have_been(tmp_path: Path):
    said = synthetic.acting(tmp_path, 300, dry_run=True)
    write_report(tmp_path, tmp_path / "report.html")
    page = Page.read(tmp_path / "report.html")

    assert "What would the guard have done?" in page.text
    made = f"Of 300 windows, {len(said.sizes)} updates would have been made"
    assert f"This was a dry run: nothing was done. {made}" in page.text
    assert f"deferred{said.deferred}accumulate=" in page.text
    assert page.text.count("the accumulation is what the policy would have made") == 2
    assert "How much does clipping take away?" not in page.headings
    assert "finished, 300 updates" in page.text
    assert '"title": "window"' not in json.dumps(page.specs)


def test_without_a_policy_nothing_of_it_appears(page: Page):
    assert "What did the guard do?" not in page.text
    assert "What would the guard have done?" not in page.text
    assert page.headings == [
        "Which layers starve, and since when?",
        "Does the gradient reach the first layer?",
        "Does the loss fall?",
        "How large is the gradient as a whole?",
        "How much of it reaches the first layer?",
        "How far does one update move the weights?",
    ]
    assert "window" not in page.text.replace("1 window with NaN", "").replace("skipped windows", "")


def test_the_trainers_own_clipping_is_no_rule_of_the_guards(tmp_path: Path):
    write_report(synthetic.write(tmp_path, synthetic.healthy(40), coefficients=np.full(40, 0.5)), tmp_path / "r.html")
    page = Page.read(tmp_path / "r.html")

    assert "40 of 40" in page.text
    assert "How much does clipping take away?" not in page.headings


def test_curves_and_their_bands_share_one_legend(tmp_path: Path):
    done = synthetic.acting(tmp_path, 1300)
    write_report(done.directory, tmp_path / "report.html")
    page = Page.read(tmp_path / "report.html")

    spec = figure(page, "How large is the batch of an update?")
    legends = [layer["encoding"]["color"]["legend"] for layer in spec["layer"]]
    assert len(legends) == 2
    assert sum(legend is not None for legend in legends) == 1


def test_20_000_windows_of_policies_stay_small_in_the_page(tmp_path: Path):
    done = synthetic.acting(tmp_path, 20_000)
    write_report(done.directory, tmp_path / "report.html")
    page = Page.read(tmp_path / "report.html")

    assert len(done.sizes) > 4_000
    for title in ("How large is the batch of an update?", "How much does clipping take away?"):
        rows = table(figure(page, title), "series", "value")
        assert len(rows) <= 600 * len({row["series"] for row in rows})
    batches = [float(row["value"]) for row in table(figure(page, "How large is the batch of an update?"), "series")
               if row["series"] == "batch of each update"]  # fmt: skip
    assert min(done.batches) <= min(batches)
    assert max(batches) <= max(done.batches)
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


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
