"""Coordinates, ticks, labels and smoothing of the report's curves."""

from __future__ import annotations

import math

import pytest

from luthier.train.chart import MOST_POINTS, Series, draw, label, smooth, thin, ticks


@pytest.mark.parametrize(
    ("low", "high", "number", "wanted"),
    [
        (1.61, 3.44, 5, [1.5, 2.0, 2.5, 3.0, 3.5]),
        (0.0, 3e-4, 3, [0.0, 1e-4, 2e-4, 3e-4]),
        (0.0, 1.0, 5, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.6, 1.1, 5, [0.6, 0.7, 0.8, 0.9, 1.0, 1.1]),  # 1.1 / 0.1 is above 11 in floats
        (2.0, 2.0, 5, [1.8, 1.9, 2.0, 2.1, 2.2]),
        (0.0, 0.0, 5, [-1.0, -0.5, 0.0, 0.5, 1.0]),
    ],
)
def test_ticks_are_round_and_enclose(low, high, number, wanted) -> None:
    assert ticks(low, high, number) == pytest.approx(wanted, abs=1e-12)


def test_whole_ticks() -> None:
    assert ticks(0, 3, 8, whole=True) == [0, 1, 2, 3]
    assert ticks(7, 7, 8, whole=True) == [6, 7, 8]


def test_labels() -> None:
    shown = [label(x) for x in (0, 2.5, 0.031, 3e-5, 1.25e-4, 12000, -0.5)]
    assert shown == ["0", "2.5", "0.031", "3e-5", "1.25e-4", "12,000", "-0.5"]


def test_smooth_is_unbiased_at_the_start() -> None:
    assert smooth([]) == []
    flat = smooth([(i, 2.0) for i in range(50)])
    assert [y for _, y in flat] == pytest.approx([2.0] * 50)
    assert [y for _, y in smooth([(0, 1.0), (1, 2.0)])] == pytest.approx([1.0, 2.8 / 1.8])


def test_thin_keeps_spikes_and_order() -> None:
    points = [(float(i), 1.0 + 1e-3 * math.sin(i)) for i in range(50_000)]
    points[31_415] = (31_415.0, 99.0)
    kept = thin(points)
    assert len(kept) <= MOST_POINTS + 1
    assert (31_415.0, 99.0) in kept
    assert kept == sorted(kept)
    assert thin(points[:10]) == points[:10]


def test_draw_places_points() -> None:
    chart = draw("t", "y", [Series("a", "raw", [(0, 0.0), (10, 1.0)])], width=860, height=320)
    assert chart is not None
    assert chart.lines == [("raw", f"M{chart.left},{chart.bottom} {chart.right},{chart.top}")]
    assert chart.y_ticks[0] == (chart.bottom, "0") and chart.y_ticks[-1] == (chart.top, "1")
    assert chart.x_ticks[0] == (chart.left, "0") and chart.x_ticks[-1] == (chart.right, "10")


def test_draw_one_point_and_none() -> None:
    assert draw("t", "y", [Series("a", "raw", [])]) is None
    chart = draw("t", "y", [Series("a", "raw", [(1, 2.0)])])
    assert chart is not None and chart.lines == []
    [(style, x, y, text)] = chart.dots
    assert style == "raw" and text == "a at step 1: 2"
    assert chart.left <= x <= chart.right and chart.top < y < chart.bottom
