"""Megatron-style token files: `NAME.bin` holds ids end to end, `NAME.idx` where sequences and documents lie.

PaddleNLP, Megatron-LM and others read and write the same two files; so do we, also for our own shards. Both
are mapped into memory, so opening costs the index' header and a check of its arrays, and a read is a
slice. A file `NAME.json` beside them may record the tokenizer (`read_facts`); foreign ones have none.
Layout of the index, little-endian: magic, version 1 (u64), type code (u8), number of sequences and of
document borders (u64 each), lengths (int32), byte offsets (int64), document borders (int64, in sequences).
"""

from __future__ import annotations

import json
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from luthier.errors import Failed, Refused
from luthier.files import PARTIAL, sync, write_json

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
FLOATS = (6, 7)  # type codes of the format that are no token ids
SMALL_VOCABULARY = 65500  # below it, ids are written in two bytes, as Megatron does
CHECKED = 1 << 20  # sequences whose index entries are checked at a time


class TokenFile:
    """The documents of one `.bin`/`.idx` pair. `tokens` are all ids [T], mapped; document d is tokens
    start(d) to start(d + 1). Raises Refused for a pair that is not whole."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.index, self.data = with_suffix(prefix, ".idx"), with_suffix(prefix, ".bin")
        for path in (self.index, self.data):
            if not path.is_file():
                raise self._refused(f"{path.name} is missing", "give both files, .bin and .idx")
        kind, count, borders = self._header()
        size = self.data.stat().st_size
        itemsize = np.dtype(kind).itemsize
        at = HEADER.size
        self._lengths = self._map(np.int32, at, count)
        self._offsets = self._map(np.int64, at := at + 4 * count, count)
        self._borders = self._map(np.int64, at + 8 * count, borders)
        self._itemsize = itemsize
        if size % itemsize or not size:
            raise self._refused(f"{self.data.name} has {size} bytes, no multiple of {itemsize}")
        self._check_offsets(size)
        self._check_borders(count)
        self.tokens = np.memmap(self.data, dtype=kind, mode="r")

    def __len__(self) -> int:
        return len(self._borders) - 1

    def start(self, document: int) -> int:
        """The first token of a document; of the one behind the last, the number of tokens."""
        if document >= len(self):
            return len(self.tokens)
        sequence = int(self._borders[document])
        if sequence == len(self._offsets):  # empty documents at the end
            return len(self.tokens)
        return int(self._offsets[sequence]) // self._itemsize

    def borders(self, start: int, stop: int) -> Iterator[int]:
        """The tokens behind `start` and before `stop` with which documents begin, ascending."""
        document = bisect_right(range(len(self)), start, key=self.start)
        last = start
        while document < len(self) and (at := self.start(document)) < stop:
            if at > last:  # an empty document begins where the next one does
                yield at
            last = at
            document += 1

    def _header(self) -> tuple[type[np.integer], int, int]:
        """Type of the ids, number of sequences and of document borders."""
        with self.index.open("rb") as handle:
            head = handle.read(HEADER.size)
        if head.startswith(OLD_MAGIC):
            raise self._refused(
                f"{self.index.name} is of the older form without memory mapping (data_impl=lazy)",
                "write it again with data_impl=mmap, or give the text itself",
            )
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise self._refused(f"{self.index.name} does not begin as an index of token files does")
        _, version, code, count, borders = HEADER.unpack(head)
        if version != 1 or (code not in CODES and code not in FLOATS):
            raise self._refused(f"{self.index.name} has version {version}, type code {code}")
        if code in FLOATS:
            raise self._refused(f"{self.index.name} says that it holds floats, not token ids")
        size, wanted = self.index.stat().st_size, HEADER.size + 12 * count + 8 * borders
        if size == wanted + count:
            raise self._refused(
                "it has a mode per sequence, as multimodal data has", "give text tokens"
            )
        if size != wanted or borders < 2 or not count:
            what = f"{count} sequences and {borders} document borders take {wanted} bytes"
            raise self._refused(f"{self.index.name} has {size} bytes; {what}")
        return CODES[code], count, borders

    def _map(self, kind: Any, offset: int, count: int) -> np.ndarray:
        return np.memmap(self.index, dtype=kind, mode="r", offset=offset, shape=(count,))

    def _check_offsets(self, size: int) -> None:
        """Sequences lie one behind the other and fill the data exactly."""
        end = 0
        for i in range(0, len(self._lengths), CHECKED):
            lengths = self._lengths[i : i + CHECKED].astype(np.int64)
            ends = end + np.cumsum(lengths * self._itemsize)
            begins = np.concatenate([[end], ends[:-1]])
            wrong = np.flatnonzero((lengths < 0) | (self._offsets[i : i + CHECKED] != begins))
            if len(wrong):
                raise self._refused(
                    f"sequence {i + int(wrong[0])} of {self.index.name} does not begin where the one "
                    "before it ends"
                )
            end = int(ends[-1])
        if end != size:
            raise self._refused(f"{self.data.name} has {size} bytes, its index tells of {end}")

    def _check_borders(self, count: int) -> None:
        if self._borders[0] != 0 or self._borders[-1] != count:
            raise self._refused(f"the documents of {self.index.name} do not cover its sequences")
        for i in range(0, len(self._borders), CHECKED):
            if (np.diff(self._borders[i : i + CHECKED + 1]) < 0).any():
                raise self._refused(f"the document borders of {self.index.name} go backwards")

    def _refused(self, found: str, do: str = "copy or write the files again") -> Refused:
        return Refused(f"the token files {self.prefix}", found, do)


class Writer:
    """Writes `NAME.bin` while documents are added, `NAME.idx` and `NAME.json` at the end of its `with` block.

    Without its index nobody takes a `.bin` for whole; to publish all of them at once is the caller's affair.
    """

    def __init__(self, prefix: Path, vocab_size: int, facts: dict[str, Any] | None = None) -> None:
        self.prefix, self.facts = prefix, facts
        self.code = 8 if vocab_size < SMALL_VOCABULARY else 4
        self._kind = np.dtype(CODES[self.code]).newbyteorder("<")
        self._lengths = array("i")
        self._handle = with_suffix(prefix, ".bin").open("wb")

    def add(self, ids: Any) -> None:
        """One document, ids [n]."""
        self._handle.write(np.asarray(ids).astype(self._kind).tobytes())
        self._lengths.append(len(ids))

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._handle.close()
        if kind is not None:
            return
        lengths = np.array(self._lengths, dtype="<i4")
        offsets = np.cumsum([0, *lengths[:-1]], dtype="<i8") * self._kind.itemsize
        borders = np.arange(len(lengths) + 1, dtype="<i8")
        head = HEADER.pack(MAGIC, 1, self.code, len(lengths), len(borders))
        with with_suffix(self.prefix, ".idx").open("wb") as handle:
            for part in (head, lengths.tobytes(), offsets[: len(lengths)].tobytes()):
                handle.write(part)
            handle.write(borders.tobytes())
        if self.facts is not None:
            write_json(with_suffix(self.prefix, ".json"), self.facts)


def write_tokens(
    prefix: Path, documents: Iterable[Any], vocab_size: int, facts: dict[str, Any]
) -> int:
    """Write documents, ids [n] each, as one pair of files, whole or not at all; gives their number.

    Raises Refused where there are such files already, Failed when the disk is full.
    """
    targets = [with_suffix(prefix, suffix) for suffix in (".bin", ".json", ".idx")]
    if old := [path.name for path in targets if path.exists()]:
        raise Refused(f"token files {prefix}", f"{old[0]} is there already", "give another name")
    partial = prefix.with_name(f"{PARTIAL}{prefix.name}")
    number = 0
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with Writer(partial, vocab_size, facts) as writer:
            for ids in documents:
                writer.add(ids)
                number += 1
        for path in targets:  # the index last: without it nobody believes the rest
            made = with_suffix(partial, path.suffix)
            sync(made)
            made.rename(path)
    except OSError as error:
        for path in targets:
            with_suffix(partial, path.suffix).unlink(missing_ok=True)
        raise Failed(
            f"writing the token files {prefix}",
            f"{error.strerror or error} ({type(error).__name__})",
            "free space or give another place",
        ) from error
    return number


def read_facts(prefix: Path) -> dict[str, Any]:
    """What `NAME.json` records of the token files; empty for foreign ones."""
    path = with_suffix(prefix, ".json")
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(
            f"the token files {prefix}", f"{path.name} cannot be read: {error}", "write them again"
        ) from error
    return found if isinstance(found, dict) else {}


def with_suffix(prefix: Path, suffix: str) -> Path:
    """`data.v1` -> `data.v1.bin`: a dot in the name is no suffix."""
    return prefix.with_name(prefix.name + suffix)


def find_prefixes(path: Path) -> list[Path]:
    """The token files at `path`: a `.bin` or `.idx` file, their common beginning, or a folder of them,
    searched through and sorted. Empty where there are none."""
    if path.is_dir():
        return sorted(p.with_suffix("") for p in path.rglob("*.idx") if not _partial(p, path))
    if path.suffix in (".bin", ".idx"):
        return [path.with_suffix("")]
    return [path] if with_suffix(path, ".idx").is_file() else []


def _partial(path: Path, root: Path) -> bool:
    """Whether it lies in a folder that is being written."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)
