"""The index vectors against nested loops on more than 500 shapes, and their refusals."""

import dataclasses
import itertools
import random

import loops
import numpy as np
import pytest
import torch
from operator_suite import refuses
from torch.nn import functional as F

import videoswin_kernels as kernels
from videoswin_kernels.geometry import (
    WindowGeometry,
    clamp_window,
    merge_index,
    relative_position_index,
    shift_index,
)

CLIP = (16, 56, 56)  # stage 1 of 32 frames of 224 x 224 pixels
FULL = (8, 7, 7)
HALF = (4, 3, 3)


def _axis(relation, rng):
    """(size, window) of one axis in the named relation."""
    window = rng.randint(2, 4)
    return {
        "exact": (window * rng.randint(2, 3), window),
        "padded": (window * rng.randint(1, 2) + rng.randint(1, window - 1), window),
        "equal": (window, window),
        "below": (rng.randint(1, window - 1), window),
        "unit": (rng.randint(2, 4), 1),
        "single": (1, rng.randint(1, 4)),
    }[relation]


def _cases():
    """Every combination of relations over the three axes with three shifts each."""
    relations = ("exact", "padded", "equal", "below", "unit", "single")
    rng = random.Random(20210624)
    cases = {}
    for names in itertools.product(relations, repeat=3):
        grid, window = zip(*(_axis(name, rng) for name in names), strict=True)
        shifts = [
            tuple(size // 2 for size in window),
            tuple(rng.randrange(size) for size in window),
            # One axis keeps its shift, the others have none.
            tuple(
                rng.randrange(s) if axis == rng.randrange(3) else 0 for axis, s in enumerate(window)
            ),
        ]
        cases.update({(grid, window, shift): None for shift in shifts})
    cases.update({(CLIP, FULL, HALF): None, ((10, 7, 7), FULL, HALF): None})
    return list(cases)


CASES = _cases()


def test_there_are_more_than_500_shapes_of_every_kind():
    assert len(set(CASES)) == len(CASES) >= 500
    clamped = {tuple(s <= w for s, w in zip(g, w, strict=True)) for g, w, _ in CASES}
    assert len(clamped) == 8
    assert sum(any(s % w for s, w in zip(g, w, strict=True)) for g, w, _ in CASES) > 100
    assert any(g == (1, 1, 1) for g, _, _ in CASES)
    assert any(w == (1, 1, 1) and g != (1, 1, 1) for g, w, _ in CASES)


def _vectors(geometry):
    names = ("source", "target", "region", "mixed", "code", "place")
    return {name: getattr(geometry, name) for name in names}


@pytest.mark.parametrize(("grid", "window", "shift"), CASES)
def test_vectors_equal_loops(grid, window, shift):
    used_window, used_shift, padded = loops.clamp(grid, window, shift)
    assert clamp_window(grid, window, shift) == (used_window, used_shift, padded)
    for order in ("dhw", "hwd"):
        geometry = WindowGeometry.build(grid, window, shift, order=order)
        assert (geometry.grid, geometry.window, geometry.shift, geometry.padded) == (
            grid,
            used_window,
            used_shift,
            padded,
        )
        table = loops.windows(grid, window, shift, order)
        num_windows, num_tokens = len(table), len(table[0])
        assert geometry.num_windows == num_windows
        assert geometry.tokens_per_window == num_tokens
        source = [-1 if t is None else loops.flat(t, grid) for row in table for t in row]
        np.testing.assert_array_equal(geometry.source, source)
        target = np.full(np.prod(grid), -1)
        for number, token in enumerate(source):
            if token >= 0:
                target[token] = number
        assert target.min() >= 0
        np.testing.assert_array_equal(geometry.target, target)

        region = loops.regions(grid, window, shift, order)
        np.testing.assert_array_equal(geometry.region, region.ravel())
        mixed = [len(set(row)) > 1 for row in region.tolist()]
        np.testing.assert_array_equal(geometry.mixed, np.array(mixed, dtype=int))

        rows = geometry.code[:, None] - geometry.code[None, :] + geometry.offset
        np.testing.assert_array_equal(rows, loops.relative_rows(grid, window, order))
        assert geometry.code.min() == 0
        place = np.full(geometry.code.max() + 1, -1)
        place[geometry.code] = np.arange(num_tokens)
        np.testing.assert_array_equal(geometry.place, place)


@pytest.mark.parametrize(("grid", "window", "shift"), CASES[::7])
def test_hwd_permutes_the_places_of_dhw_in_every_vector(grid, window, shift):
    dhw = WindowGeometry.build(grid, window, shift)
    hwd = WindowGeometry.build(grid, window, shift, order="hwd")
    inner = {place: n for n, place in enumerate(loops.places(dhw.window))}
    moved = np.array([inner[place] for place in loops.places(dhw.window, "hwd")])
    shape = (dhw.num_windows, dhw.tokens_per_window)
    np.testing.assert_array_equal(hwd.source.reshape(shape), dhw.source.reshape(shape)[:, moved])
    np.testing.assert_array_equal(hwd.region.reshape(shape), dhw.region.reshape(shape)[:, moved])
    np.testing.assert_array_equal(hwd.code, dhw.code[moved])
    np.testing.assert_array_equal(hwd.mixed, dhw.mixed)
    assert hwd.offset == dhw.offset
    window_of, place_of = np.divmod(hwd.target, shape[1])
    np.testing.assert_array_equal(window_of * shape[1] + moved[place_of], dhw.target)
    held = hwd.place >= 0
    np.testing.assert_array_equal(held, dhw.place >= 0)
    np.testing.assert_array_equal(moved[hwd.place[held]], dhw.place[held])


def test_vectors_are_read_only_int32_and_the_geometry_is_frozen():
    geometry = WindowGeometry.build((5, 4, 7), (2, 3, 3), (1, 1, 1))
    for name, vector in _vectors(geometry).items():
        assert isinstance(vector, np.ndarray), name
        assert vector.dtype == np.int32, name
        assert vector.ndim == 1, name
        assert not vector.flags.writeable, name
    assert type(geometry.offset) is int
    with pytest.raises(dataclasses.FrozenInstanceError):
        geometry.offset = 0
    assert shift_index((2, 3, 4), (1, 1, 1)).dtype == np.int32
    assert merge_index((2, 3, 4)).dtype == np.int32


@pytest.mark.parametrize(
    ("grid", "window", "shift", "mixed", "share"),
    [
        (CLIP, FULL, HALF, (79, 128), 0.339),
        ((16, 28, 28), FULL, HALF, (23, 32), 0.422),
        ((16, 14, 14), FULL, HALF, (7, 8), 0.572),
        ((16, 7, 7), FULL, HALF, (1, 2), 0.25),
        (CLIP, (16, 7, 7), (8, 3, 3), (15, 64), 0.119),
    ],
)
def test_masked_windows_and_pairs_of_the_published_models(grid, window, shift, mixed, share):
    geometry = WindowGeometry.build(grid, window, shift)
    assert (int(geometry.mixed.sum()), geometry.num_windows) == mixed
    region = geometry.region.reshape(geometry.num_windows, -1)
    masked = sum((row[:, None] != row[None, :]).mean() for row in region)
    assert masked / geometry.num_windows == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize(
    ("grid", "window", "clamped", "shift"),
    [
        ((16, 7, 7), FULL, FULL, (4, 0, 0)),
        ((8, 14, 5), FULL, (8, 7, 5), (0, 3, 0)),
        ((4, 56, 56), FULL, (4, 7, 7), (0, 3, 3)),
        ((16, 4, 4), FULL, (8, 4, 4), (4, 0, 0)),
        ((15, 14, 14), FULL, FULL, HALF),
        (CLIP, (16, 7, 7), (16, 7, 7), (0, 3, 3)),
    ],
)
def test_clamping_of_common_inputs(grid, window, clamped, shift):
    half = tuple(size // 2 for size in window)
    padded = tuple(-(-size // width) * width for size, width in zip(grid, clamped, strict=True))
    assert clamp_window(grid, window, half) == (clamped, shift, padded)


def test_table_rows_of_a_clamped_window_are_the_first_tokens_of_the_full_one():
    geometry = WindowGeometry.build((8, 4, 4), FULL, HALF)
    assert geometry.offset == 1267
    row = geometry.code[:, None] - geometry.code[None, :] + geometry.offset
    assert (row[16, 0], row[127, 0], row[0, 0]) == (1295, 1658, 1267)
    tiny = WindowGeometry.build((2, 2, 2), (2, 3, 3), (1, 1, 1))
    first = (tiny.code[0] - tiny.code + tiny.offset).tolist()
    assert first == [37, 36, 35, 32, 31, 30, 27, 26]
    full = WindowGeometry.build(CLIP, FULL, HALF)
    row = full.code[:, None] - full.code[None, :] + full.offset
    assert (row[0, -1], row[-1, 0], len(np.unique(row))) == (0, 2534, 2535)
    assert WindowGeometry.build(CLIP, (16, 7, 7), (0, 3, 3)).offset == 2619


@pytest.mark.parametrize(("grid", "used"), [((4, 7, 7), 1183), ((8, 4, 4), 783), (FULL, 2535)])
def test_number_of_table_rows_used(grid, used):
    geometry = WindowGeometry.build(grid, FULL, HALF)
    row = geometry.code[:, None] - geometry.code[None, :] + geometry.offset
    assert len(np.unique(row)) == used


@pytest.mark.trap(4)
def test_a_shift_of_zero_leaves_one_region_on_its_axis():
    geometry = WindowGeometry.build(CLIP, (16, 7, 7), (0, 3, 3))
    region = geometry.region.reshape(geometry.num_windows, *geometry.window)
    assert (region == region[:, :1]).all()
    assert max(len(np.unique(row)) for row in region) == 4
    unshifted = WindowGeometry.build(CLIP, FULL, (0, 0, 0))
    assert not unshifted.mixed.any()


@pytest.mark.trap(5)
@pytest.mark.parametrize("grid", [(16, 14, 21), (4, 9, 6), (16, 7, 7), (6, 10, 8)])
def test_only_the_last_slab_of_a_shifted_axis_is_masked(grid):
    window, shift = (3, 5, 4), (1, 2, 2)
    geometry = WindowGeometry.build(grid, window, shift)
    region = geometry.region.reshape(geometry.num_windows, -1)
    counts = tuple(p // w for p, w in zip(geometry.padded, geometry.window, strict=True))
    # The local rule: on a shifted axis, in its last window, the two sides of w - s are apart.
    for which, row in zip(loops.positions(counts), region, strict=True):
        side = np.zeros(len(row), dtype=int)
        for axis in range(3):
            step = geometry.shift[axis]
            if step > 0 and which[axis] == counts[axis] - 1:
                place = np.array(loops.places(geometry.window))[:, axis]
                side = 2 * side + (place >= geometry.window[axis] - step)
        np.testing.assert_array_equal(row[:, None] != row, side[:, None] != side)


@pytest.mark.parametrize(
    ("grid", "shift"),
    [
        ((1, 1, 1), (3, -2, 0)),
        ((4, 5, 3), (0, 0, 0)),
        ((4, 5, 3), (1, 2, 1)),
        ((4, 5, 3), (-1, -2, -1)),
        ((2, 3, 7), (5, -9, 70)),
        ((6, 1, 4), (-100, 100, 4)),
    ],
)
def test_shift_index_is_a_roll(grid, shift):
    numbers = np.arange(np.prod(grid))
    rolled = loops.cyclic_shift(numbers.reshape(1, *grid, 1), shift)
    np.testing.assert_array_equal(shift_index(grid, shift), rolled.ravel())


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 4, 6), (3, 5, 4), (2, 4, 7), (1, 7, 7), (2, 1, 5)])
def test_merge_index_is_h_fastest_and_pads_far_ends(grid):
    expected = [
        -1 if t is None else loops.flat(t, grid) for row in loops.merge_sources(grid) for t in row
    ]
    np.testing.assert_array_equal(merge_index(grid), expected)


@pytest.mark.parametrize("case", CASES[5::60])
def test_vectors_agree_with_the_reference_operators(case):
    grid, window, shift = case
    geometry = WindowGeometry.build(grid, window, shift)
    x = torch.randn(2, *grid, 3)
    rows = torch.cat([x.flatten(1, 3), torch.zeros(2, 1, 3)], dim=1)  # row -1 is the padding
    gathered = rows[:, torch.tensor(geometry.source).long()]
    options = {"window": window, "shift": shift, "kernels": "reference"}
    windows = kernels.window_partition(x, **options)
    assert torch.equal(windows, gathered.view(-1, geometry.tokens_per_window, 3))
    tokens = torch.randn_like(windows)
    back = tokens.view(2, -1, 3)[:, torch.tensor(geometry.target).long()]
    assert torch.equal(kernels.window_reverse(tokens, grid=grid, **options), back.view(x.shape))

    moved = x.flatten(1, 3)[:, torch.tensor(shift_index(grid, shift)).long()]
    rolled = kernels.cyclic_shift(x, shift, kernels="reference")
    assert torch.equal(rolled, moved.view(x.shape))
    merged = rows[:, torch.tensor(merge_index(grid)).long()].view(2, -1, 12)
    expected = F.layer_norm(merged, (12,))
    normed = kernels.patch_merging(x, torch.ones(12), torch.zeros(12), kernels="reference")
    torch.testing.assert_close(normed.view(expected.shape), expected)


GOOD = {"grid": (4, 6, 6), "window": (2, 3, 3), "shift": (1, 1, 1)}
NOT_THREE_INTS = [
    *((4, 6), (1, 1, 1, 1), (2.0, 3, 3), (True, 3, 3)),
    *({1, 2, 3}, b"abc", 3, None, "333"),
]


@pytest.mark.parametrize(
    ("argument", "value"),
    [(name, value) for name in GOOD for value in NOT_THREE_INTS]
    + [(name, value) for name in ("grid", "window") for value in [(0, 3, 3), (4, -3, 3)]]
    + [("shift", value) for value in [(-1, 1, 1), (2, 1, 1), (1, 1, 3), (9, 0, 0)]],
)
def test_build_refuses_nonsense(argument, value):
    with refuses("WindowGeometry.build", argument, value):
        WindowGeometry.build(**{**GOOD, argument: value})


def test_a_shift_at_a_clamped_axis_is_compared_with_the_configured_window():
    assert clamp_window((2, 6, 6), (4, 3, 3), (3, 1, 1))[1] == (0, 1, 1)


@pytest.mark.parametrize("order", ["whd", "", None, 3])
def test_build_refuses_an_unknown_order(order):
    with refuses("WindowGeometry.build", "order", order):
        WindowGeometry.build(**GOOD, order=order)


@pytest.mark.parametrize("value", [*NOT_THREE_INTS, (0, 6, 6), (4, -6, 6)])
def test_the_smaller_functions_refuse_nonsense(value):
    with refuses("merge_index", "grid", value):
        merge_index(value)
    with refuses("shift_index", "grid", value):
        shift_index(value, (1, 1, 1))


@pytest.mark.parametrize("value", NOT_THREE_INTS)
def test_shift_index_refuses_a_shift_that_is_not_three_integers(value):
    with refuses("shift_index", "shift", value):
        shift_index((4, 6, 6), value)


@pytest.mark.parametrize("window", [(8, 7, 7), (2, 3, 5), (1, 1, 1), (4, 1, 3)])
def test_the_stored_index_is_that_of_the_loops(window):
    index = relative_position_index(window)
    assert index.dtype == np.int64
    np.testing.assert_array_equal(index, loops.relative_rows(window, window))


def test_the_stored_index_refuses_no_window():
    with refuses("relative_position_index", "window", (8, 7)):
        relative_position_index((8, 7))
