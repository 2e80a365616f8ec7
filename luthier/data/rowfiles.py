"""One file (or table) of raw rows with random access: JSON lines, JSON arrays, Parquet, Arrow, hub.

JSON files are indexed once, 8 bytes a row (arrays 16), and a row is read from the disk when it is asked
for. Tables go through the optional package `datasets`, which maps them into memory. Which files belong
to a data set is decided in `sources.py`, what a row means in `formats.py`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from luthier.errors import Refused, need

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow")
DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\r\n]*")
BOM = b"\xef\xbb\xbf"
BLOCK = 1 << 16  # bytes read at once of rows that follow each other
CHUNK = 1 << 24  # bytes read at a time while looking for line ends
SHORT = 16  # only lines of at most this many bytes are looked at for being blank


class Unreadable(Exception):
    """A row that is not a JSON object. `place` is "file:line[:column]", `reason` one clause."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(place, reason)
        self.place, self.reason = place, reason


class Rows(Protocol):
    """Rows of one file. `row(i)` is the row and its place, "file:line"; it raises `Unreadable`."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> tuple[dict[str, Any], str]: ...


class JsonRows:
    """Rows of a JSON file by byte offsets."""

    def __init__(
        self, path: Path, starts: np.ndarray, lines: np.ndarray | None, *, array: bool
    ) -> None:
        self.path, self.name = path, str(path)
        self.starts = starts  # int64 [n + 1]; row i lies in bytes starts[i] to starts[i + 1]
        self.lines = lines  # int64 [n], 1-based; None where row i is line i + 1
        self.array = array  # elements of one array: a comma or bracket may follow a row
        self._block = (0, b"")  # bytes read last, and where they lie
        self._next = -1  # the byte behind the row read last

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> tuple[dict[str, Any], str]:
        start, stop = int(self.starts[index]), int(self.starts[index + 1])
        data = self._bytes(start, stop)
        line = index + 1 if self.lines is None else int(self.lines[index])
        text = _decode(self.path, data, line, start).rstrip()  # an error stays on its line
        value, end = _parse(self.path, text, _skip(text, 0), line)
        if not self.array and text[end:].strip():
            column = end + len(text[end:]) - len(text[end:].lstrip()) + 1
            raise Unreadable(
                f"{self.path}:{line}:{column}",
                f"malformed JSON: more text after the row, near {_near(text, column - 1)}",
            )
        place = f"{self.name}:{line}"
        if not isinstance(value, dict):
            raise Unreadable(place, f"the row is {type(value).__name__}, not an object {{...}}")
        if "\\ud" in text or "\\uD" in text:
            _check_surrogates(value, place)
        return value, place

    def _bytes(self, start: int, stop: int) -> bytes:
        """A part of the file. Of rows that are asked for one after the other many are read at once."""
        begin, block = self._block
        if not begin <= start <= stop <= begin + len(block):
            size = max(stop - start, BLOCK) if start == self._next else stop - start
            # opened each time: safe in threads and forked processes, and cheap beside tokenising
            with FileIO(self.name) as handle:
                handle.seek(start)
                begin, block = self._block = start, handle.read(size)
        self._next = stop
        return block[start - begin : stop - begin]


class TableRows:
    """Rows of a table of the package `datasets`."""

    def __init__(self, name: str, table: Any) -> None:
        self.name, self.table = name, table

    def __len__(self) -> int:
        return len(self.table)

    def row(self, index: int) -> tuple[dict[str, Any], str]:
        return self.table[index], f"{self.name}:row {index + 1}"


def open_file(path: Path) -> Rows:
    """Rows of one file. Raises `Refused` where it is empty, no such file or malformed as a whole."""
    if path.suffix.lower() not in SUFFIXES:
        raise Refused(
            f"data was to be read from {path}",
            f"'{path.suffix or path.name}' is not one of {', '.join(SUFFIXES)}",
            "convert it to JSON lines: one object per line",
        )
    try:
        if path.suffix.lower() in (".parquet", ".arrow"):
            rows: Rows = _open_table(path)
        else:
            rows = _open_json(path)
    except Unreadable as bad:
        raise Refused(f"reading {path}", f"{bad.place}: {bad.reason}", "correct the file") from bad
    except OSError as error:
        raise Refused(f"reading {path}", error.strerror or str(error)) from error
    if len(rows) == 0:
        raise Refused(f"reading {path}", "the file holds no rows", "give a file with rows")
    return rows


def open_disk(folder: Path, aliases: Sequence[str], required: bool) -> list[Rows]:
    """A folder written by `save_to_disk`: one table (training data), or a dictionary of splits."""
    with _datasets(f"the data set folder {folder}") as datasets:
        found = datasets.load_from_disk(str(folder))
    if not isinstance(found, dict):
        return [TableRows(str(folder), found)] if required else []
    name = _first(aliases, list(found), str(folder), required)
    return [TableRows(f"{folder}/{name}", found[name])] if name else []


def open_hub(name: str, aliases: Sequence[str], required: bool) -> list[Rows]:
    """A split of a data set of the hub, `owner/name[:subset]`; empty where it lacks a split not required."""
    path, _, subset = name.partition(":")
    with _datasets(
        f"the data set '{name}' of the hub (there is no such local file or folder)"
    ) as datasets:
        splits = datasets.get_dataset_split_names(path, subset or None)
        split = _first(aliases, splits, name, required)
        table = datasets.load_dataset(path, subset or None, split=split) if split else None
    return [] if table is None else [TableRows(f"{name}/{split}", table)]


def _first(aliases: Sequence[str], names: Sequence[str], where: str, required: bool) -> str | None:
    found = next((alias for alias in aliases if alias in names), None)
    if found is None and required:
        raise Refused(
            f"the {aliases[0]} part of {where} was looked for",
            f"it has: {', '.join(names)}",
            "save or choose a part of that name",
        )
    return found


def _open_table(path: Path) -> Rows:
    with _datasets(str(path)) as datasets:
        kind = path.suffix.lower().removeprefix(".")
        table = datasets.load_dataset(kind, data_files=[str(path)], split="train")
    return TableRows(str(path), table)


@contextmanager
def _datasets(what: str) -> Iterator[ModuleType]:
    """The package `datasets`, silenced; whatever it raises is refused with its first line."""
    try:
        import datasets
    except ImportError as error:
        raise need("datasets", "data", what) from error
    logger = logging.getLogger("datasets")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield datasets
    except Refused:
        raise
    except Exception as error:  # any of a dozen classes, of three packages
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refused(f"reading {what}", f"{type(error).__name__}: {said}") from error
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _open_json(path: Path) -> JsonRows:
    with path.open("rb") as handle:
        head = handle.read(4096)
    bom = len(BOM) if head.startswith(BOM) else 0
    first = head[bom:].lstrip()[:1]
    if first == b"[":
        return _index_array(path, bom)
    if first not in (b"{", b""):
        kind = "UTF-16, not UTF-8" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "neither [ nor {"
        raise Unreadable(
            f"{path}:1:1", f"malformed JSON: the file begins with {head[:12]!r}, {kind}"
        )
    return _index_lines(path, bom)


def _index_lines(path: Path, bom: int) -> JsonRows:
    ends = [np.zeros(0, dtype=np.int64)]
    size = 0
    with path.open("rb") as handle:
        while chunk := handle.read(CHUNK):
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + (size + 1))
            size += len(chunk)
        starts = np.concatenate([[bom], *ends, [size]])
        if len(starts) > 1 and starts[-2] == size:  # the last line ends in a newline
            starts = starts[:-1]
        blank = []
        for i in np.flatnonzero(np.diff(starts) <= SHORT):
            handle.seek(int(starts[i]))
            if not handle.read(int(starts[i + 1] - starts[i])).strip():
                blank.append(i)
    if not blank:
        return JsonRows(path, starts, None, array=False)
    kept = np.delete(np.arange(len(starts) - 1), blank)
    return JsonRows(path, np.append(starts[kept], size), kept + 1, array=False)


def _index_array(path: Path, bom: int) -> JsonRows:
    data = path.read_bytes()
    text = _decode(path, data[bom:], 1, bom)
    starts, lines = [], []
    at, offset, line = 0, bom, 1  # character, byte and line of the last row's start
    pos = _skip(text, text.index("[") + 1)
    more = text[pos : pos + 1] != "]"
    while more:
        offset += len(text[at:pos].encode())
        line += text.count("\n", at, pos)
        at = pos
        starts.append(offset)
        lines.append(line)
        _, end = _parse(path, text, pos, 1)
        pos = _skip(text, end)
        more = text[pos : pos + 1] == ","
        if more:
            pos = _skip(text, pos + 1)
    if text[pos : pos + 1] != "]" or _skip(text, pos + 1) != len(text):
        pos = pos if text[pos : pos + 1] != "]" else _skip(text, pos + 1)
        wrong = json.JSONDecodeError(
            "a comma, or the end of the array or file, was expected", text, pos
        )
        raise _malformed(path, wrong, 1)
    offsets = np.array([*starts, len(data)], dtype=np.int64)
    return JsonRows(path, offsets, np.array(lines, dtype=np.int64), array=True)


def _skip(text: str, pos: int) -> int:
    return SPACE.match(text, pos).end()  # pyright: ignore[reportOptionalMemberAccess]


def _decode(path: Path, data: bytes, line: int, start: int) -> str:
    """`data`, which lies at byte `start` on line `line` of the file, as text."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise Unreadable(
            f"{path}:{line}",
            f"byte {data[error.start]:#04x} at offset {start + error.start} of the file is not UTF-8; "
            "convert the file, e.g. `iconv -f GB18030 -t UTF-8 OLD > NEW`",
        ) from error


