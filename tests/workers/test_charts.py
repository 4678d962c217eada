"""Charts: round marks, one axis for all, and nothing lost that the eye would see."""

from __future__ import annotations

import math

import pytest

from workers.charts import Axis, Curve, Point, chart, round_ticks, thin, time_ticks


@pytest.mark.parametrize(
    ("most", "least", "ticks"),
    [
        (2.35, 0, [0, 0.5, 1, 1.5, 2, 2.5]),
        (0.3, 0, [0, 0.1, 0.2, 0.3]),
        (100, 0, [0, 20, 40, 60, 80, 100]),
        (2, 1, [0, 1, 2]),
        (0.00001, 0, [0, 2e-6, 4e-6, 6e-6, 8e-6, 1e-5]),
        (0, 0, [0, 1]),
    ],
)
def test_values_are_marked_at_round_numbers(most: float, least: float, ticks: list) -> None:
    assert round_ticks(most, least=least) == pytest.approx(ticks)


def test_marks_reach_what_is_drawn_for_any_value() -> None:
    for k in range(-300, 300):
        most = 1.07**k
        ticks = round_ticks(most)
        assert ticks[-2] < most <= ticks[-1] * (1 + 1e-9)
        assert 3 <= len(ticks) <= 6


@pytest.mark.parametrize(
    ("end", "unit", "shown"),
    [
        (0.5, "seconds", [0]),
        (50, "seconds", [0, 10, 20, 30, 40, 50]),
        (125, "seconds", [0, 30, 60, 90, 120]),
        (200, "minutes", [0, 1, 2, 3]),
        (9000, "minutes", [0, 30, 60, 90, 120, 150]),
        (5 * 3600, "hours", [0, 1, 2, 3, 4, 5]),
        (6 * 86400, "hours", [0, 24, 48, 72, 96, 120, 144]),
        (40 * 86400, "hours", [0, 168, 336, 504, 672, 840]),
    ],
)
def test_time_is_marked_as_clocks_show_it(end: float, unit: str, shown: list[float]) -> None:
    name, size, ticks = time_ticks(end)
    assert (name, [tick / size for tick in ticks]) == (unit, shown)


def test_a_long_line_is_a_mean_in_a_band_that_keeps_its_peaks() -> None:
    line = [(n / 1000, float(n % 2)) for n in range(100_000)]
    line[50_300] = (50.3, 9.0)
    line[70_200] = (70.2, -9.0)
    means, band = thin(line)
    assert len(means) == len(band) / 2 == 101
    assert means == sorted(means)
    assert all(y == pytest.approx(0.5, abs=0.02) for _, y in means)
    assert (max(y for _, y in band), min(y for _, y in band)) == (9, -9)
    assert thin(line[::1000]) == (line[::1000], [])
    points = [Point(x, 10 + y, 1) for x, y in line]
    assert len(chart("Loss", [Curve(0, points)], Axis(100.0))) < 30_000


def test_what_is_not_finite_is_left_out() -> None:
    points = [Point(0, 2.0, 1), Point(5, math.nan, 2), Point(10, 1.0, 3)]
    drawn = chart("Loss", [Curve(0, points)], Axis(10.0))
    assert "nan" not in drawn
    assert drawn.count(",") == 2
    assert chart("Loss", [Curve(0, [Point(0, math.inf, 1)])], Axis(10.0)) == ""


def test_counts_are_drawn_as_stairs() -> None:
    drawn = chart("N", [Curve(0, [Point(0, 1, 1), Point(10, 2, 2)])], Axis(10.0), whole=True)
    assert 'points="66.0,92.0 450.0,92.0 450.0,10.0"' in drawn


def test_an_axis_may_count_something_else_than_time() -> None:
    curve = Curve(0, [Point(0, 0.9, 0), Point(4, 0.2, 8)])
    drawn = chart("Error", [curve], Axis(4, unit="epochs"))
    assert ">epochs</text>" in drawn
    assert [f">{n}</text>" in drawn for n in range(5)] == [True] * 5
    assert "seconds" not in drawn
