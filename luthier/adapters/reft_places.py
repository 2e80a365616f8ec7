"""Which tokens ReFT edits: the first and the last ones of the prompts in the rows of a batch.

Where prompts lie is found by `reft.py`. Under context parallelism a rank has some columns of the rows only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from luthier.adapters.calls import Prompt


class Places(NamedTuple):
    """The tokens to edit: `index` into the flattened [B*S], part after part, each part row after row."""

    index: Tensor  # [N]
    counts: tuple[tuple[int, ...], ...]  # [parts][B]: how many tokens
    chosen: tuple[
        tuple[Chosen | None, ...], ...
    ] = ()  # [parts][B]: which of a row's, if not all are here


class Chosen(NamedTuple):
    """Some of `number` tokens: the piece x [1, n, D] of [1, number, D]."""

    index: list[int]
    number: int

    def of(self, whole: Tensor) -> Tensor:
        return whole[:, self.index]

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (shape[0], self.number, *shape[2:])


def find_positions(positions: str, length: int) -> tuple[range, range]:
    """First and last positions (`f7+l7`) of a prompt of `length` tokens; they never overlap."""
    first, last = (min(number, length // 2) for number in numbers_of(positions))
    return range(first), range(length - last, length)


def find_rows(
    parts: Iterable[str], positions: str, prompts: Iterable[Prompt], num_rows: int, width: int
) -> list[list[list[int]]]:
    """[parts][rows] -> the tokens to edit among the row's `width` ones, those of its prompts in turn."""
    found: dict[str, list[list[int]]] = {part: [[] for _ in range(num_rows)] for part in parts}
    for prompt in prompts:
        first, last = find_positions(positions, prompt.length)
        for part, rows in found.items():
            ranges = {"first": (first,), "last": (last,), "both": (first, last)}[part]
            tokens = (prompt.start + i for some in ranges for i in some)
            rows[prompt.row] += [i for i in tokens if 0 <= i < width]  # not those that are cached
    return list(found.values())


def on_rank(
    rows: list[list[list[int]]], places: list[dict[int, int]]
) -> tuple[list[list[list[int]]], tuple[tuple[Chosen, ...], ...]]:
    """What of `find_rows` a context-parallel rank has: where it has it, and which of the found ones these are."""
    here, chosen = [], []
    for part in rows:
        both = list(zip(part, places, strict=True))
        here.append([[at[i] for i in found if i in at] for found, at in both])
        kept = [[n for n, i in enumerate(found) if i in at] for found, at in both]
        chosen.append(tuple(map(Chosen, kept, map(len, part))))
    return here, tuple(chosen)


def numbers_of(positions: str) -> tuple[int, int]:
    """`f7+l3` -> (7, 3); (0, 0) for `all`."""
    found = {kind: int(number) for kind, number in re.findall(r"([fl])(\d+)", positions)}
    return found.get("f", 0), found.get("l", 0)
