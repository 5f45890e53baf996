import math
import re

import pytest

from tools.charts import (
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Curve,
    interval,
    line_chart,
    nice_ticks,
    number,
    threshold_chart,
)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 4, [0, 1, 2, 3, 4]),
        (8.9, 12.9, [8, 9, 10, 11, 12, 13]),
        (-2, 2, [-2, -1, 0, 1, 2]),
        (0.1, 0.9, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_ticks_are_round_and_enclose(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize("low", [1e-6, 0.31, -5.0, 12345.0, 0.0])
@pytest.mark.parametrize("span", [0.0, 1e-5, 0.7, 3.0, 1e4])
def test_ticks_hold_for_any_range(low, span):
    found = nice_ticks(low, low + span)
    slack = 1e-6 * (found[1] - found[0])
    assert found[0] <= low + slack
    assert found[-1] >= low + span - slack
    assert 2 <= len(found) <= 7


def test_a_curve_starts_left_and_ends_right_and_falls_when_its_values_fall():
    svg = line_chart([10, 20, 30], [3.0, 2.0, 1.0], title="loss")
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]*)"', svg)[1].split()]
    assert points[0][0] == LEFT
    assert points[-1][0] == WIDTH - RIGHT
    assert points[0][1] < points[1][1] < points[2][1]  # down the page
    assert all(TOP <= y <= HEIGHT for _, y in points)


def test_points_that_are_not_numbers_are_left_out():
    svg = line_chart([1, 2, 3], [1.0, math.nan, 2.0], title="x")
    assert "nan" not in svg
    assert len(re.search(r'points="([^"]*)"', svg)[1].split()) == 2
    assert line_chart([1], [math.inf], title="x") == ""


def test_titles_are_escaped():
    assert "<b>" not in line_chart([1, 2], [1, 2], title='<b>"')


def test_interval_lies_where_its_numbers_say():
    svg = interval(0.5, 0.25, 0.75)
    assert 'x1="50.0" x2="150.0"' in svg
    assert 'x1="100.0"' in svg


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12500, "12500"), (3.14159, "3.14"), (0.00042, "4.2e-4"), (0.002, "2e-3"), (7.0, "7"), (0.5, "0.5")],
)
def test_numbers_read_well(value, text):
    assert number(value) == text


def test_a_threshold_is_marked_where_it_lies_with_what_it_leaves():
    curves = [Curve("components", [(0.5, 10), (0.6, 20), (0.7, 40)]), Curve("leader", [(0.5, 15), (0.7, 40)], True)]
    svg = threshold_chart(curves, mark=(0.65, 33), title="left")
    assert "0.65: 33 left" in svg
    at = float(re.search(r'class="mark" x1="([\d.]+)"', svg)[1])
    first, *_, last = (float(p.split(",")[0]) for p in re.search(r'points="([^"]*)"', svg)[1].split())
    assert at == pytest.approx(first + 0.75 * (last - first), abs=0.1)
    assert svg.count("<polyline") == 2
    assert svg.count("dashed") == 1
    assert "mark" not in threshold_chart(curves, mark=(0.9, 50), title="left")
    assert threshold_chart([], mark=(0.5, 1), title="none") == ""
