"""Products of runs and panels: right for every kind of weights and every length, and of the same bits in every tile."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pagedkv.data.simd_llvm import IS_WIDE, has_bfloat16_products
from pagedkv.data.simd_products import (
    PANEL,
    WIDENED,
    add_half_panel,
    add_panels,
    add_panels_ahead,
    add_rows,
    add_streams,
    pack,
    scores_of,
    turn,
    unit_of,
    unit_of_copy,
    unpacked,
    widen,
)
from pagedkv.data.team import torch_alone
from pagedkv.jit import compiled


@compiled
def four_by_two(x, y, count, sums):
    add_panels(x, (0 * count, count, 2 * count, 3 * count), y, (0 * count, PANEL * count), count, sums)


@compiled
def four_by_one(x, y, count, sums, ahead, step):
    rows = (3 * count, count, 0 * count, 2 * count)
    add_panels_ahead(x, rows, y, (PANEL * count,), count, sums, y, ahead, step)


@compiled
def two_by_one(x, y, count, sums):
    add_panels(x, (count, 3 * count), y, (0 * count,), count, sums)


@compiled
def one_by_one(x, y, count, sums):
    add_panels(x, (2 * count,), y, (PANEL * count,), count, sums)


@compiled
def streams(x, y, count, sums, ahead):
    """Multiply one row by both panels, then once more with the first one between them, and two rows by one."""
    add_streams(x, (2 * count,), y, (0 * count, PANEL * count), count, sums[: 2 * PANEL], ahead)
    three = (PANEL * count, 0 * count, PANEL * count)
    add_streams(x, (2 * count,), y, three, count, sums[2 * PANEL : 5 * PANEL], ahead)
    add_streams(x, (count, 3 * count), y, (0 * count,), count, sums[5 * PANEL :], ahead)


@compiled
def three_by_halves(x, y, count, sums, cut):
    """Multiply the second panel: one half after the other, each in two pieces."""
    for begin, length in ((0, cut), (cut, count - cut)):
        rows = (3 * count + begin, begin, count + begin)
        for half in (0, PANEL // 2):
            place = (PANEL * (count + begin) + half,)
            add_half_panel(x, rows, y, place, length, sums, PANEL + half, y, -(10**6), 64)


@compiled
def packed_piece(y, first, apart, last, offset, left, panel, to):
    pack(y, first, apart, last, offset, left, panel, to)


@compiled
def scores_of_keys(rows, width, keys, places, dim, step, tile, scale, out):
    for group in range(2):
        for d in range(0, dim, step):
            turn(rows, keys, places, 16 * group, 3 + d, dim - d, tile, (group * width + d) * 256 // step)
    apart, count = width * 256 // step, width * 16 // step
    scores_of(rows, 0 * dim, width, tile, (0 * dim, apart), count, scale, out, 16 + 0 * dim)
    scores_of(rows, 0 * dim, width, tile, (apart,), count, scale, out, 144 + 0 * dim)


@compiled
def rows_added(sums, width, values, places, first, ahead, offset, dim, weights, weight_at, count):
    for d in range(0, dim, 16):
        add_rows(sums, 16 + d, width, values, places, first, ahead, offset + d, dim - d, weights, weight_at, count)


@compiled
def widened_at(numbers, index, target, to):
    widen(numbers, index, target, to)


KINDS = [("float32", kind) for kind in ("float32", "float16", "bfloat16", "int8")]
if has_bfloat16_products():
    KINDS += [("bfloat16", "bfloat16"), ("bfloat16", "int8")]


def bits(numbers: torch.Tensor) -> np.ndarray:
    shown = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}.get(numbers.dtype, numbers.dtype)
    return numbers.view(shown).numpy().ravel()


def random(kind: str, count: int, seed: int, rows: int = 4) -> torch.Tensor:
    numbers = torch.randn(rows, count, generator=torch.Generator().manual_seed(seed))
    return (40 * numbers).clamp(-127, 127).to(torch.int8) if kind == "int8" else numbers.to(getattr(torch, kind))


def panel_of(rows: np.ndarray, unit: int) -> np.ndarray:
    """Return 32 rows as a panel, number by number; the other one of a last pair must not count."""
    size = -(-rows.shape[1] // unit) * unit
    panel = np.full(
        size * PANEL, bits(torch.ones(1, dtype=torch.bfloat16))[0] if size > rows.shape[1] else 0, rows.dtype
    )
    for o in range(PANEL):
        for k in range(rows.shape[1]):
            at = {
                1: k * PANEL + o,
                2: (k // 2 * PANEL + o) * 2 + k % 2,
                4: k // 4 * 4 * PANEL + o // 16 * 64 + o % 16 // 4 * 16 + k % 4 // 2 * 8 + o % 4 * 2 + k % 2,
            }[unit]
            panel[at] = rows[o, k]
    return panel


def kinds_and_counts():
    found = []
    for left, right in KINDS:
        unit = unit_of(4 if left == "float32" else 2, right == "int8")
        for count in (1, 7, 16, 33, 64, 100, 576):
            count = -(-count // unit) * unit if unit == 4 else count
            found.append(pytest.param(left, right, count, unit, id=f"{left}-{right}-{count}"))
    return found


@pytest.mark.parametrize(("left", "right", "count", "unit"), kinds_and_counts())
def test_products_are_right_and_the_same_in_every_tile(left, right, count, unit):
    x, y = random(left, count, 1), random(right, count, 2, 2 * PANEL)
    exact = (x.double() @ y.double().T).numpy()
    rows = bits(y).reshape(2, PANEL, count)
    # Panels of an odd number of pairs are longer than `count`: what is multiplied by zero is behind the last one.
    flat = np.zeros(PANEL * (2 * count + 4), rows.dtype)
    for i in (0, 1):
        panel = panel_of(rows[i], unit)
        assert (unpacked(panel, unit)[:, :count] == rows[i]).all()
        flat[PANEL * count * i : PANEL * count * i + len(panel)] = panel
    if count % unit:  # the second panel then begins within the first one's last pair
        for i in (0, 1):
            alone = np.zeros(2 * PANEL, np.float32)
            one = panel_of(rows[i], unit)
            two_by_one(bits(x), one, count, alone)
            check(
                alone.reshape(2, PANEL), exact[[1, 3], PANEL * i : PANEL * (i + 1)], x[[1, 3]], y[PANEL * i :][:PANEL]
            )
        return
    whole, ahead, two, one = (np.zeros(size, np.float32) for size in (8 * PANEL, 4 * PANEL, 2 * PANEL, PANEL))
    four_by_two(bits(x), flat, count, whole)
    whole = whole.reshape(4, 2 * PANEL)
    check(whole, exact, x, y)
    four_by_one(bits(x), flat, count, ahead, -(10**6), 64)
    two_by_one(bits(x), flat, count, two)
    one_by_one(bits(x), flat, count, one)
    assert (ahead.reshape(4, PANEL) == whole[[3, 1, 0, 2], PANEL:]).all()
    assert (two.reshape(2, PANEL) == whole[[1, 3], :PANEL]).all()
    assert (one == whole[2, PANEL:]).all()
    for distance in (0, 16, 10**7):
        several = np.zeros(7 * PANEL, np.float32)
        streams(bits(x), flat, count, several, distance)
        first, second = whole[2, :PANEL], whole[2, PANEL:]
        assert (several == np.concatenate([first, second, second, first, second, *whole[[1, 3], :PANEL]])).all()
    if left == "float32":
        halves = np.zeros(5 * PANEL, np.float32)
        three_by_halves(bits(x), flat, count, halves, count // 3)
        assert (halves.reshape(5, PANEL)[1:4] == whole[[3, 0, 1], PANEL:]).all()
        assert not halves.reshape(5, PANEL)[[0, 4]].any()
    again = whole.ravel().copy()
    four_by_two(bits(x), flat, count, again)
    assert (np.abs(again - 2 * whole.ravel()) <= 1e-5 * np.abs(whole).max()).all(), "sums are added to"


def check(got, exact, x, y):
    size = (x.double().abs() @ y.double().abs().T).numpy()
    assert (np.abs(got - exact) <= 2e-6 * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("right", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize(("count", "rows"), [(1, 16), (16, 5), (33, 16), (100, 1)])
def test_rows_become_panels_as_what_is_multiplied_or_as_they_are(right, dtype, count, rows):
    if dtype == torch.bfloat16 and (right not in ("bfloat16", "int8") or not has_bfloat16_products()):
        pytest.skip("is not multiplied by bfloat16")
    if dtype is None and IS_WIDE:
        pytest.skip("copies are what is multiplied")
    dtype = getattr(torch, right) if dtype is None else dtype
    unit = unit_of_copy(dtype.itemsize)
    y, width = random(right, count + 3, 5, rows), -(-count // 32) * 32
    panel = np.full(PANEL * width + 8, 7, bits(torch.zeros(1, dtype=dtype)).dtype)
    untouched = panel.copy()
    for i in range(0, count, 16 * unit):
        packed_piece(bits(y), 2, count + 3, rows - 1, i, count - i, panel, i * PANEL)
    got = unpacked(panel[: PANEL * width], unit)[:16, : -(-count // (16 * unit)) * 16 * unit]
    expected = np.zeros_like(got)
    numbers = torch.zeros(16, count)
    numbers[:rows] = y[:, 2 : 2 + count].float()
    numbers[rows:] = numbers[rows - 1]
    expected[:, :count] = bits(numbers.to(dtype)).reshape(16, count)
    assert (got == expected).all()
    assert (panel[-8:] == untouched[-8:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_of_int8_are_widened_without_error_and_nothing_else_is_written(dtype):
    if dtype == torch.bfloat16 and not has_bfloat16_products():
        pytest.skip("this processor does not multiply bfloat16")
    for seed in range(4):
        rows = np.resize(np.roll(np.arange(-127, 128, dtype=np.int8), 77 * seed), (PANEL, 4))
        numbers = np.concatenate([np.zeros(5, np.int8), panel_of(rows, unit_of(dtype.itemsize, True))])
        target = torch.full((WIDENED + 5,), 3.0, dtype=dtype)
        widened_at(numbers, 5, bits(target), 3)
        expected = panel_of(rows.astype(np.float32), unit_of(dtype.itemsize, False))
        assert target[3:-2].float().equal(torch.from_numpy(expected))
        assert target[:3].eq(3).all() and target[-2:].eq(3).all()


@pytest.mark.skipif(not has_bfloat16_products(), reason="this processor does not multiply bfloat16")
def test_every_number_of_int8_becomes_the_same_as_bfloat16():
    numbers = np.arange(-127, 129, dtype=np.int16).clip(max=127).astype(np.int8)
    rows = np.tile(numbers, (PANEL, 1))
    x = torch.eye(len(numbers), dtype=torch.bfloat16)
    for at, number in enumerate(numbers):
        sums = np.zeros(2 * PANEL, np.float32)
        two_by_one(bits(torch.cat([x[at : at + 1]] * 4)), panel_of(rows, 4), len(numbers), sums)
        assert (sums == number).all()


def test_torch_alone_gives_its_threads_back():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(KeyError), torch_alone():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dim", [1, 7, 16, 33, 64, 100])
@pytest.mark.parametrize(("left", "right"), [kind for kind in KINDS if kind != ("bfloat16", "int8")])
def test_scores_are_right_and_the_same_for_few_keys_and_many(left, right, dim):
    step = 32 if left == "bfloat16" else 16
    width = -(-dim // step) * step
    queries, pool = torch.zeros(4, width), torch.cat([random(right, 3 + dim, seed) for seed in range(10)])
    queries[:, :dim] = random("float32", dim, 99)
    queries = queries.to(getattr(torch, left))
    order = np.random.default_rng(dim).permutation(40)[:32]
    tile, out = np.full(512 * 256 // step, np.nan, np.float32), np.zeros(16 + 128 + 64 + 16, np.float32)
    places = order * (3 + dim)
    scores_of_keys(bits(queries), width, bits(pool), places, dim, step, tile, np.float32(0.5), out)
    keys = pool[torch.from_numpy(order), 3:].double()
    exact = (keys @ queries[:, :dim].double().T).numpy() * 0.5
    size = (keys.abs() @ queries[:, :dim].double().abs().T).numpy()
    got = out[16:144].reshape(32, 4)
    assert (np.abs(got - exact) <= 1e-6 * size).all()
    assert (out[144:208].reshape(16, 4) == got[16:]).all()
    assert not out[:16].any() and not out[-16:].any()


@pytest.mark.parametrize("dim", [7, 16, 24, 64])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8"])
def test_weighted_rows_are_added_where_they_lie_token_by_token(kind, dim):
    count, width, offset = 13, -(-dim // 16) * 16, 3
    values = random(kind, offset + dim, 5, rows=20)
    places = np.random.default_rng(dim).permutation(20) * (offset + dim)
    weights = random("float32", 4, 6, rows=2 + count).numpy()
    sums = np.arange(16 + 4 * width + 16, dtype=np.float32)
    exact = sums[16:-16].reshape(4, width).astype(np.float64)
    size, flat = np.abs(exact), values.double().numpy()
    for token in range(count):
        row = np.zeros(width)
        row[:dim] = flat[places[2 + token] // (offset + dim), offset:]
        exact += np.outer(weights[2 + token].astype(np.float64), row)
        size += np.abs(np.outer(weights[2 + token].astype(np.float64), row))
    each, before = sums.copy(), sums.copy()
    rows_added(sums, width, bits(values), places, 2, 5, offset, dim, weights.ravel(), 8, count)
    assert (np.abs(sums[16:-16].reshape(4, width) - exact) <= 1e-6 * size).all()
    assert (sums[:16] == before[:16]).all() and (sums[-16:] == before[-16:]).all()
    for token in range(count):
        rows_added(each, width, bits(values), places, 2 + token, 2, offset, dim, weights.ravel(), 8 + 4 * token, 1)
    assert (each == sums).all()
