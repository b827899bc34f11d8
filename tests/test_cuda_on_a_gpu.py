"""CUDA C++ kernels on a GPU: graphs, streams, devices, more than 2^31 elements, the hardware."""

import pytest
import torch

from videoswin_kernels import (
    cyclic_shift,
    extension,
    patch_merging,
    residual_norm,
    window_partition,
    window_reverse,
)

WINDOW = {"window": (2, 3, 3), "shift": (1, 1, 1), "kernels": "cuda"}
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(
        extension.why_not("_ops") is not None, reason=str(extension.why_not("_ops"))
    ),
]


def step(x, affine):
    """All operators, forward and backward: what comes out, and the gradients."""
    x = x.detach().requires_grad_()
    affine = [each.detach().requires_grad_() for each in affine]
    shifted = cyclic_shift(x, (1, 1, 2), kernels="cuda")
    windows = window_partition(shifted, **WINDOW)
    back = window_reverse(windows, grid=x.shape[1:4], **WINDOW)
    total, norm = residual_norm(x, back, *affine[:2], kernels="cuda")
    merged = patch_merging(total + norm, *affine[2:], kernels="cuda")
    return (merged.detach(), *torch.autograd.grad(merged.cos().sum(), [x, *affine]))


def make(device="cuda", channels=96):
    """A stream of tokens and the weights of both norms."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 7, channels, device=device)
    affine = [torch.randn(n * channels, device=device) for n in (1, 1, 4, 4)]
    return x, affine


def test_a_captured_step_is_replayed_on_new_values():
    x, affine = make()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(x, affine)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(x, affine)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(map(torch.equal, results, step(x, affine)))


def test_kernels_are_queued_in_the_current_stream():
    x, affine = make()
    expected = step(x.sin(), affine)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # What another stream would read now are the values from before.
        late = torch.zeros_like(x)
        torch.cuda._sleep(100_000_000)
        late.copy_(x.sin())
        results = step(late, affine)
    side.synchronize()
    assert all(map(torch.equal, results, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_kernels_run_on_the_device_of_their_tensors():
    expected = step(*make())
    with torch.cuda.device(0):
        results = step(*make("cuda:1"))
    assert all(result.device.index == 1 for result in results)
    assert all(map(torch.equal, (result.to("cuda:0") for result in results), expected))


def test_tensors_of_more_than_2_31_elements():
    clips, width = 3, 64
    grid = (1, 1 << 13, (2**31 // width >> 13) // 2 + 1)
    x = torch.randn(clips, *grid, width, device="cuda", dtype=torch.float16)
    assert x.numel() > 2**31
    weight, bias = torch.randn(2, width, device="cuda")
    total, norm = residual_norm(x, x.flip(0), weight, bias, kernels="cuda")
    rolled = cyclic_shift(x, (0, 3, -2), kernels="cuda")
    assert torch.equal(rolled[-1], x[-1].roll((3, -2), (1, 2)))
    expected = residual_norm(x[-1:], x[:1], weight, bias, kernels="reference")
    for got, wanted in zip((total, norm), expected, strict=True):
        torch.testing.assert_close(got[-1:], wanted, rtol=2e-3, atol=2e-3)
    del total, norm, rolled
    merged = patch_merging(x, *torch.randn(2, 4 * width, device="cuda"), kernels="cuda")
    assert torch.isfinite(merged[-1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_hardware_gives_what_the_emulation_gives(dtype):
    """Movement bit for bit; sums differ by the order of shuffles alone, which is the same."""
    if extension.why_not("_emulated") is not None:
        pytest.skip(extension.why_not("_emulated"))
    x, affine = make("cpu", 40)
    x, affine = x.to(dtype), [each.to(dtype) for each in affine]
    emulated = step(x, affine)
    native = step(x.cuda(), [each.cuda() for each in affine])
    for one, other in zip(emulated, native, strict=True):
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(other.cpu(), one, rtol=tolerance, atol=tolerance)
