import struct
import zlib
from pathlib import Path

import numpy as np

from hf_gradguard.report import write_comparison, write_report
from tests.report import synthetic


def _chunks(data: bytes) -> dict[bytes, bytes]:
    """The parts of a PNG by type, each with its checksum verified."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    found, place = {}, 8
    while place < len(data):
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + 8 + size]
        (checksum,) = struct.unpack(">I", data[place + 8 + size : place + 12 + size])
        assert zlib.crc32(kind + body) == checksum
        found[kind] = found.get(kind, b"") + body
        place += 12 + size
    return found


def _size_and_colors(path: Path) -> tuple[int, int, int]:
    chunks = _chunks(path.read_bytes())
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    pixels = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8)
    return width, height, len(np.unique(pixels))


def test_the_picture_of_a_run_is_a_png_with_drawings(tmp_path: Path):
    run = synthetic.write(tmp_path, synthetic.vanishing(60, 24), losses=synthetic.losses(60, 3.0))
    write_report(run, tmp_path / "report.html", tmp_path / "report.png")

    width, height, colors = _size_and_colors(tmp_path / "report.png")
    assert 1400 < width < 2000
    assert 2500 < height < 4500
    assert colors > 50


def test_the_picture_of_a_comparison_is_no_wider_than_that_of_a_run(tmp_path: Path):
    runs = [
        synthetic.write(tmp_path / str(layers), synthetic.healthy(40, layers), losses=synthetic.losses(40, 2.0))
        for layers in (4, 12, 30, 8)
    ]
    write_comparison(runs, tmp_path / "compare.html", tmp_path / "compare.png")

    width, height, colors = _size_and_colors(tmp_path / "compare.png")
    assert 1400 < width < 2100
    assert 2500 < height < 5500
    assert colors > 50


def test_a_run_without_windows_gets_a_picture_that_says_so(tmp_path: Path):
    run = synthetic.write(tmp_path, synthetic.healthy(0), status=None, weights=False)
    write_report(run, tmp_path / "report.html", tmp_path / "report.png")

    _, height, colors = _size_and_colors(tmp_path / "report.png")
    assert 50 < height < 500
    assert colors > 10
