"""Megatron-style token files: those of Megatron's own code are read, ours are theirs byte by byte.

The files in tests/golden/data/megatron were made by scripts/golden/megatron_tokens.py.
"""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.data import indexed
from luthier.data.indexed import TokenFile, find_prefixes, read_facts, write_tokens
from luthier.errors import Failed, Refused

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "data" / "megatron"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text("utf-8"))
TEXT = ("small", "large", "several")


def documents_of(file: TokenFile) -> list[list[int]]:
    return [file.tokens[file.start(d) : file.start(d + 1)].tolist() for d in range(len(file))]


def given(name: str) -> list[list[int]]:
    """The documents that Megatron's builder was given, their sequences joined."""
    return [[i for sequence in d for i in sequence] for d in EXPECTED[name]["documents"]]


@pytest.mark.parametrize("name", TEXT)
def test_megatrons_files_are_read(name: str) -> None:
    file = TokenFile(GOLDEN / name)
    assert file.tokens.dtype.name == EXPECTED[name]["dtype"]
    assert documents_of(file) == given(name)
    total = len(file.tokens)
    starts = [file.start(d) for d in range(len(file))]
    for start, stop in ((0, total), (1, 9), (starts[1], total), (starts[1] - 1, starts[2] + 1)):
        assert list(file.borders(start, stop)) == [s for s in starts if start < s < stop]


@pytest.mark.parametrize("name", ["small", "large"])
def test_ours_are_megatrons_byte_by_byte(name: str, tmp_path: Path) -> None:
    documents = given(name)
    made = write_tokens(tmp_path / "x.v1", documents, EXPECTED[name]["vocab_size"], {"a": 1})
    assert made == len(documents)
    for suffix in (".bin", ".idx"):
        ours = indexed.with_suffix(tmp_path / "x.v1", suffix).read_bytes()
        assert ours == (GOLDEN / f"{name}{suffix}").read_bytes()
    assert read_facts(tmp_path / "x.v1") == {"a": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.v1.bin", "x.v1.idx", "x.v1.json"]
    with pytest.raises(Refused, match="there already"):
        write_tokens(tmp_path / "x.v1", documents, 320, {})


def test_empty_documents_have_no_border(tmp_path: Path) -> None:
    write_tokens(tmp_path / "x", [[], [3, 4], [], [], [5], []], 320, {})
    file = TokenFile(tmp_path / "x")
    assert documents_of(file) == [[], [3, 4], [], [], [5], []]
    assert list(file.borders(0, 3)) == [2]


def test_where_files_are_found(tmp_path: Path) -> None:
    for name in ("b", "sub/a.v2"):
        write_tokens(tmp_path / name, [[3, 4]], 320, {})
    (tmp_path / ".partial-sub").mkdir()
    (tmp_path / ".partial-sub" / "c.idx").write_bytes(b"")
    both = [tmp_path / "b", tmp_path / "sub" / "a.v2"]
    assert find_prefixes(tmp_path) == both
    assert [find_prefixes(tmp_path / n) for n in ("b", "b.bin", "b.idx")] == [[both[0]]] * 3
    assert find_prefixes(tmp_path / "sub" / "a.v2") == [both[1]]
    assert find_prefixes(tmp_path / "rows.jsonl") == []


def changed(path: Path, at: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(bytes(data))


def word(value: int) -> bytes:
    return np.int64(value).tobytes()


HEAD = 34
BROKEN: dict[str, tuple[Any, str]] = {
    "no data": (lambda b, i: b.unlink(), "x.bin is missing"),
    "no index": (lambda b, i: i.unlink(), "x.idx is missing"),
    "half an index": (lambda b, i: i.write_bytes(i.read_bytes()[:-5]), "177 bytes; 7 sequences"),
    "half a header": (lambda b, i: i.write_bytes(b"MMID"), "does not begin as an index"),
    "an empty index": (lambda b, i: i.write_bytes(b""), "does not begin as an index"),
    "another file": (lambda b, i: i.write_bytes(b"PK" + bytes(90)), "does not begin as an index"),
    "the older form": (lambda b, i: changed(i, 0, b"TNTIDX\0\0"), "without memory mapping"),
    "another version": (lambda b, i: changed(i, 9, word(2)), "version 2"),
    "floats": (lambda b, i: changed(i, 17, b"\x06"), "floats, not token ids"),
    "an unknown type": (lambda b, i: changed(i, 17, b"\x63"), "type code 99"),
    "half the data": (lambda b, i: b.write_bytes(b.read_bytes()[:-2]), "its index tells of 310"),
    "an odd byte": (lambda b, i: b.write_bytes(b.read_bytes()[:-1]), "no multiple of 2"),
    "no data at all": (lambda b, i: b.write_bytes(b""), "0 bytes"),
    "a wrong length": (lambda b, i: changed(i, HEAD, b"\x0e"), "sequence 1 of x.idx"),
    "a negative length": (lambda b, i: changed(i, HEAD + 3, b"\xff"), "sequence 0 of x.idx"),
    "a wrong offset": (lambda b, i: changed(i, HEAD + 4 * 7 + 8, word(28)), "sequence 1 of x.idx"),
    "borders behind the end": (lambda b, i: changed(i, 182 - 8, word(9)), "do not cover"),
    "borders backwards": (lambda b, i: changed(i, 182 - 16, word(2)), "go backwards"),
    "more than is told": (lambda b, i: i.write_bytes(i.read_bytes() + b"12"), "184 bytes"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_are_not_whole_are_refused(case: str, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(GOLDEN / f"small{suffix}", tmp_path / f"x{suffix}")
    spoil, words = BROKEN[case]
    spoil(tmp_path / "x.bin", tmp_path / "x.idx")
    with pytest.raises(Refused, match=words):
        TokenFile(tmp_path / "x")


def test_multimodal_files_are_refused() -> None:
    with pytest.raises(Refused, match="multimodal"):
        TokenFile(GOLDEN / "modes")


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(indexed, "sync", full)
    with pytest.raises(Failed, match="No space left"):
        write_tokens(tmp_path / "x", [[3, 4]], 320, {})
    assert list(tmp_path.iterdir()) == []
