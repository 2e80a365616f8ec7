"""What is lost when tokens do not fit: pure functions on lists of ids.

These are PaddleNLP's rules (and their golden cases) with one defect mended: where no room is left for
an answer, the caller gets an empty one and drops the row, instead of a row that is too long. Which rule
applies when is decided by `templates.py` and `encode.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

Ids = list[int]


def cut_source(
    ids: Ids, limit: int | None, prefix: Sequence[int] = (), suffix: Sequence[int] = ()
) -> Ids:
    """Prefix + source + suffix in at most `limit` tokens. The oldest tokens of the source are lost; the
    special tokens around it count but survive."""
    if limit is not None:
        ids = last(ids, limit - len(prefix) - len(suffix))
    return [*prefix, *ids, *suffix]


def cut_answer(answer: Ids, room: int) -> Ids:
    """The answer's first `room` tokens. An answer that ends in EOS loses it first: it keeps it only
    when it fits whole."""
    return answer[: max(room, 0)]


def keep_rounds(sizes: Sequence[int], room: int) -> int:
    """How many rounds fit into `room`, counted from the last one backwards without a gap."""
    kept = 0
    for size in reversed(sizes):
        room -= size
        if room < 0:
            break
        kept += 1
    return kept


def fit_rounds(
    head: int, rounds: Sequence[tuple[Ids, Ids]], source_length: int | None, length: int
) -> list[tuple[Ids, Ids]]:
    """The (prompt, answer) rounds that are kept after a head (system) of `head` tokens.

    Whole rounds from the last backwards. When even the last does not fit, it alone is kept: the *first*
    source_length - head tokens of its prompt, then as much of its answer as has room (maybe none).
    """
    room = length - head
    kept = keep_rounds([len(p) + len(a) for p, a in rounds], room)
    if kept:
        return list(rounds[-kept:])
    prompt, answer = rounds[-1]
    if source_length is not None:
        prompt = prompt[: max(source_length - head, 0)]
    return [(prompt, cut_answer(answer, room - len(prompt)))]


def last(ids: Ids, count: int) -> Ids:
    """The last `count` ids; none for count <= 0 (where ids[-0:] would be all)."""
    return ids[max(len(ids) - max(count, 0), 0) :]
