"""Slow judges of the reference: nested loops over coordinates in Python and float64 NumPy.

Nothing here is shared with the code under test. A position is a tuple (d, h, w); windows are
numbered row-major over their positions, as are tokens over the grid. Extents are tuples: what
they give is cached, because many tests ask for the same, and nobody writes to it.
"""

import functools
import itertools
import math

import numpy as np


def positions(extent):
    """All (d, h, w) of a box, row-major."""
    return list(itertools.product(*(range(size) for size in extent)))


def flat(position, extent):
    """Row-major number of a position in a box."""
    return (position[0] * extent[1] + position[1]) * extent[2] + position[2]


def clamp(grid, window, shift):
    """(window, shift, padded grid) as used: an axis not above its window loses its shift."""
    used_window, used_shift, padded = [], [], []
    for size, width, step in zip(grid, window, shift, strict=True):
        if size <= width:
            width, step = size, 0
        used_window.append(width)
        used_shift.append(step)
        padded.append(math.ceil(size / width) * width)
    return tuple(used_window), tuple(used_shift), tuple(padded)


def places(window, order="dhw"):
    """Positions inside a window in the order of its tokens."""
    if order == "dhw":
        return positions(window)
    return [(d, h, w) for h, w, d in positions((window[1], window[2], window[0]))]


