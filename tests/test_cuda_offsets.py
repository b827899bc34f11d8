"""Offsets past 2^31 inside the CUDA C++ attention kernels, without memory for so many tokens."""

import operator_suite as suite
import pytest
import torch

from videoswin_kernels.cuda.attention import launch_window_attention
from videoswin_kernels.cuda.attention_backward import launch_window_attention_backward
from videoswin_kernels.ops._vectors import WindowVectors

RUNS = [run for run in suite.runs("window_attention") if run.kernels == "cuda"]
pytestmark = pytest.mark.skipif(not RUNS, reason="no CUDA C++ attention runs here")
WIDTH, TOKENS, CLIPS = 16, 4, 3


def vectors_of(number, source, device):
    """One window of four places, masked, in a table of seven rows."""

    def integers(*values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    return WindowVectors(
        source=integers(*source),
        target=integers(0).expand(number),
        region=integers(0, 0, 1, 1),
        mixed=integers(1),
        code=integers(0, 1, 2, 3),
        place=integers(0, 1, 2, 3),
        offset=3,
        num_windows=1,
        tokens_per_window=TOKENS,
        has_padding=True,
        has_mask=True,
        canonical_depth=0,
    )


def differentiate(rows, number, source, table, pad):
    """Fills out, grad_qkv and the log-sum-exp of each token; the sums over all of them."""
    qkv, up, out, grad_qkv, log_sum_exp = rows
    vectors = vectors_of(number, source, qkv.device)
    launch_window_attention(out, log_sum_exp, qkv, table, pad, 1, 0.25, vectors)
    sums = torch.empty_like(table), table.new_empty(3 * WIDTH)
    saved = up, qkv, table, pad, out, log_sum_exp
    launch_window_attention_backward(grad_qkv, *sums, *saved, 1, 0.25, True, True, True, vectors)
    return sums


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_tokens_far_apart_give_the_bits_of_tokens_side_by_side(run, untouched):
    # The third clip of the output begins beyond 2^31 numbers, that of qkv far beyond.
    number, dtype = 2**31 // WIDTH // 2 + 5, torch.float16
    places = [number - 1, 3, -1, number // 2]
    kept = [place for place in places if place >= 0]
    table, pad = run.put(torch.randn(7, 1)), run.put(torch.randn(3 * WIDTH).to(dtype))

    def memory(make, number):
        widths = 3 * WIDTH, WIDTH, WIDTH, 3 * WIDTH
        rows = [make(CLIPS * number, n, dtype).view(CLIPS, number, 1, 1, n) for n in widths]
        return *rows, make(CLIPS, number, torch.float32).view(CLIPS, 1, number)

    far = memory(lambda *shape: untouched(*shape[:2], dtype=shape[2], device=run.device), number)
    near = memory(lambda *shape: run.put(torch.randn(shape[:2]).to(shape[2])), len(kept))
    for one, other in zip(far[:2], near[:2], strict=True):
        one[:, kept] = other
    sums = differentiate(far, number, places, table, pad)
    near_sums = differentiate(near, len(kept), [0, 1, -1, 2], table, pad)
    for one, other in zip(far[2:4], near[2:4], strict=True):
        assert torch.equal(one[:, kept], other)
    assert torch.equal(far[4][..., kept], near[4])
    assert all(map(torch.equal, sums, near_sums))
