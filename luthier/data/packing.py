"""Examples -> rows: which documents share a row of `length` tokens.

Only lengths matter here; tensors are made in `loader.py`. Each method is deterministic, keeps every
example that fits exactly once and leaves out those longer than a row. `pack` sees all lengths at once;
`stream` works on any iterator and holds one buffer.

| method | rule |
|---|---|
| none | one example per row |
| sequential | in order; a row is closed by the first example that does not fit |
| greedy | PaddleNLP's: worst fit inside buffers of 500 kept examples |
| best | best fit decreasing over all lengths: the least padding |
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Method = Literal["none", "sequential", "greedy", "best"]

GREEDY_BUFFER = 500  # fixed by the method; other sizes give other rows
STREAM_BUFFER = 4096  # examples held while streaming; larger packs tighter and starts later


def pack(lengths: Sequence[int] | Any, length: int, method: Method) -> list[list[int]]:
    """Rows as lists of indices into `lengths`; the sum of each row is at most `length` tokens.

    Indices longer than `length` are in no row. Inside a row documents stand in data order; rows are in
    the order in which they were opened (`best`: in the order of their first document).
    """
    sizes = [int(n) for n in lengths]
    kept = [i for i, n in enumerate(sizes) if n <= length]
    match method:
        case "none":
            return [[i] for i in kept]
        case "sequential":
            return _sequential(sizes, kept, length)
        case "greedy":
            chunks = (kept[i : i + GREEDY_BUFFER] for i in range(0, len(kept), GREEDY_BUFFER))
            return [row for chunk in chunks for row in _worst_fit(sizes, chunk, length)]
        case "best":
            return _best_fit(sizes, kept, length)


def stream(
    items: Iterable[T],
    length: int,
    method: Method,
    size: Callable[[T], int] = len,  # pyright: ignore[reportArgumentType]
) -> Iterator[list[list[T]]]:
    """Buffers of rows from an iterator, holding at most one buffer of items (and a row more).

    A buffer depends on nothing before it, so reading can start again at any buffer's first item. The
    rows of all buffers together are those of `pack` for every method but `best`, which here sees one
    buffer at a time.
    """
    limit = GREEDY_BUFFER if method == "greedy" else STREAM_BUFFER
    held: list[T] = []
    fill = 0  # tokens in the open row of `sequential`
    for item in items:
        n = size(item)
        if n > length:
            continue
        opens = fill + n > length
        if len(held) >= limit and (opens or method != "sequential"):
            yield _rows(held, length, method, size)
            held, fill = [], 0
            opens = True
        fill = n if opens else fill + n
        held.append(item)
    if held:
        yield _rows(held, length, method, size)


def _rows(held: list[T], length: int, method: Method, size: Callable[[T], int]) -> list[list[T]]:
    rows = pack([size(item) for item in held], length, method)
    return [[held[i] for i in row] for row in rows]


def _sequential(sizes: list[int], kept: list[int], length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room = -1
    for i in kept:
        if sizes[i] > room:
            rows.append([])
            room = length
        rows[-1].append(i)
        room -= sizes[i]
    return rows


def _worst_fit(sizes: list[int], chunk: list[int], length: int) -> list[list[int]]:
    """Each example goes to the row with the most room (the first on ties), or opens a new one."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (-room, row): the heap's head has the most room
    for i in chunk:
        if rooms and -rooms[0][0] >= sizes[i]:
            room, row = rooms[0]
            heapq.heapreplace(rooms, (room + sizes[i], row))
        else:
            row = len(rows)
            rows.append([])
            heapq.heappush(rooms, (sizes[i] - length, row))
        rows[row].append(i)
    return rows


def _best_fit(sizes: list[int], kept: list[int], length: int) -> list[list[int]]:
    """Best fit decreasing: longest first, each into the fullest row that still takes it.

    Open rows lie in stacks by their room; an integer's bits say which stacks hold one, so the tightest
    fit is the lowest set bit above the example's length. O(n log n + n length / 64).
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]
    occupied = 0
    for i in sorted(kept, key=lambda i: (-sizes[i], i)):
        fits = occupied >> sizes[i]
        if fits:
            room = sizes[i] + (fits & -fits).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                occupied ^= 1 << room
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(i)
        by_room[room - sizes[i]].append(row)
        occupied |= 1 << (room - sizes[i])
    for row_items in rows:
        row_items.sort()
    return sorted(rows)
