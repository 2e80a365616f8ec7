"""Packing: every example exactly once, no row too long, `best` wastes little, streaming equals packing."""

from __future__ import annotations

import math
import random
import time

import pytest

from luthier.data.packing import GREEDY_BUFFER, STREAM_BUFFER, Method, pack, stream

METHODS: tuple[Method, ...] = ("none", "sequential", "greedy", "best")


def random_lengths(seed: int) -> tuple[list[int], int]:
    draw = random.Random(seed)
    length = draw.choice([1, 2, 7, 64, 300, 1024])
    top = draw.choice([1, length // 3 + 1, length, 2 * length])
    return [draw.randint(1, top) for _ in range(draw.choice([0, 1, 3, 40, 700, 1200]))], length


def padding(lengths: list[int], rows: list[list[int]], width: int) -> float:
    return 1 - sum(lengths[i] for row in rows for i in row) / (len(rows) * width)


@pytest.mark.parametrize("method", METHODS)
def test_every_example_once_and_no_row_too_long(method: Method) -> None:
    for seed in range(60):
        lengths, length = random_lengths(seed)
        rows = pack(lengths, length, method)
        assert sorted(i for row in rows for i in row) == [
            i for i, n in enumerate(lengths) if n <= length
        ]
        assert all(0 < sum(lengths[i] for i in row) <= length for row in rows)
        assert all(row == sorted(row) for row in rows)
        assert rows == pack(lengths, length, method)


def test_a_later_buffer_of_greedy_never_fills_an_earlier_row() -> None:
    lengths = [6] * GREEDY_BUFFER + [4]
    rows = pack(lengths, 10, "greedy")
    assert rows[-1] == [GREEDY_BUFFER]


@pytest.mark.parametrize("length", [1024, 2048, 4096])
@pytest.mark.parametrize("spread", ["alike", "mixed", "short"])
def test_best_wastes_at_most_one_percent(length: int, spread: str) -> None:
    draw = random.Random(1)
    match spread:
        case "alike":  # AdvertiseGen's shape: about three in 1,024 tokens
            lengths = [max(150, min(620, round(draw.gauss(329, 65)))) for _ in range(4000)]
        case "mixed":  # Alpaca's
            lengths = [min(length, 45 + round(draw.lognormvariate(4.6, 0.9))) for _ in range(4000)]
        case _:
            lengths = [draw.randint(5, 60) for _ in range(4000)]
    rows = pack(lengths, length, "best")
    assert len(rows) <= 1.01 * math.ceil(
        sum(lengths) / length
    )  # the number that no method can beat
    longest = max(sum(lengths[i] for i in row) for row in rows)
    assert padding(lengths, rows, longest) < 0.01


def test_best_makes_rows_even_when_their_number_cannot_fall() -> None:
    draw = random.Random(1)
    lengths = [draw.randint(20, 300) for _ in range(60)]
    rows = pack(lengths, 4096, "best")
    longest = max(sum(lengths[i] for i in row) for row in rows)
    assert padding(lengths, rows, 4096) > 0.1  # there is a last row that cannot be filled
    assert padding(lengths, rows, longest) < 0.01


def test_best_fills_rows_by_one_two_or_three_more() -> None:
    assert pack([60, 37, 40, 30, 3, 20, 10], 100, "best") == [[0, 2], [1, 3, 4, 5, 6]]
    assert pack([50, 25, 25, 40, 20, 20, 20], 100, "best") == [[0, 1, 2], [3, 4, 5, 6]]
    # best fit decreasing begins with 40 + 40 and ends with three rows
    assert len(pack([40, 40, 30, 30, 30, 30], 100, "best")) == 2


def test_best_is_quick_on_many_examples() -> None:
    draw = random.Random(0)
    lengths = [5 + min(2000, int(draw.lognormvariate(5, 0.8))) for _ in range(100_000)]
    begin = time.process_time()
    rows = pack(lengths, 2048, "best")
    assert time.process_time() - begin < 10  # measured: 0.3 s
    assert padding(lengths, rows, 2048) < 0.001


def test_an_example_without_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="without tokens"):
        pack([3, 0], 10, "best")


@pytest.mark.parametrize("method", ["none", "sequential", "greedy"])
def test_streaming_gives_the_rows_of_packing(method: Method) -> None:
    draw = random.Random(3)
    for count in (0, 1, GREEDY_BUFFER, GREEDY_BUFFER + 1, STREAM_BUFFER, 2 * STREAM_BUFFER + 7):
        lengths = [draw.randint(1, 80) for _ in range(count)]
        buffers = list(stream(range(count), 64, method, lengths.__getitem__))
        assert [row for rows in buffers for row in rows] == pack(lengths, 64, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_stream_can_begin_again_at_any_buffer_and_holds_only_one(method: Method) -> None:
    draw = random.Random(4)
    lengths = [draw.randint(1, 60) for _ in range(2 * STREAM_BUFFER + 900)]
    read = 0

    def items():
        nonlocal read
        for i in range(len(lengths)):
            read += 1
            yield i

    buffers, done = [], 0
    for rows in stream(items(), 64, method, lengths.__getitem__):
        buffers.append(rows)
        done += sum(map(len, rows))
        assert read - done <= 1  # nothing was held back but the item that begins the next buffer
    assert len(buffers) >= 3
    assert sorted(i for rows in buffers for row in rows for i in row) == list(range(len(lengths)))
    first = sum(map(len, buffers[0]))
    again = stream(range(first, len(lengths)), 64, method, lengths.__getitem__)
    assert list(again) == buffers[1:]
