"""The checks of arguments, and the one grammar of their errors."""

import math
from decimal import Decimal

import numpy as np
import pytest

from pagedkv.errors import InvalidOperation
from pagedkv.validate import require_choice, require_flag, require_int, require_number, shown


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3)])
def test_any_integer_type_is_an_int(value):
    assert require_int("n", value, 1, 3) == 3
    assert type(require_int("n", value, 1, 3)) is int


@pytest.mark.parametrize(
    ("value", "limits", "reason"),
    [
        (True, (0, 9), "n: expected an int, got True"),
        (2.0, (0, 9), "n: expected an int, got 2.0"),
        ("2", (0, 9), "n: expected an int, got '2'"),
        (None, (0, 9), "n: expected an int, got None"),
        (10, (0, 9), "n: expected an int in 0 … 9, got 10"),
        (np.int64(-1), (0, 9), "n: expected an int in 0 … 9, got -1"),
        (-1, (), "n: expected an int of at least 0, got -1"),
        (2**62 + 1, (), f"n: expected an int in 0 … {2**62}, got {2**62 + 1}"),
        (10**5000, (0, 9), "n: expected an int in 0 … 9, got int without a short text"),
    ],
    ids=range(9),  # pytest cannot name the last one either
)
def test_what_is_no_int_or_out_of_range_is_named(value, limits, reason):
    with pytest.raises(InvalidOperation) as caught:
        require_int("n", value, *limits)
    assert (caught.value.reason, caught.value.argument) == (reason, "n")


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), np.int64(1), Decimal(1)])
def test_any_number_type_is_a_number(value):
    assert require_number("x", value, 0, 1) == 1.0
    assert type(require_number("x", value)) is float


@pytest.mark.parametrize(
    ("value", "limits", "reason"),
    [
        (True, {}, "x: expected a number, got True"),
        ("1", {}, "x: expected a number, got '1'"),
        (None, {}, "x: expected a number, got None"),
        ([1.0], {}, "x: expected a number, got [1.0]"),
        (math.nan, {}, "x: expected a finite number, got nan"),
        (math.inf, {}, "x: expected a finite number, got inf"),
        (10**400, {}, f"x: expected a finite number, got 1{'0' * 78}…"),
        (2, {"low": 0, "high": 1}, "x: expected a number in 0 … 1, got 2"),
        (math.nan, {"low": 0, "high": 1}, "x: expected a number in 0 … 1, got nan"),
        (-1, {"low": 0}, "x: expected a number of at least 0, got -1"),
        (2, {"high": 1}, "x: expected a number of at most 1, got 2"),
        (0.0, {"low": 0, "above": True}, "x: expected a number above 0, got 0.0"),
        (0, {"low": 0, "high": 1, "above": True}, "x: expected a number above 0 and at most 1, got 0"),
    ],
    ids=range(13),
)
def test_what_is_no_number_or_out_of_range_is_named(value, limits, reason):
    with pytest.raises(InvalidOperation) as caught:
        require_number("x", value, **limits)
    assert (caught.value.reason, caught.value.argument) == (reason, "x")


def test_a_choice_is_one_of_the_list():
    assert require_choice("layout", "NHD", ("NHD", "HND")) == "NHD"
    with pytest.raises(InvalidOperation, match="layout: expected one of NHD, HND, got 'nhd'") as caught:
        require_choice("layout", "nhd", iter(("NHD", "HND")))
    assert caught.value.argument == "layout"


def test_a_flag_is_a_bool():
    assert require_flag("causal", False) is False
    with pytest.raises(InvalidOperation, match="causal: expected a bool, got 1") as caught:
        require_flag("causal", 1)
    assert caught.value.argument == "causal"


def test_what_came_is_cut():
    class Silent:
        def __repr__(self):
            raise RuntimeError

    assert shown("x" * 200) == f"'{'x' * 78}…"
    assert shown(Silent()) == "Silent without a short text"