def _parse(path: Path, text: str, pos: int, line: int) -> tuple[Any, int]:
    """The value at `pos` of a text that begins on line `line`, and where it ends."""
    try:
        return DECODER.raw_decode(text, pos)
    except json.JSONDecodeError as error:
        raise _malformed(path, error, line) from error
    except RecursionError as error:
        raise Unreadable(f"{path}:{line}", "the row is nested too deeply") from error


def _malformed(path: Path, error: json.JSONDecodeError, line: int) -> Unreadable:
    place = f"{path}:{line + error.lineno - 1}:{error.colno}"
    alone = error.doc.strip()
    hint = "; each line must hold one whole object" if alone in ("{", "[") else ""
    return Unreadable(
        place, f"malformed JSON: {error.msg}, near {_near(error.doc, error.pos)}{hint}"
    )


def _near(text: str, pos: int, width: int = 24) -> str:
    excerpt = text[max(0, pos - width) : pos + width].strip()
    return repr(excerpt) if excerpt else "the end"


def _check_surrogates(value: Any, place: str) -> None:
    """Half of a surrogate pair is valid JSON but no text: a tokenizer cannot encode it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        wrong = error.object[error.start].encode("unicode_escape").decode()
        raise Unreadable(place, f"{wrong} is half of a surrogate pair, not a character") from error
