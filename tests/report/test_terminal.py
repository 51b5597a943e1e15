from pathlib import Path

import numpy as np

from hf_gradguard.events import Event
from hf_gradguard.report import Run, comparison_summary, terminal_summary
from tests.report import synthetic


def test_the_summary_is_verdict_why_next_and_profile_in_25_plain_lines(tmp_path: Path):
    said = Event("vanishing", 60, message="the gradient fades.")
    run = Run.load(synthetic.write(tmp_path / "deep", synthetic.vanishing(), events=[said]))
    lines = terminal_summary(run).splitlines()

    assert len(lines) <= 25
    assert max(map(len, lines)) <= 100
    assert "\033" not in terminal_summary(run)
    assert lines[0] == "deep: finished, 150 updates"
    assert lines[1].startswith("Verdict  Vanishing gradient since update 60: ")
    assert [line.split()[0] for line in lines if line[:1].strip()][1:] == ["Verdict", "Why", "Next", "Run"]


def test_the_bars_show_the_typical_norms_from_the_output_down(tmp_path: Path):
    norms = synthetic.vanishing()
    run = Run.load(synthetic.write(tmp_path, norms))
    bars = [line for line in terminal_summary(run).splitlines() if "█" in line]

    assert [line.split()[:2] for line in (bars[0], bars[-1])] == [["layer", "99"], ["layer", "0"]]
    for line in bars:
        layer, norm = int(line.split()[1]), float(line.split()[2])
        expected = np.exp(np.median(np.log(norms[-run.thresholds.window :, layer])))
        np.testing.assert_allclose(norm, expected, rtol=0.06)
    lengths = [line.count("█") for line in bars]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 4 * lengths[-1]


def test_only_the_verdict_is_coloured_when_asked_for(tmp_path: Path):
    run = Run.load(synthetic.write(tmp_path, synthetic.vanishing()))
    plain, colored = terminal_summary(run).splitlines(), terminal_summary(run, color=True).splitlines()

    assert colored[1] == f"\033[1;31m{plain[1]}\033[0m"
    assert colored[2:] == plain[2:]


def test_a_deep_encoder_and_decoder_fit_in_25_lines(tmp_path: Path):
    run = Run.load(synthetic.write(tmp_path, synthetic.vanishing(60, 80), stacks={"encoder": 40, "decoder": 40}))
    lines = terminal_summary(run).splitlines()

    assert len(lines) <= 25
    for end in ("encoder layer 39", "encoder layer 0 ", "decoder layer 39", "decoder layer 0 "):
        assert sum(end in line and "█" in line for line in lines) == 1


def test_one_line_says_what_the_policies_did(tmp_path: Path):
    done = synthetic.acting(tmp_path / "acted", 1200)
    lines = terminal_summary(Run.load(done.directory)).splitlines()

    (line,) = [line for line in lines if line.startswith("Acted")]
    assert line == (
        f"Acted    1,200 windows, {len(done.sizes)} updates: {done.deferred} deferred, 2 skipped, "
        f"{done.clipped} clipped (smallest factor {min(done.factors):.2g})"
    )
    assert max(map(len, lines)) <= 100
    assert lines.index(line) == len(lines) - 2


def test_one_line_says_what_the_policies_would_have_done(tmp_path: Path):
    said = synthetic.acting(tmp_path / "dry", 1200, dry_run=True)
    text = terminal_summary(Run.load(said.directory))

    assert (
        f"\nDry run  of 1,200 windows {said.deferred} would have been deferred, 2 skipped, {said.clipped} clipped; "
        f"{len(said.sizes)} updates made\n"
    ) in text
    assert text.startswith("dry: finished, 1,200 updates")
    assert "Acted" not in text


def test_without_a_policy_no_line_speaks_of_one(tmp_path: Path):
    norms = synthetic.healthy()
    norms[70] = np.nan
    skip = Event("nonfinite", 71, parameter="layer.3.weight0", action="skip", message="NaN")
    text = terminal_summary(Run.load(synthetic.write(tmp_path, norms, events=[skip])))

    assert "Acted" not in text
    assert "Dry run" not in text


def test_the_comparison_has_one_line_a_run(tmp_path: Path):
    runs = [
        Run.load(synthetic.write(tmp_path / "good", synthetic.healthy(), losses=synthetic.losses(150, 2.0))),
        Run.load(synthetic.write(tmp_path / "new", synthetic.healthy(0), status=None, weights=False)),
    ]
    head, good, new = comparison_summary(runs).splitlines()

    assert head.split()[:2] == ["run", "verdict"]
    assert good.split()[:2] == ["good", "Healthy"]
    assert new.startswith("new   Too early to say")
    assert new.endswith("running or killed")
