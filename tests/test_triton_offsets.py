"""Offsets past 2^31 inside the Triton kernels.

A public call would need gigabytes, and programs by the million where Triton is interpreted. So the
launchers get a short index whose rows lie far apart in memory of which no other page is touched.
"""

import pytest
import torch

from videoswin_kernels import cyclic_shift, residual_norm
from videoswin_kernels.ops._vectors import WindowVectors

compiler = pytest.importorskip("videoswin_kernels.triton._compiler")
from videoswin_kernels.triton import (  # noqa: E402
    attention,
    attention_backward,
    gather_rows,
    patch_merging,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not compiler.IS_INTERPRETED, reason="Triton is not interpreted"
)


@pytest.fixture
def far(untouched):
    """Makes rows of which few are ever touched."""
    return lambda number, width, dtype: untouched(number, width, dtype=dtype, device=DEVICE)


def integers(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def test_gather_reads_rows_far_apart_in_every_clip(far):
    number, width, clips = 2**31 - 9, 1, 3
    x, rows = far(clips * number, width, torch.int8), [number - 1, 0, number // 2, -1]
    out = torch.full((clips * len(rows), width), 7, dtype=torch.int8, device=DEVICE)
    expected = torch.zeros_like(out)
    for clip in range(clips):
        for place, row in enumerate(rows):
            if row >= 0:
                value = 1 + clip * len(rows) + place
                x[clip * number + row] = expected[clip * len(rows) + place] = value
    gather_rows.gather_rows(out, x, integers(*rows), number)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("clips", [1, 2])
def test_attention_and_its_backward_read_and_write_tokens_far_apart(clips, far):
    number, width, tokens = 2**31 // 16 // clips + 5, 16, 4
    places = [number - 1, 3, -1, number // 2]
    kept = [place for place in places if place >= 0]
    table, pad = torch.randn(2 * tokens - 1, 1, device=DEVICE), torch.randn(3 * width)

    def run(memory, number, source):
        """Results in memory for each token: qkv, grad_out, out, grad_qkv and log_sum_exp."""
        vectors = WindowVectors(
            source=integers(*source),
            target=far(number, 1, torch.int32),
            region=integers(0, 0, 1, 1),
            mixed=integers(1),
            code=integers(0, 1, 2, 3),
            place=integers(0, 1, 2, 3),
            offset=3,
            canonical_depth=0,
            num_windows=1,
            tokens_per_window=tokens,
            has_padding=True,
            has_mask=True,
        )
        qkv, up, out, grad_qkv, log_sum_exp = memory
        inputs = qkv, table, pad.to(qkv)
        attention.launch_window_attention(out, log_sum_exp, *inputs, 1, 0.25, vectors)
        sums = torch.empty_like(table), torch.empty(3 * width, device=DEVICE)
        saved = up, *inputs, out, log_sum_exp
        attention_backward.launch_window_attention_backward(
            grad_qkv, *sums, *saved, 1, 0.25, True, True, True, vectors
        )
        return sums

    def each(make, number):
        widths = 3 * width, width, width, 3 * width
        rows = [make(clips * number, n, torch.float16).view(clips, number, n) for n in widths]
        return *rows, make(clips, number, torch.float32).view(clips, 1, number)

    spread = each(far, number)
    near = each(lambda *shape: torch.randn(shape[:2]).to(DEVICE, shape[2]), len(kept))
    for one, other in zip(spread[:2], near[:2], strict=True):
        one[:, kept] = other
    sums = run(spread, number, places)
    near_sums = run(near, len(kept), [0, 1, -1, 2])
    for one, other in zip(spread[2:4], near[2:4], strict=True):
        assert torch.equal(one[:, kept], other)
    assert torch.equal(spread[4][..., kept], near[4])
    assert all(map(torch.equal, sums, near_sums))


def test_merging_reads_and_writes_tokens_far_apart(far):
    number, width = 2**31 // 8 + 5, 8
    rows = [number - 1, 3, -1, number // 2, 7, number - 2, number - 3, -1]
    kept = [row for row in rows if row >= 0]
    x, grad_x = (far(number, width, torch.float16) for _ in range(2))
    near = torch.randn(len(kept), width).to(DEVICE, torch.float16)
    x[kept] = near
    weight, bias = (torch.randn(4 * width, device=DEVICE) for _ in range(2))
    grad = torch.randn(2, 4 * width).to(DEVICE, torch.float16)

    def merge(index, x, grad_x):
        shaped = x.view(1, len(x), 1, 1, width)
        out, mean, rstd = torch.empty_like(grad), *torch.empty(2, 2, device=DEVICE)
        patch_merging.launch_patch_merging(
            out, mean, rstd, shaped, weight, bias, 1e-5, x.dtype, index
        )
        affine = torch.empty(2, 4 * width, device=DEVICE)
        patch_merging.launch_patch_merging_backward(
            grad_x, *affine, grad, shaped, weight, mean, rstd, True, True, index
        )
        return out, affine

    results = merge(integers(*rows), x, grad_x)
    places = integers(*(kept.index(row) if row >= 0 else -1 for row in rows))
    near_grad = torch.empty_like(near)
    expected = merge(places, near, near_grad)
    assert all(map(torch.equal, results, expected))
    assert torch.equal(grad_x[kept], near_grad)


@pytest.mark.skipif(DEVICE == "cpu", reason="as many programs as that need a GPU")
def test_tensors_of_more_than_2_31_elements():
    """Whole ones, without gaps: what the index vectors above cannot reach."""
    clips, width = 3, 64
    grid = (1, 1 << 13, (2**31 // width >> 13) // 2 + 1)
    x = torch.randn(clips, *grid, width, device=DEVICE, dtype=torch.float16)
    assert x.numel() > 2**31
    weight, bias = torch.randn(2, width, device=DEVICE)
    inputs = x, x.flip(0), weight, bias
    total, norm = residual_norm(*inputs, kernels="triton")
    rolled = cyclic_shift(x, (0, 3, -2), kernels="triton")
    assert torch.equal(rolled[-1], x[-1].roll((3, -2), (1, 2)))
    last = x[-1:], x[:1], weight, bias
    for got, expected in zip((total, norm), residual_norm(*last, kernels="reference"), strict=True):
        torch.testing.assert_close(got[-1:], expected, rtol=2e-3, atol=2e-3)
