"""A file that can't be trained on is told before it is read, with the place in it."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
from pathlib import Path

import pytest

from hf_gradguard.training import files

E_ACUTE = "é".encode()


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", "text"),
        ("a.TXT", "text"),
        ("a.text", "text"),
        ("a.csv", "csv"),
        ("a.tsv", "tsv"),
        ("a.json", "json"),
        ("a.jsonl", "json"),
        ("a.parquet", "parquet"),
        ("a.txt.gz", "text"),
        ("a.tsv.gz", "tsv"),
        ("2024.01.csv.bz2", "csv"),
        ("a.jsonl.ZST", "json"),
    ],
)
def test_what_is_in_a_file_is_told_by_its_ending(name: str, kind: str) -> None:
    assert files.kind_of([f"folder.d/{name}"]) == kind


@pytest.mark.parametrize("name", ["a", "a.foo", "a.gz", "folder.txt/a"])
def test_an_unknown_ending_is_told_with_those_that_are_known(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        files.kind_of(["a.txt", name])
    assert all(ending in str(caught.value) for ending in files.KINDS)


def test_files_of_several_kinds_are_told_apart() -> None:
    with pytest.raises(ValueError, match=r"a\.txt \(text\), b\.csv \(csv\)"):
        files.kind_of(["a.txt", "b.csv"])
    assert files.kind_of(["a.json", "b.jsonl"]) == "json"


@pytest.mark.parametrize("around", [0, files.CHUNK - 1, files.CHUNK, files.CHUNK + 1, 2 * files.CHUNK])
def test_the_first_byte_that_is_not_utf8_is_told_wherever_it_lies(tmp_path: Path, around: int) -> None:
    for before in range(max(0, around - 2), around + 2):
        data = b"a" * before + b"\xe9 and more"  # the é of Latin-1
        with pytest.raises(ValueError, match=r"byte ([\d,]+) is 0xe9") as caught:
            files.check([write(tmp_path / "a.txt", data)])
        found = re.search(r"byte ([\d,]+)", str(caught.value))
        assert found
        assert int(found[1].replace(",", "")) == before


@pytest.mark.parametrize("length", [2, 3, 4])
def test_a_character_across_the_border_of_two_chunks_is_read(tmp_path: Path, length: int) -> None:
    character = {2: "é", 3: "€", 4: "😀"}[length].encode()
    assert len(character) == length
    for inside in range(length + 1):
        files.check([write(tmp_path / "a.txt", b"a" * (files.CHUNK - inside) + character)])
        # The same, broken off after its first byte: the byte that is told is the one that begins it.
        broken = b"a" * (files.CHUNK - inside) + character[:1] + b"b"
        with pytest.raises(ValueError, match=f"byte {files.CHUNK - inside:,} is 0x{character[0]:02x}"):
            files.check([write(tmp_path / "a.txt", broken)])


def test_a_character_that_is_cut_off_at_the_end_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="byte 3 is 0xc3"):
        files.check([write(tmp_path / "a.txt", b"abc" + E_ACUTE[:1])])


@pytest.mark.parametrize(("encoding", "told"), [("latin1", "LATIN1"), ("utf-16", "UTF-16"), ("utf-16-le", "LATIN1")])
def test_the_remedy_names_the_encoding_that_is_seen(tmp_path: Path, encoding: str, told: str) -> None:
    with pytest.raises(ValueError, match=f"iconv -f {told} -t UTF-8"):
        files.check([write(tmp_path / "a.csv", "Zoë, Chloé".encode(encoding))])


def test_a_mark_of_byte_order_is_no_fault(tmp_path: Path) -> None:
    files.check([write(tmp_path / "a.txt", b"\xef\xbb\xbfabc")])


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_what_is_compressed_is_looked_into(tmp_path: Path, ending: str, pack) -> None:
    path = tmp_path / f"a.txt{ending}"
    files.check([write(path, pack("é text".encode()))])
    with pytest.raises(ValueError, match="byte 2 is 0xe9"):
        files.check([write(path, pack(b"ab\xe9"))])
    with pytest.raises(ValueError, match="nothing but blanks"):
        files.check([write(path, pack(b""))])
    with pytest.raises(ValueError, match=r"a\.txt\S+ can't be read"):
        files.check([write(path, b"not packed at all")])
    with pytest.raises(ValueError, match=r"a\.txt\S+ can't be read"):
        files.check([write(path, pack(b"cut off " * 100)[:-9])])


@pytest.mark.parametrize("data", [b" ", b"\n\n \t\r\n", b" \n"])
def test_a_file_of_blanks_is_told(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError, match="nothing but blanks"):
        files.check([write(tmp_path / "a.txt", data)])


def test_a_file_that_is_empty_or_missing_or_a_folder_is_told(tmp_path: Path) -> None:
    good = write(tmp_path / "good.txt", b"text")
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        files.check([good, write(tmp_path / "empty.txt", b"")])
    with pytest.raises(ValueError, match=r"there is no file '.*none\.txt'"):
        files.check([good, str(tmp_path / "none.txt")])
    with pytest.raises(ValueError, match="there is no file"):
        files.check([str(tmp_path)])


def test_of_a_stream_only_the_beginning_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK", 8)
    monkeypatch.setattr(files, "STREAM_HEAD", 16)
    path = write(tmp_path / "a.txt", b"a" * 16 + b"\xe9")
    files.check([path], streaming=True)
    with pytest.raises(ValueError, match="byte 16"):
        files.check([path])
    with pytest.raises(ValueError, match="byte 15"):
        files.check([write(tmp_path / "a.txt", b"a" * 15 + b"\xff")], streaming=True)


def test_what_parquet_holds_is_left_to_its_reader(tmp_path: Path) -> None:
    files.check([write(tmp_path / "a.parquet", b"PAR1\xe9\xff")])
