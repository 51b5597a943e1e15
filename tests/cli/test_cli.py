import subprocess
import sys
from pathlib import Path

import pytest

from hf_gradguard import __version__
from hf_gradguard.cli import commands, main
from tests.report import synthetic


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return synthetic.write(tmp_path / "a run", synthetic.healthy(30, 4), losses=synthetic.losses(30, 2.0))


def _failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command fails."""
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.name)
def test_the_help_of_every_command_shows_an_example(command, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main([command.name, "--help"])
    assert end.value.code == 0
    assert f"example: gradguard {command.name}" in " ".join(capsys.readouterr().out.split())


def test_the_help_lists_every_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out
    for command in commands():
        assert f"    {command.name} " in listed


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.split() == ["gradguard", __version__]


@pytest.mark.parametrize("arguments", [[], ["reprot"], ["report"]])
def test_a_request_that_is_not_one_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: gradguard" in capsys.readouterr().err


def test_the_command_line_imports_nothing_heavy():
    code = "import sys; from hf_gradguard.cli import commands; commands(); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "hf_gradguard.cli.report" in found
    assert not {"torch", "transformers", "altair", "numpy", "pyarrow"} & set(found)


def test_report_prints_a_summary_and_writes_into_the_record(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(run)]) == 0
    printed = capsys.readouterr().out
    page = run / "gradguard" / "report.html"
    assert "Verdict  Healthy" in printed
    assert "\033" not in printed
    assert printed.splitlines()[-1] == f"Written: {page}"
    assert "a run" in page.read_text(encoding="utf-8")


def test_a_record_with_a_report_in_it_can_be_read_again(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(run)]) == main(["report", str(run / "gradguard")]) == 0


def test_report_writes_where_it_is_told_to(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page, picture = tmp_path / "new" / "page.html", tmp_path / "new" / "picture.png"
    assert main(["report", str(run), "--output", str(page), "--png", str(picture)]) == 0
    assert page.stat().st_size > 100_000
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert not (run / "gradguard" / "report.html").exists()


def test_compare_prints_a_table_and_writes_a_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = synthetic.write(tmp_path / "other", synthetic.healthy(20, 6), losses=synthetic.losses(20, 2.0))
    assert main(["compare", str(run), str(other), "--output", str(tmp_path / "compare.html")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in printed[1:3]] == ["a run", "other"]
    assert (tmp_path / "compare.html").stat().st_size > 100_000


def test_a_path_without_a_record_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line = _failure(["report", str(tmp_path)], capsys)
    assert line.startswith("gradguard report: ")
    assert str(tmp_path) in line


def test_a_damaged_record_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]):
    (run / "gradguard" / "segment-0000" / "run.json").write_text("{")
    assert "run.json" in _failure(["report", str(run)], capsys)


def test_an_output_that_cannot_be_written_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]):
    in_a_file = run / "gradguard" / "segment-0000" / "run.json" / "report.html"
    assert "run.json" in _failure(["report", str(run), "--output", str(in_a_file)], capsys)


def test_comparing_a_single_run_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]):
    assert "two runs or more" in _failure(["compare", str(run)], capsys)


def test_a_missing_plotting_library_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in [name for name in sys.modules if name.startswith("hf_gradguard.report.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("hf_gradguard.report.charts", raising=False)
    monkeypatch.setitem(sys.modules, "altair", None)
    assert "pip install 'hf-gradguard[report]'" in _failure(["report", str(run)], capsys)


def test_a_fault_of_the_program_is_not_dressed_up_as_the_users(monkeypatch: pytest.MonkeyPatch, run: Path):
    def fail(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")

    monkeypatch.setattr("hf_gradguard.report.load_runs", fail)
    with pytest.raises(ModuleNotFoundError, match="elsewhere"):
        main(["report", str(run)])


def test_the_demo_trains_shallow_deep_and_cured_models_and_compares_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["demo", "--layers", "2", "3", "--steps", "12", "--output", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    rows = captured.out.partition("verdict\n")[2].splitlines()[:3]
    assert [row.split()[0] for row in rows] == ["2", "3", "3"]
    assert rows[2].split()[1] == "rezero"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("2-layers", "3-layers", "3-layers-cured"))
    assert "loss_type" not in captured.err


def test_the_demo_refuses_an_unknown_patch_before_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "did you mean 'rezero'?" in _failure(["demo", "--patch", "rezro", "--output", str(tmp_path)], capsys)
    assert not list(tmp_path.iterdir())