@functools.cache
def windows(grid, window, shift, order="dhw"):
    """For every window a list of N input positions, None where the token is padding."""
    window, shift, padded = clamp(grid, window, shift)
    counts = tuple(padded[axis] // window[axis] for axis in range(3))
    result = []
    for which in positions(counts):
        tokens = []
        for place in places(window, order):
            token = tuple(
                (which[a] * window[a] + place[a] + shift[a]) % padded[a] for a in range(3)
            )
            is_inside = all(token[a] < grid[a] for a in range(3))
            tokens.append(token if is_inside else None)
        result.append(tokens)
    return result


def region_volume(padded, window, shift):
    """The official region numbers of the rolled grid, later slices over earlier ones.

    A shift of 0 makes the last slice the whole axis, because -0 is 0.
    """
    volume = np.full(padded, -1)
    axes = [
        (slice(-window[a]), slice(-window[a], -shift[a]), slice(-shift[a], None)) for a in range(3)
    ]
    count = 0
    for d_range in axes[0]:
        for h_range in axes[1]:
            for w_range in axes[2]:
                volume[d_range, h_range, w_range] = count
                count += 1
    assert volume.min() >= 0
    return volume


@functools.cache
def regions(grid, window, shift, order="dhw"):
    """[M, N] official region number of every place of every window."""
    window, shift, padded = clamp(grid, window, shift)
    volume = region_volume(padded, window, shift)
    counts = tuple(padded[axis] // window[axis] for axis in range(3))
    return np.array(
        [
            [
                volume[tuple(which[a] * window[a] + place[a] for a in range(3))]
                for place in places(window, order)
            ]
            for which in positions(counts)
        ]
    )


@functools.cache
def relative_rows(grid, window, order="dhw"):
    """[N, N] bias table row of every pair, query first.

    As upstream: the index of the configured window, of which a clamped window reads the first
    N rows and columns in (d, h, w) order, whatever its own shape.
    """
    clamped, _, _ = clamp(grid, window, (0, 0, 0))
    full = positions(window)
    rows = []
    for query in places(clamped, order):
        row = []
        for key in places(clamped, order):
            i, j = full[flat(query, clamped)], full[flat(key, clamped)]
            steps = tuple(i[a] - j[a] + window[a] - 1 for a in range(3))
            row.append(flat(steps, tuple(2 * size - 1 for size in window)))
        rows.append(row)
    return np.array(rows)


def table_rows(window):
    """Number of rows of the bias table."""
    return math.prod(2 * size - 1 for size in window)


def cyclic_shift(x, shift):
    """numpy [B, D, H, W, C] moved by shift, what leaves on one side enters on the other."""
    result = np.empty_like(x)
    grid = x.shape[1:4]
    for token in positions(grid):
        moved = tuple((token[a] + shift[a]) % grid[a] for a in range(3))
        result[:, moved[0], moved[1], moved[2]] = x[:, token[0], token[1], token[2]]
    return result


def window_partition(x, window, shift, order="dhw"):
    """numpy [B, D, H, W, C] -> [B*M, N, C], zeros at padding."""
    table = windows(tuple(x.shape[1:4]), window, shift, order)
    result = np.zeros((x.shape[0], len(table), len(table[0]), x.shape[4]), dtype=x.dtype)
    for b, m, n in positions(result.shape[:3]):
        token = table[m][n]
        if token is not None:
            result[b, m, n] = x[(b, *token)]
    return result.reshape(-1, *result.shape[2:])


def window_reverse(values, grid, window, shift, order="dhw"):
    """numpy [B*M, N, C] -> [B, D, H, W, C]."""
    table = windows(grid, window, shift, order)
    result = np.full((len(values) // len(table), *grid, values.shape[2]), np.nan)
    for number, value in enumerate(values):
        b, m = divmod(number, len(table))
        for n, token in enumerate(table[m]):
            if token is not None:
                result[(b, *token)] = value[n]
    return result


def window_attention(
    qkv, bias_table, window, shift, num_heads, pad_qkv=None, scale=None, masked=-100.0
):
    """numpy float64 [B, D, H, W, 3C] -> [B, D, H, W, C], one query at a time."""
    batch, grid, channels = qkv.shape[0], tuple(qkv.shape[1:4]), qkv.shape[4] // 3
    width = channels // num_heads
    scale = scale or width**-0.5
    table = windows(grid, window, shift)
    region = regions(grid, window, shift)
    rows = relative_rows(grid, window)
    pad = np.zeros(3 * channels) if pad_qkv is None else pad_qkv
    result = np.full((*qkv.shape[:4], channels), np.nan)
    for b, m in itertools.product(range(batch), range(len(table))):
        packed = np.array([pad if token is None else qkv[(b, *token)] for token in table[m]])
        packed = packed.reshape(len(table[m]), 3, num_heads, width)
        for n, token in enumerate(table[m]):
            if token is None:
                continue
            for head in range(num_heads):
                query = packed[n, 0, head] * scale
                scores = np.array([query @ key for key in packed[:, 1, head]])
                scores = scores + bias_table[rows[n], head]
                scores = scores + np.where(region[m] != region[m][n], masked, 0.0)
                weights = np.exp(scores - scores.max())
                weights = weights / weights.sum()
                result[(b, *token)][head * width : (head + 1) * width] = (
                    weights @ packed[:, 2, head]
                )
    return result


def window_attention_gradients(
    grad_out, qkv, bias_table, window, shift, num_heads, pad_qkv=None, scale=None
):
    """(grad_qkv, grad_table, grad_pad), numpy float64: what each pair of places adds, one by one.

    The gradient of score[i, j] is weight[i, j] * grad_out[i] . (v[j] - out[i]): what the pair adds
    to its row of the table, and times scale the share of q[i] in k[j] and of k[j] in q[i].
    """
    batch, grid, channels = qkv.shape[0], tuple(qkv.shape[1:4]), qkv.shape[4] // 3
    width = channels // num_heads
    scale = scale or width**-0.5
    table = windows(grid, window, shift)
    region = regions(grid, window, shift)
    rows = relative_rows(grid, window)
    pad = np.zeros(3 * channels) if pad_qkv is None else pad_qkv
    grad_qkv, grad_table = np.zeros_like(qkv), np.zeros_like(bias_table)
    grad_pad = np.zeros(3 * channels)
    for b, m, head in itertools.product(range(batch), range(len(table)), range(num_heads)):
        part = [slice(at, at + width) for at in range(head * width, 3 * channels, channels)]
        packed = [pad if token is None else qkv[(b, *token)] for token in table[m]]
        into = [grad_pad if token is None else grad_qkv[(b, *token)] for token in table[m]]
        for i, token in enumerate(table[m]):
            if token is None:
                continue
            query, up = packed[i][part[0]], grad_out[(b, *token)][part[0]]
            scores = [
                scale * query @ key[part[1]] + bias_table[row, head]
                for key, row in zip(packed, rows[i], strict=True)
            ]
            scores = np.array(scores) + np.where(region[m] != region[m][i], -100.0, 0.0)
            weights = np.exp(scores - scores.max())
            weights = weights / weights.sum()
            towards = np.array([up @ value[part[2]] for value in packed])
            steps = weights * (towards - weights @ towards)
            for j, row in enumerate(rows[i]):
                grad_table[row, head] += steps[j]
                into[i][part[0]] += scale * steps[j] * packed[j][part[1]]
                into[j][part[1]] += scale * steps[j] * query
                into[j][part[2]] += weights[j] * up
    return grad_qkv, grad_table, grad_pad


def layer_norm(row, weight, bias, eps):
    """LayerNorm of one vector with the biased variance."""
    mean = row.mean()
    variance = ((row - mean) ** 2).mean()
    return (row - mean) / math.sqrt(variance + eps) * weight + bias


def merge_sources(grid):
    """Per output token the four input positions (h fastest), None where one is padding."""
    result = []
    for d, h, w in positions((grid[0], math.ceil(grid[1] / 2), math.ceil(grid[2] / 2))):
        four = [(d, 2 * h + dh, 2 * w + dw) for dw in (0, 1) for dh in (0, 1)]
        result.append([t if t[1] < grid[1] and t[2] < grid[2] else None for t in four])
    return result


def patch_merging(x, weight, bias, eps=1e-5):
    """numpy float64 [B, D, H, W, C] -> [B, D, ceil(H/2), ceil(W/2), 4C]."""
    batch, grid, channels = x.shape[0], x.shape[1:4], x.shape[4]
    merged = (grid[0], math.ceil(grid[1] / 2), math.ceil(grid[2] / 2))
    result = np.full((batch, *merged, 4 * channels), np.nan)
    zeros = np.zeros(channels)
    for b in range(batch):
        for where, four in zip(positions(merged), merge_sources(grid), strict=True):
            row = np.concatenate([zeros if t is None else x[(b, *t)] for t in four])
            result[(b, *where)] = layer_norm(row, weight, bias, eps)
    return result


def residual_norm(x, branch, weight, bias, eps=1e-5, branch_scale=None):
    """numpy float64 (x + s*branch, LayerNorm of it) over the last axis."""
    total, normed = np.full(x.shape, np.nan), np.full(x.shape, np.nan)
    for index in np.ndindex(*x.shape[:-1]):
        step = 1.0 if branch_scale is None else branch_scale[index[0]]
        total[index] = x[index] + step * branch[index]
        normed[index] = layer_norm(total[index], weight, bias, eps)
    return total, normed
