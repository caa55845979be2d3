"""Figures as people read them, and the values that axes name."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv import format
from pagedkv.sim.report import charts


@pytest.mark.parametrize(
    ("write", "value", "shown"),
    [
        (format.count, 12031, "12,031"),
        (format.round_count, 12031, "12,031"),
        (format.round_count, 182790, "183 k"),
        (format.short, 0, "0"),
        (format.short, 999.96, "1 k"),
        (format.short, 1500, "1.5 k"),
        (format.short, 999_500, "1 M"),
        (format.short, 145e6, "145 M"),
        (format.short, 2e16, "20 P"),
        (format.percent, 0, "0%"),
        (format.percent, 0.314159, "31.4%"),
        (format.percent, 0.00001, "<0.1%"),
        (format.percent, 0.99999, ">99.9%"),
        (format.percent, 1, "100%"),
        (format.share, 0.9, "90%"),
        (format.share, 0.995, "99.5%"),
        (format.points, 0.0, "±0.0"),
        (format.points, 0.0131, "+1.3"),
        (format.points, -0.0131, "−1.3"),
        (format.points, -0.00001, "−0.0"),
        (format.format_bytes, 0, "0 B"),
        (format.format_bytes, 2**29, "512 MiB"),
        (format.format_bytes, 2.5 * 2**30, "2.5 GiB"),
        (format.format_bytes, 2**60, "1,048,576 TiB"),
        (format.format_bytes, 1023, "1,023 B"),
        (format.format_bytes, 1024, "1 KiB"),
        (format.format_bytes, 64 * 2**20, "64 MiB"),
        (format.format_bytes, 6.25 * 2**30, "6.25 GiB"),
        (format.format_bytes, 518.4 * 2**30, "518 GiB"),
        (format.format_bytes, 5000 * 2**40, "5,000 TiB"),
        (format.digits, 0.004321, "0.00432"),
        (format.digits, 12.345, "12.3"),
        (format.digits, 12031.4, "12,031"),
        (format.flops, 0, "0 FLOP"),
        (format.flops, 1.5e21, "1.5 ZFLOP"),
        (functools.partial(format.short, giga="B"), 20.9e9, "20.9 B"),
        (format.duration, 0, "0 s"),
        (format.duration, 0.35, "350 ms"),
        (format.duration, 59.4, "59.4 s"),
        (format.duration, 59.99, "1 min"),
        (format.duration, 90, "1 min 30 s"),
        (format.duration, 3599.7, "1 h"),
        (format.duration, 7500, "2 h 5 min"),
        (format.duration, 86399, "1 d"),
        (format.duration, 100_000, "1 d 4 h"),
        (format.rough_duration, 126, "2.1 min"),
        (format.rough_duration, 0.5, "500 ms"),
        (format.rough_duration, 43200, "12 h"),
    ],
)
def test_figures_are_written_for_people(write, value, shown):
    assert write(value) == shown


@given(st.floats(0, 1e9))
def test_every_time_can_be_written(seconds):
    assert format.duration(seconds) and format.rough_duration(seconds)


@given(st.just(0.0) | st.floats(1e-12, 1e12))
def test_linear_ticks_begin_at_zero_and_reach_the_top(high):
    ticks = charts.linear_ticks(high)
    assert ticks[0] == 0 and ticks[-1] >= high * (1 - 1e-9)
    assert 2 <= len(ticks) <= 8
    assert ticks[-2] < high or high == 0 or len(ticks) == 2


@given(st.floats(0, 1))
def test_ticks_of_a_share_end_at_or_below_all(high):
    ticks = charts.ratio_ticks(high)
    assert high <= ticks[-1] * (1 + 1e-9) and ticks[-1] <= 1 + 1e-9


@given(st.floats(1e-3, 1e9), st.floats(1.5, 1e9), st.integers(3, 12))
def test_log_ticks_lie_inside_and_are_few(low, factor, most):
    high = low * factor
    ticks = charts.log_ticks(low, high, most)
    assert all(low * 0.99 <= tick <= high * 1.01 for tick in ticks)
    assert all(a < b for a, b in itertools.pairwise(ticks))
    assert len(ticks) <= max(most, math.log10(factor) / 6 + 2)


@given(st.floats(1, 1e8), st.integers(2, 10))
def test_times_of_an_axis_are_even(high, most):
    ticks = charts.even_time_ticks(high, most)
    assert ticks[0] == 0 and ticks[-1] <= high and len(ticks) <= most + 1
    assert len({b - a for a, b in itertools.pairwise(ticks)}) <= 1


@pytest.mark.parametrize("is_log", [False, True])
def test_a_scale_maps_its_ends_and_keeps_what_lies_outside(is_log):
    across = charts.Scale(10, 1000, 50, 250, is_log)
    assert [across(value) for value in (10, 1000, 1, 5000)] == pytest.approx([50, 250, 50, 250])
    assert across(100) == pytest.approx(150 if is_log else 50 + 200 * 90 / 990)
    assert charts.Scale(7, 7, 0, 10, is_log)(7) == 5
