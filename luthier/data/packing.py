"""Examples -> rows: which documents share a row of `length` tokens.

Only lengths matter here; tensors are made in `loader.py`. Each method is deterministic, keeps every
example that fits exactly once and leaves out those longer than a row. `pack` sees all lengths at once;
`stream` works on any iterator and holds one buffer.

| method | rule |
|---|---|
| none | one example per row |
| sequential | in order; a row is closed by the first example that does not fit |
| greedy | PaddleNLP's: worst fit inside buffers of 500 kept examples |
| best | rows filled exactly where the lengths allow it: the least padding |
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Method = Literal["none", "sequential", "greedy", "best"]

GREEDY_BUFFER = 500  # fixed by the method; other sizes give other rows
TRIES = 40  # lengths tried as the longest of three
REPAIRS = 8  # times at most that loose rows are undone
WASTE = 0.002  # share of padding that is not worth a second look
STREAM_BUFFER = 2048  # examples held while streaming; larger packs tighter and starts later


def pack(lengths: Sequence[int] | Any, length: int, method: Method) -> list[list[int]]:
    """Rows as lists of indices into `lengths`; the sum of each row is at most `length` tokens.

    Indices longer than `length` are in no row. Inside a row documents stand in data order; rows are in
    the order in which they were opened (`best`: in the order of their first document).
    """
    sizes = [int(n) for n in lengths]
    if sizes and min(sizes) < 1:
        raise ValueError("an example without tokens cannot be packed")
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
    """Rows filled exactly where possible, then mended, then made even.

    Even: batches are padded to their longest row only. Where the one last row that cannot be filled counts
    (there are few rows), rows that all end at about the same length waste nothing.
    """
    rows = _tightest(sizes, kept, length)
    for turn in range(REPAIRS):
        if not _wasteful(sizes, rows, length):
            break
        loose, full = [], []
        for row in rows:
            (full if sum(map(sizes.__getitem__, row)) > 0.99 * length else loose).append(row)
        # loose rows are the left-overs, too much alike: as many full ones are undone with them
        step = max(len(full) // max(len(loose), 1), 1)
        undone = full[turn % step :: step][: len(loose)]
        again = _tightest(sizes, sorted(i for row in loose + undone for i in row), length)
        if len(again) >= len(loose) + len(undone):
            break
        gone = {row[0] for row in loose + undone}
        rows = [row for row in rows if row[0] not in gone] + again
    if _wasteful(sizes, rows, length) and len(rows) * WASTE < 1:
        low = max(-(-sum(sizes[i] for i in kept) // len(rows)), *(sizes[i] for i in kept)) - 1
        high = length
        while high - low > 1 + length // 512:
            middle = (low + high) // 2
            evener = _tightest(sizes, kept, middle)
            if len(evener) > len(rows):
                low = middle
            else:
                rows, high = evener, middle
    for row in rows:
        row.sort()
    return sorted(rows)


def _tightest(sizes: list[int], kept: list[int], length: int) -> list[list[int]]:
    """The better of two orders: longest first, or data order. Which one wins depends on how the lengths
    are spread."""
    rows = _exact_fit(sizes, sorted(kept, key=sizes.__getitem__, reverse=True), length)
    if _wasteful(sizes, rows, length):
        rows = min(rows, _exact_fit(sizes, kept, length), key=len)
    return rows


def _wasteful(sizes: list[int], rows: list[list[int]], length: int) -> bool:
    filled = sum(map(sizes.__getitem__, chain.from_iterable(rows)))
    return filled < (1 - WASTE) * len(rows) * length


def _exact_fit(sizes: list[int], order: list[int], length: int) -> list[list[int]]:
    """Each row: the first example left in `order`, then one, two or three that fill it exactly, or if
    there are none the longest that fits, and so on.

    Among exact fills the one of most equal lengths is taken: it leaves short examples, which fill gaps,
    for the end. Best fit decreasing, the usual method, uses them up early and wastes many times as much
    where lengths are alike. Sets of lengths are integers with one bit per length, so that all pairs of a
    sum are found by one shift: O(n length / 64).
    """
    stock: dict[int, list[int]] = {}  # length -> examples, the first in `order` on top
    for i in reversed(order):
        stock.setdefault(sizes[i], []).append(i)
    present = sum(1 << n for n in stock)
    mirror = sum(1 << (length - n) for n in stock)

    def pair(room: int) -> int:
        """The longer one of two lengths that add up to `room`, the most equal ones; else 0."""
        half = (room + 1) // 2
        sums = (present & (mirror >> (length - room))) >> half
        return half + (sums & -sums).bit_length() - 1 if sums else 0

    def triple(room: int) -> int:
        """The longest one of three lengths that add up to `room`, or 0."""
        third = -(-room // 3)
        longer = present >> third
        for _ in range(TRIES):
            if not longer:
                break
            n = third + (longer & -longer).bit_length() - 1
            longer &= longer - 1
            if n < room and pair(room - n):
                return n
        return 0

    rows: list[list[int]] = []
    used = bytearray(len(sizes))
    for first in order:
        if used[first]:
            continue
        room, row, n = length, [], sizes[first]
        while n:
            row.append(stock[n].pop())
            used[row[-1]] = True
            room -= n
            if not stock[n]:
                present ^= 1 << n
                mirror ^= 1 << (length - n)
            longest = present.bit_length() - 1
            if longest > room:
                longest = (present & ((2 << room) - 1)).bit_length() - 1  # of those that fit
            if longest < 1 or longest == room:
                n = max(longest, 0)
            elif room > 3 * longest:  # neither two nor three fill it
                n = longest
            else:
                n = pair(room) or triple(room) or longest
        rows.append(row)
    return rows
